"""The checks of every element: no false alarm, and almost every flip of a half-precision element is seen."""

import pytest
import torch
from attention_states import DTYPES, flipped, random_state, replaced

from bounds import get_detector
from bounds.products.element_detectors import score_elements

OPTIONS = [{}, {"mask": "padded", "kv_heads": 2}, {"rows": 1, "keys": 40}, {"rows": 70, "keys": 70, "channels": 64}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["S_elem", "O_elem"])
def test_F6_F8_no_false_alarm_element_by_element(name, options, dtype):
    verdict = get_detector(name).check(random_state(dtype=dtype, gain=3.0, **options))
    assert verdict.applicable
    assert verdict.rows_checked > 0
    assert verdict.violations == 0
    assert verdict.largest_ratio is not None
    if dtype in (torch.bfloat16, torch.float16):
        assert verdict.largest_ratio > 0.5


@pytest.mark.parametrize("location", ["scores", "out"])
def test_almost_every_flip_of_a_bfloat16_element_is_seen(location):
    name = {"scores": "S_elem", "out": "O_elem"}[location]
    state = random_state(dtype=torch.bfloat16)
    seen, places = 0, [(b, h, i, i // 2) for b in range(2) for h in range(4) for i in range(1, 12)]
    for number, place in enumerate(places):
        fault = replaced(state, **{location: flipped(getattr(state, location), place, number % 16)})
        verdict = get_detector(name).check(fault)
        seen += verdict.fired
        assert {position[:3] for position in verdict.positions} <= {place[:3]}
    assert seen >= 0.97 * len(places)


def test_the_worst_element_of_a_row_is_kept_whatever_the_cut(monkeypatch):
    state = random_state(rows=30, keys=30)
    whole = score_elements(state)
    monkeypatch.setattr("bounds.products.element_detectors.LINE_ELEMENTS", 2 * 4 * 30 * 7)
    cut = score_elements(replaced(state))
    torch.testing.assert_close(cut.residual, whole.residual, rtol=0, atol=1e-13)
    torch.testing.assert_close(cut.tolerance, whole.tolerance, rtol=1e-12, atol=0)


def test_an_element_that_is_no_number_fires():
    state = random_state()
    broken = state.scores.clone()
    broken[0, 1, 2, 3] = float("nan")
    verdict = get_detector("S_elem").check(replaced(state, scores=broken))
    assert (verdict.positions, verdict.nonfinite) == (((0, 1, 2),), 1)


@pytest.mark.parametrize("name", ["P1_q", "P1_k", "P1_v"])
def test_projections_say_that_they_were_not_prepared(name):
    assert "not prepared" in get_detector(name).check(replaced(random_state(), projected={})).reason
