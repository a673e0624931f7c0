"""Published methods to compare with: they decide as described, and miss what they are said to miss."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from attention_states import DTYPES, attend, flipped, mask_of, poked, random_state, replaced

from bounds import AttentionState, Detector, Verdict, get_detector
from bounds.published.attnchecker import CHECKSUM_THRESHOLD, NEAR_INF, AttnCheckerDetector
from bounds.published.flash_abft import MARGIN, FlashAbftDetector, merged_checksums
from bounds.published.product_checksums import output_deviations, score_deviations, seen_rows
from bounds.published.ranger import RESTRICTED, RangerDetector
from bounds.published.realm import Clean, RealmDetector, critical

COMPETITORS: list[type[Detector]] = [AttnCheckerDetector, RangerDetector, RealmDetector, FlashAbftDetector]
CALIBRATED = [detector for detector in COMPETITORS if detector.calibrated]
MASKS = ["all", "causal", "window", "padded"]
CELL = (1, 2, 7, 3)


def ready(name: str, *seeds: int, **options: Any) -> Detector:
    """Return a detector that has seen fault-free calls, those of ``seeds``."""
    detector = get_detector(name)
    for seed in seeds or range(100, 108):
        detector.calibrate(random_state(seed, **options))
    return detector


def with_scores(state: AttentionState, scores: torch.Tensor) -> AttentionState:
    """Return the state in which a fault in the score product runs through to the output."""
    logits = scores * state.scaling
    if state.visible is not None:
        logits = logits.masked_fill(~state.visible, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, -1)
    out = weights @ state.per_query_head(state.value)
    return replaced(state, scores=scores, logits=logits, weights=weights, mass=weights, out=out)


def with_mass(state: AttentionState, weights: torch.Tensor) -> AttentionState:
    """Return the state in which a fault in the weights runs through to the output."""
    return replaced(state, weights=weights, mass=weights, out=weights @ state.per_query_head(state.value))


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def loop_deviations(left: np.ndarray, right: np.ndarray, product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return column and row deviations by definition; ``right`` (B, H_kv, inner, columns)."""
    batch, heads, rows, columns = product.shape
    group = heads // right.shape[1]
    column_sums, row_sums = np.zeros((batch, heads, columns)), np.zeros((batch, heads, rows))
    for entry in range(batch):
        for head in range(heads):
            error = product[entry, head] - left[entry, head] @ right[entry, head // group]
            column_sums[entry, head], row_sums[entry, head] = error.sum(0), error.sum(1)
    return column_sums, row_sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_deviations_are_the_sums_of_the_errors(dtype: torch.dtype, kv_heads: int) -> None:
    state = random_state(1, dtype=dtype, kv_heads=kv_heads, rows=9, keys=12, mask="causal")
    addend = torch.randn(1, 4, 1, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    scores = poked(state.scores * 0.5 + addend, (1, 3, 4, 5), 7.0)
    state = replaced(state, scores=scores, score_factor=0.5, score_addend=addend)
    expected = loop_deviations(0.5 * array(state.query), array(state.key.mT), array(scores) - array(addend))
    for found, wanted in zip(score_deviations(state), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-10)
    expected = loop_deviations(array(state.mass), array(state.value), array(state.out))
    for found, wanted in zip(output_deviations(state), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-10)


def test_deviations_need_the_products() -> None:
    state = random_state()
    with pytest.raises(ValueError, match="scores: got None"):
        score_deviations(replaced(state, scores=None))
    with pytest.raises(ValueError, match="mass: got None"):
        output_deviations(replaced(state, mass=None))


@pytest.mark.parametrize("detector", COMPETITORS)
def test_docstrings_say_what_was_reproduced_and_what_not(detector: type[Detector]) -> None:
    text = inspect.getdoc(detector) or ""
    for part in ("Reproduced:", "Not reproduced:", "False positives: no theorem rules them out."):
        assert part in text
    assert "arXiv:" in (inspect.getmodule(detector).__doc__ or "")
    assert get_detector(detector.name).oracle is False


@pytest.mark.parametrize("detector", COMPETITORS)
def test_only_what_is_needed_is_read(detector: type[Detector]) -> None:
    ready_one = ready(detector.name)
    state = random_state(5)
    fault = replaced(state, out=poked(state.out, CELL, 1e4))
    nothing = {name: torch.full_like(getattr(state, name), math.nan) for name in _tensors() - detector.needs}
    for given in (state, fault):
        assert ready_one.check(replaced(given, **nothing)) == ready_one.check(replaced(given))
    for name in ("scores", "mass"):
        verdict = ready_one.check(replaced(state, **{name: None}))
        assert verdict.applicable == (name not in detector.needs)


def _tensors() -> set[str]:
    return {"query", "key", "value", "scores", "logits", "weights", "mass", "out"}


@pytest.mark.parametrize("detector", COMPETITORS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_calls_seen_in_calibration_are_clean(detector: type[Detector], mask: str, dtype: torch.dtype) -> None:
    options = {"mask": mask, "dtype": dtype, "kv_heads": 2}
    ready_one = ready(detector.name, *range(4), **options)
    for seed in range(4):
        verdict = ready_one.check(random_state(seed, **options))
        assert verdict.violations == 0, verdict
        assert verdict.rows_checked > 0


@pytest.mark.parametrize("name", ["attnchecker", "realm", "flash_abft"])
@pytest.mark.parametrize("mask", MASKS)
def test_checksums_judge_clean_calls_of_other_inputs(name: str, mask: str) -> None:
    """No theorem says that they are silent there, and whether they are depends on the kernel: alarms are counted."""
    detector = ready(name, mask=mask)
    verdicts = [detector.check(random_state(seed, mask=mask)) for seed in range(20)]
    alarms = sum(verdict.fired for verdict in verdicts)
    assert alarms == sum(verdict.largest_ratio > 1 for verdict in verdicts)
    assert all(verdict.applicable and verdict.nonfinite == 0 and verdict.rows_checked > 0 for verdict in verdicts)
    assert max(verdict.largest_ratio for verdict in verdicts) > 0


@pytest.mark.parametrize("name", ["attnchecker", "ranger", "realm", "flash_abft"])
@pytest.mark.parametrize("location", ["value", "weights", "out"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_extreme_values_that_reach_the_output_are_seen(name: str, location: str, value: float) -> None:
    state = random_state(4)
    if location == "weights":
        fault = with_mass(state, poked(state.weights, CELL, value))
    elif location == "out":
        fault = replaced(state, out=poked(state.out, CELL, value))
    else:
        values = poked(state.value, CELL, value)
        fault = replaced(state, value=values, out=state.weights @ state.per_query_head(values))
    verdict = ready(name).check(fault)
    if name == "flash_abft" and location == "value" and math.isfinite(value):
        assert not verdict.nonfinite  # a finite wrong value agrees with what is made of it, but for rounding
        return
    assert verdict.fired
    assert verdict.nonfinite or math.isfinite(value)


@pytest.mark.parametrize("name", ["attnchecker", "ranger", "realm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_extreme_scores_are_seen(name: str, value: float) -> None:
    state = random_state(4)
    assert ready(name).check(with_scores(state, poked(state.scores, CELL, value))).fired


@pytest.mark.parametrize("detector", CALIBRATED)
def test_uncalibrated_layers_are_not_judged(detector: type[Detector]) -> None:
    state = replaced(random_state(), layer=2, name="h.2.attn")
    fresh = get_detector(detector.name)
    assert fresh.check(state).reason == "it has seen no fault-free call of layer 2 in calibration"
    fresh.calibrate(state)
    assert fresh.check(state).applicable
    other = replaced(state, layer=3, name="h.3.attn")
    assert fresh.check(other).reason == "it has seen no fault-free call of layer 3 in calibration"
    assert "layer None" in fresh.check(random_state()).reason


@pytest.mark.parametrize("detector", CALIBRATED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_calibration_refuses_what_cannot_be_fault_free(detector: type[Detector], value: float) -> None:
    state = random_state()
    with pytest.raises(ValueError, match=r"layer None .*not fault-free"):
        get_detector(detector.name).calibrate(replaced(state, out=poked(state.out, CELL, value)))


def test_calibration_without_scores_teaches_nothing() -> None:
    detector = get_detector("realm")
    detector.calibrate(replaced(random_state(), scores=None))
    assert "calibration" in detector.check(random_state()).reason
    assert detector.check(replaced(random_state(), scores=None)).reason.startswith("it reads scores")


@pytest.mark.parametrize("detector", COMPETITORS)
def test_rows_that_see_no_key_are_left_out(detector: type[Detector]) -> None:
    visible = mask_of("causal", 6, 6).clone()
    visible[2] = False
    query, key, value = (torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    state = attend(query, key, value, visible)
    assert seen_rows(state).tolist() == [[[True, True, False, True, True, True]] * 2] * 2
    ready_one = get_detector(detector.name)
    ready_one.calibrate(state)
    empty = torch.zeros(2, 2, 6, 1, dtype=torch.bool)
    empty[:, :, 2] = True
    undefined = {name: getattr(state, name).masked_fill(empty, math.nan) for name in ("weights", "mass", "out")}
    ready_one.calibrate(replaced(state, **undefined))
    assert ready_one.check(replaced(state, **undefined)).violations == 0
    assert ready_one.check(replaced(state, out=poked(state.out, (0, 1, 3, 2), math.nan))).fired


# ATTNChecker


def test_attnchecker_alarms_where_a_column_is_off_by_more_than_one() -> None:
    detector, state = get_detector("attnchecker"), random_state(3)
    for name, column in (("scores", 3), ("out", 3)):
        tensor = getattr(state, name)
        below = replaced(state, **{name: poked(tensor, CELL, float(tensor[CELL]) + 0.99 * CHECKSUM_THRESHOLD)})
        assert detector.check(below).violations == 0
        above = replaced(state, **{name: poked(tensor, CELL, float(tensor[CELL]) - 1.01 * CHECKSUM_THRESHOLD)})
        verdict = detector.check(above)
        assert verdict.positions == ((1, 2, column),)
        assert verdict.detail == f"{name.removesuffix('s')} columns: 1"
        assert get_detector("attnchecker", tolerance=0.1).check(above).violations == 0


def test_attnchecker_trusts_a_row_without_a_near_inf_value() -> None:
    # Two errors that cancel in their column leave the rows off; without a large value these are taken for renewed.
    state = random_state(3)
    shift = torch.zeros_like(state.scores)
    shift[1, 2, 7, 3], shift[1, 2, 8, 3] = 64.0, -64.0
    assert get_detector("attnchecker").check(replaced(state, scores=state.scores + shift)).violations == 0
    shift *= 2.0 * NEAR_INF / 64.0
    verdict = get_detector("attnchecker").check(replaced(state, scores=state.scores + shift))
    assert "score rows: 2" in verdict.detail


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_attnchecker_finds_extreme_operands(name: str) -> None:
    state = random_state(3)
    for value, fired in ((0.9 * NEAR_INF, False), (1.1 * NEAR_INF, True), (math.nan, True), (-math.inf, True)):
        faulty = poked(getattr(state, name), CELL, value)
        check = get_detector("attnchecker").check(replaced(state, **{name: faulty}))
        assert (f"{name}: 1" in check.detail) == fired


def test_attnchecker_is_blind_to_a_moderate_fault_in_q_before_its_use() -> None:
    state = random_state(3)
    faulty = poked(state.query, CELL, 30.0)
    after = with_scores(replaced(state, query=faulty), faulty @ state.key.mT)
    assert float((after.out - state.out).abs().max()) > 0.1
    assert get_detector("attnchecker").check(after).violations == 0


def test_attnchecker_alarms_on_the_rounding_of_half_precision() -> None:
    # Why its docstring says so: clean bfloat16 scores near 256 are rounded by up to 0.5 each.
    clean = random_state(1, dtype=torch.bfloat16, gain=64.0, rows=128, keys=128)
    assert get_detector("attnchecker").check(clean).fired
    exact = random_state(1, dtype=torch.float32, gain=64.0, rows=128, keys=128)
    assert not get_detector("attnchecker").check(exact).fired


def test_attnchecker_has_the_thresholds_of_its_authors() -> None:
    assert (CHECKSUM_THRESHOLD, NEAR_INF) == (1.0, 1e10)


def test_attnchecker_counts_a_checksum_that_is_not_finite_without_a_near_inf_value() -> None:
    # The key was hit after its use: the scores are clean, and every checksum of its rows is NaN.
    state = random_state(3)
    verdict = get_detector("attnchecker").check(replaced(state, key=poked(state.key, CELL, math.nan)))
    assert verdict.detail == "key: 1, score columns: 1, score rows: 12"
    assert (verdict.violations, verdict.nonfinite, verdict.positions) == (14, 14, (CELL[:3],))


# Ranger


def test_ranger_accepts_the_profiled_range_and_its_ends() -> None:
    state = random_state(7)
    detector = get_detector("ranger")
    detector.calibrate(state)
    for name in RESTRICTED:
        tensor = getattr(state, name)
        seen = tensor[state.visible.expand_as(tensor)] if name == "logits" else tensor
        low, high = float(seen.min()), float(seen.max())
        for value, fired in ((low, False), (high, False), (high + 0.5, True), (low - 0.5, True), (math.nan, True)):
            verdict = detector.check(replaced(state, **{name: poked(tensor, CELL, value)}))
            assert verdict.fired == fired, (name, value)
            assert verdict.detail == (f"{name}: 1" if fired else "")
            assert verdict.positions == ((CELL[:3],) if fired and state.visible.all() else verdict.positions)
    wide = get_detector("ranger", tolerance=0.6)
    wide.calibrate(state)
    assert not wide.check(replaced(state, out=poked(state.out, CELL, float(state.out.max()) + 0.5))).fired


def test_ranger_widens_with_every_call_and_keeps_layers_apart() -> None:
    detector = get_detector("ranger")
    states = [
        replaced(random_state(seed, gain=gain), layer=seed, name=str(seed)) for seed, gain in ((0, 1.0), (1, 9.0))
    ]
    for state in states:
        detector.calibrate(state)
    assert not any(detector.check(state).fired for state in states)
    assert detector.check(replaced(states[1], layer=0, name="0")).fired
    detector.calibrate(replaced(states[1], layer=0, name="0"))
    assert not detector.check(replaced(states[1], layer=0, name="0")).fired
    assert not detector.check(states[0]).fired


def test_ranger_reads_visible_logits_only() -> None:
    state = random_state(2, mask="causal")
    detector = ready("ranger", 2)
    hidden = (0, 0, 1, 5)
    assert not state.visible[1, 5]
    assert not detector.check(replaced(state, logits=poked(state.logits, hidden, 1e30))).fired
    assert detector.check(replaced(state, logits=poked(state.logits, (0, 0, 5, 1), 1e30))).fired


def test_ranger_is_blind_inside_the_range() -> None:
    state = random_state(2)
    other = flipped(state.out, CELL, 31)
    assert float((other - state.out).abs().max()) > 0
    assert not ready("ranger").check(replaced(state, out=other)).fired


# ReaLM


def test_realm_decides_on_both_statistics() -> None:
    clean = Clean(magnitude=127.0, deviation=0.25)  # a step of 1, rounding below it
    rows = torch.tensor(
        [
            [0.2, 0.0, 0.0],  # below a step
            [1.5, 0.0, 0.0],  # one column deviates
            [0.9, 0.9, 0.9],  # large in sum, no column by itself
            [5.0, -4.5, 0.0],  # columns deviate, but cancel
            [math.nan, 0.0, 0.0],
            [math.inf, 0.0, 0.0],
        ],
        dtype=torch.float64,
    )
    check = critical(rows, clean)
    assert (~(check.residual <= check.tolerance)).tolist() == [False, True, False, False, True, True]
    noisy = Clean(magnitude=127.0, deviation=2.0)  # rounding above a step: a column needs twice it
    assert (~(critical(rows, noisy).residual <= 1)).tolist() == [False, False, False, False, True, True]
    zero = critical(torch.tensor([[0.0, 0.0], [0.0, 1e-9]], dtype=torch.float64), Clean())
    assert (~(zero.residual <= 1)).tolist() == [False, True]


@pytest.mark.parametrize("name", ["scores", "out"])
def test_realm_accepts_what_requantization_would_hide(name: str) -> None:
    detector, state = ready("realm"), random_state(3)
    tensor = getattr(state, name)
    largest = max(float(getattr(random_state(seed), name).abs().max()) for seed in range(100, 108))
    for factor, fired in ((0.9, False), (1.1, True)):
        value = float(tensor[CELL]) + factor * largest / 127
        verdict = detector.check(replaced(state, **{name: poked(tensor, CELL, value)}))
        assert verdict.fired == fired
        if fired:
            assert verdict.positions == ((1, 2),)
            assert verdict.detail == ("scores: 1" if name == "scores" else "outputs: 1")
    assert verdict.rows_checked == 2 * 2 * 4


# Flash-ABFT


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_flash_abft_checksums_by_definition(mask: str, sinks: torch.Tensor | None) -> None:
    state = random_state(6, mask=mask, kv_heads=2, dtype=torch.float64, sinks=sinks)
    sums = merged_checksums(state)
    value, visible = array(state.value), np.broadcast_to(True, state.logits.shape)
    if state.visible is not None:
        visible = state.visible.expand(state.logits.shape).numpy()
    for entry in range(2):
        for head in range(4):
            predicted = magnitude = 0.0
            for row in range(12):
                seen = visible[entry, head, row]
                scores = array(state.logits)[entry, head, row]
                if not seen[:12].any():
                    continue
                exponentials = np.where(seen, np.exp(scores - scores[seen].max()), 0.0)
                weights = (exponentials / exponentials.sum())[:12]
                predicted += weights @ value[entry, head // 2].sum(-1)
                magnitude += weights @ np.abs(value[entry, head // 2]).sum(-1)
            assert sums.predicted[entry, head] == pytest.approx(predicted, rel=1e-12)
            assert sums.magnitude[entry, head] == pytest.approx(magnitude, rel=1e-12)
    rows = seen_rows(state)
    out = state.out if rows is None else state.out[rows].view(-1)
    assert float(sums.actual.sum()) == pytest.approx(float(out.sum()), rel=1e-10, abs=1e-10)


def test_flash_abft_reads_visible_logits_only() -> None:
    state = random_state(2, mask="causal")
    for position, same in (((0, 0, 1, 5), True), ((0, 0, 5, 1), False)):
        sums = merged_checksums(replaced(state, logits=poked(state.logits, position, 30.0)))
        assert torch.equal(sums.predicted, merged_checksums(state).predicted) == same


def test_flash_abft_sees_weights_and_out_and_nothing_before() -> None:
    detector, state = ready("flash_abft"), random_state(3)
    assert detector.check(replaced(state, out=poked(state.out, CELL, 3.0))).positions == ((1, 2),)
    assert detector.check(with_mass(state, poked(state.weights, CELL, 0.9))).positions == ((1, 2),)
    blind = with_scores(state, poked(state.scores, CELL, 25.0))
    assert float((blind.out - state.out).abs().max()) > 0.1
    assert not detector.check(blind).fired


def test_flash_abft_threshold_is_twice_the_clean_deviation() -> None:
    state = random_state(3, dtype=torch.float64)
    sums = merged_checksums(state)
    error = 0.25 * float(sums.magnitude[1, 2])
    shifted = replaced(state, out=poked(state.out, CELL, float(state.out[CELL]) + error))
    detector = get_detector("flash_abft")
    detector.calibrate(shifted)
    for factor, fired in ((0.999 * MARGIN, False), (1.001 * MARGIN, True)):
        out = poked(state.out, CELL, float(state.out[CELL]) + factor * error)
        verdict: Verdict = detector.check(replaced(state, out=out))
        assert verdict.fired == fired
        assert verdict.largest_ratio == pytest.approx(factor / MARGIN, rel=1e-6)
