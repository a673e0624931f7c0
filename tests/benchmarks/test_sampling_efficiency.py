"""What aimed drawing saves, and the estimators that it is measured with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.sampling_efficiency import Estimate, collect, compare
from experiments.analysis import hajek, horvitz_thompson, regression

HARMFUL, WEIGHT = np.array([1.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.5, 1.5, 0.2, 2.0, 1.3])


def test_estimates_by_hand() -> None:
    assert horvitz_thompson(HARMFUL, WEIGHT) == pytest.approx((0.7 / 5, (0.36**2 + 0.06**2 + 3 * 0.14**2) / 20))
    assert hajek(HARMFUL, WEIGHT)[0] == pytest.approx(0.7 / 5.5)
    assert Estimate(0.4, 0.06, 5).margin == pytest.approx(1.96 * math.sqrt(0.06), rel=1e-4)
    assert Estimate(0.4, 0.06, 100).gain(Estimate(0.4, 0.06, 50)) == 2.0


def test_regression_removes_what_the_weights_explain() -> None:
    """If everything is harmful, the mean weight says all there is to know: the rate is 1 and has no variance."""
    everything = np.ones(5)
    assert regression(everything, WEIGHT) == pytest.approx((1, 0), abs=1e-24)
    assert horvitz_thompson(everything, WEIGHT)[0] == pytest.approx(1.1)
    assert hajek(everything, WEIGHT) == pytest.approx((1, 0))
    assert regression(HARMFUL, np.ones(5)) == horvitz_thompson(HARMFUL, np.ones(5))


@pytest.mark.parametrize("estimate", [horvitz_thompson, regression, hajek])
def test_without_weights_all_estimates_are_one(estimate) -> None:
    assert estimate(HARMFUL, np.ones(5)) == pytest.approx((0.4, 0.06))


@pytest.mark.slow
def test_aiming_at_effects_needs_five_times_fewer_runs() -> None:
    """On the built-in model: the same rate of harmful flips, as well known from a fifth of the runs."""
    rows = collect(["--model.path=reference"], ("uniform", "effect"), 700)
    plain, found = compare(rows, "effect")
    for estimate in found.values():
        spread = math.sqrt(plain.variance + estimate.variance)
        assert abs(estimate.rate - plain.rate) <= 3 * spread
        assert estimate.rate > 0.02
    assert plain.gain(found["mean"]) >= 5
    assert plain.gain(found["regression"]) >= 5
