"""Which row a verdict's interval is that of: the first with the smallest margin, however rows are judged together."""

from __future__ import annotations

import math

import pytest
import torch
from attention_states import random_state, replaced
from engine_places import opened_place, small_gpt2, tokens
from hypothesis import given
from hypothesis import strategies as st

from bounds import Verdict, get_detector
from bounds.core.row_outcome import BoundedOutcome, fires_if_one_does, verdict, verdicts
from bounds.core.sequences import by_group
from bounds.core.verdict import merged
from fault_injection import ElementIndex

MARGINS = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, math.inf, -math.inf, math.nan])
ROWS = st.lists(st.tuples(MARGINS, st.booleans()), min_size=4, max_size=4)


def outcome_of(sequences: list[list[tuple[float, bool]]]) -> BoundedOutcome:
    """Return rows whose value, bounds and allowance tell which row they are."""
    numbers = torch.arange(4.0 * len(sequences), dtype=torch.float64).view(-1, 4)
    bounded = torch.tensor([[counts for _, counts in rows] for rows in sequences])
    margin = torch.tensor([[value for value, _ in rows] for rows in sequences], dtype=torch.float64)
    nothing = torch.zeros_like(bounded)
    return BoundedOutcome(
        fired=nothing, nonfinite=nothing, ratio=numbers, checked=None,
        margin=torch.where(bounded, margin, math.inf), bounded=bounded,
        interval=(numbers, numbers - 0.25, numbers + 0.25, torch.full_like(numbers, 0.5)),
    )  # fmt: skip


def expected(rows: list[tuple[float, bool]]) -> tuple[float, float, float] | None:
    counted = [(number, margin) for number, (margin, counts) in enumerate(rows) if counts]
    if not counted:
        return None
    nans = [number for number, margin in counted if math.isnan(margin)]
    number = nans[0] if nans else min(counted, key=lambda pair: pair[1])[0]
    return number, number - 0.75, number + 0.75


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_the_interval_is_that_of_the_first_row_with_the_smallest_margin(sequences: list[list[tuple[float, bool]]]):
    outcome = outcome_of(sequences)
    whole, parts = verdict("x", outcome), verdicts("x", outcome)
    assert whole.tightest == expected([row for rows in sequences for row in rows])
    assert merged(*parts).tightest == whole.tightest
    for number, (rows, part) in enumerate(zip(sequences, parts, strict=True)):
        own = expected(rows)
        assert part.tightest == (None if own is None else tuple(value + 4 * number for value in own))
        assert (part.tightest is None) == (part.smallest_margin is None)


def test_of_verdicts_with_one_margin_the_first_counts_and_nan_before_all() -> None:
    told = [
        Verdict("x", 1, smallest_margin=margin, tightest=(number, 0.0, 1.0))
        for number, margin in enumerate((2.0, 1.0, 1.0, math.nan, math.nan))
    ]
    missing = Verdict.not_applicable("x", "no")
    assert merged(*told[:3]).tightest == (1, 0.0, 1.0)
    assert merged(told[2], missing, told[1]).tightest == (2, 0.0, 1.0)
    assert merged(*told).tightest == (3, 0.0, 1.0)
    assert merged(Verdict("x", 1), told[0]).tightest == (0, 0.0, 1.0)
    assert merged(Verdict("x", 1), Verdict("x", 1)).tightest is None


def test_a_check_of_two_quantities_has_no_interval() -> None:
    rows = [[(0.5, True)] * 4]
    assert verdict("x", fires_if_one_does(outcome_of(rows), outcome_of(rows))).tightest is None
    state = random_state(kv_equal=True)
    assert get_detector("comb").check(state).tightest is None
    assert get_detector("q@o").check(state).tightest is not None


@pytest.mark.parametrize("name", ["s@w", "s@w_tight", "q@o"])
def test_a_correct_call_lies_in_its_bounds(name: str) -> None:
    for seed, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)):
        found = get_detector(name).check(random_state(seed, dtype=dtype, kv_equal=True))
        assert found.tightest is not None
        epsilon, lower, upper = found.tightest
        assert lower <= epsilon <= upper


def test_rows_of_two_keys_have_no_say() -> None:
    state = random_state(rows=2, keys=2)
    assert get_detector("s@w").check(state).tightest is None
    assert get_detector("s@w").check(random_state(rows=3, keys=3)).tightest is not None


def test_a_weight_that_is_not_a_number_leaves_none_in_its_row() -> None:
    state = random_state()
    weights = state.weights.clone()
    weights[1, 2, 9, 4] = math.nan
    broken = replaced(state, weights=weights, mass=weights)
    found = get_detector("s@w").check(broken)
    assert found.tightest is not None
    assert math.isnan(found.tightest[0])
    assert repr(merged(*get_detector("s@w").check_each(by_group(broken))).tightest) == repr(found.tightest)


def test_rows_that_tie_in_several_heads() -> None:
    """Where every score is 0, all rows lie on their bounds; their tolerances tell them apart."""
    model = small_gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :32] = 0
            block.attn.c_attn.bias[:32] = 0
    with opened_place(model, [{"input_ids": tokens(2)}], detectors=["s@w"]) as place:
        found = place.baseline.verdicts["s@w", 0]
        assert found.smallest_margin == pytest.approx(0.0, abs=1e-12)
        for head in range(4):
            # The first of the rows leaves its bounds behind, in one head.
            index = ElementIndex(batch=0, head=head, row=2)
            place.compare(place.draw("scores", 8, bits=(30,), index=index))
