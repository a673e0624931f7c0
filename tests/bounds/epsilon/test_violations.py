"""The decision rule: what counts as a violation, where, and by how much."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bounds import compute_attention_bounds, detect_violation
from bounds.epsilon.bounds import Interval

anything = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e300, -1e300, math.nan, math.inf, -math.inf])


def interval(lower: float, upper: float, tolerance: float, checked: bool = True) -> Interval:
    numbers = (torch.tensor([value], dtype=torch.float64) for value in (lower, upper, tolerance))
    return Interval(torch.tensor([checked]), *numbers)


def some_bounds():
    logits = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    visible[1, 0, 4] = False
    weights = torch.softmax(logits.masked_fill(~visible, -math.inf), -1)
    return compute_attention_bounds(logits, weights, 16, visible)


@given(lower=anything, upper=anything, tolerance=anything, epsilon=anything)
def test_a_row_passes_only_if_everything_is_finite_and_inside(lower, upper, tolerance, epsilon):
    found = detect_violation(interval(lower, upper, tolerance), torch.tensor([epsilon], dtype=torch.float64))
    values_finite = all(map(math.isfinite, (lower, upper, tolerance, epsilon)))
    passes = values_finite and lower - epsilon <= tolerance and epsilon - upper <= tolerance
    assert found.count == int(not passes)
    assert found.nonfinite == int(not values_finite)
    assert bool(found.fired) is not passes


@pytest.mark.parametrize(("epsilon", "fires"), [(1.0, False), (0.5, False), (0.499, True), (2.5, False), (2.501, True)])
def test_the_tolerance_widens_the_interval_on_both_sides_and_its_edge_is_inside(epsilon, fires):
    found = detect_violation(interval(1.0, 2.0, 0.5), torch.tensor([epsilon], dtype=torch.float64))
    assert bool(found.fired) is fires


def test_the_users_tolerance_adds_to_the_proved_one():
    bounds, epsilon = interval(0.0, 1.0, 0.25), torch.tensor([1.5], dtype=torch.float64)
    assert detect_violation(bounds, epsilon).count == 1
    assert detect_violation(bounds, epsilon, tolerance=0.125).count == 1
    assert detect_violation(bounds, epsilon, tolerance=0.25).count == 0


def test_counts_positions_margins_and_ratio_describe_the_violations():
    bounds = some_bounds()
    epsilon = bounds.epsilon.clone()
    epsilon[0, 2, 3] = bounds.upper[0, 2, 3] + 0.75
    epsilon[1, 0, 1] = bounds.lower[1, 0, 1] - 0.25
    found = detect_violation(bounds, epsilon)
    assert (found.count, found.nonfinite, found.rows_checked) == (2, 0, 27)
    assert found.positions.tolist() == [[0, 2, 3], [1, 0, 1]]
    assert found.margins[0, 2, 3].item() == pytest.approx(-0.75)
    assert found.margins[1, 0, 1].item() == pytest.approx(-0.25)
    assert found.smallest_margin == found.margins[0, 2, 3].item()
    expected = torch.tensor([0.75, 0.25], dtype=torch.float64) / torch.stack(
        [bounds.tolerance[0, 2, 3], bounds.tolerance[1, 0, 1]]
    )
    assert found.largest_ratio == pytest.approx(float(expected.max()))


def test_clean_rows_have_positive_margins_where_the_bounds_are_strict():
    bounds = some_bounds()
    found = detect_violation(bounds)
    assert found.count == 0
    expected = torch.minimum(bounds.epsilon - bounds.lower, bounds.upper - bounds.epsilon)
    assert torch.equal(found.margins[bounds.checked], expected[bounds.checked])
    assert found.largest_ratio <= 1


def test_rows_without_a_visible_key_are_not_judged():
    bounds = some_bounds()
    assert not bounds.checked[1, :, 4].any()
    epsilon = bounds.epsilon.clone()
    epsilon[1, :, 4] = math.inf
    found = detect_violation(bounds, epsilon)
    assert found.count == 0
    assert found.margins[1, :, 4].isnan().all()


def test_numbers_that_do_not_exist_are_none():
    found = detect_violation(interval(0.0, 1.0, 0.0, checked=False), torch.zeros(1))
    assert (found.rows_checked, found.count, found.smallest_margin, found.largest_ratio) == (0, 0, None, None)


def test_a_nan_reaches_the_summary_numbers():
    bounds = some_bounds()
    epsilon = bounds.epsilon.clone()
    epsilon[0, 0, 0] = math.nan
    found = detect_violation(bounds, epsilon)
    assert found.nonfinite_rows.nonzero().tolist() == [[0, 0, 0]]
    assert math.isnan(found.smallest_margin)
    assert math.isnan(found.largest_ratio)


def test_an_infinite_tolerance_fires_even_inside_the_bounds():
    bounds = some_bounds()
    wide = dataclasses.replace(bounds, tolerance=torch.full_like(bounds.tolerance, math.inf))
    assert detect_violation(wide).count == 27


@pytest.mark.parametrize("tolerance", [-1e-9, math.nan, math.inf])
def test_bad_tolerances_are_refused(tolerance):
    with pytest.raises(ValueError, match=r"tolerance: got .*, allowed a finite number >= 0"):
        detect_violation(some_bounds(), tolerance=tolerance)


def test_an_epsilon_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"epsilon: got shape \(5,\), allowed \(2, 3, 5\)"):
        detect_violation(some_bounds(), torch.zeros(5))


def test_an_interval_has_no_epsilon_of_its_own():
    with pytest.raises(ValueError, match="an interval has no values of its own"):
        detect_violation(some_bounds().interval())
