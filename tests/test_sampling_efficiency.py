"""What aimed drawing saves, and the estimators that it is measured with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.sampling_efficiency import collect, compare
from experiments.weighted_rate import Estimate, mean_estimate, ratio_estimate, regression_estimate, uniform_share

HARMFUL, WEIGHT = np.array([1.0, 0.0, 1.0, 0.0, 0.0]), np.array([0.5, 1.5, 0.2, 2.0, 1.3])


def test_estimates_by_hand() -> None:
    assert uniform_share(HARMFUL) == Estimate(0.4, 0.24, 5)
    assert uniform_share(HARMFUL).margin == pytest.approx(1.96 * math.sqrt(0.24 / 5), rel=1e-4)
    assert mean_estimate(HARMFUL, WEIGHT).rate == pytest.approx(0.7 / 5)
    assert mean_estimate(HARMFUL, WEIGHT).variance == pytest.approx((0.36**2 + 0.06**2 + 3 * 0.14**2) / 4)
    assert ratio_estimate(HARMFUL, WEIGHT).rate == pytest.approx(0.7 / 5.5)


def test_regression_removes_what_the_weights_explain() -> None:
    """If everything is harmful, the mean weight says all there is to know: the rate is 1 and has no variance."""
    everything = np.ones(5)
    assert regression_estimate(everything, WEIGHT).rate == pytest.approx(1)
    assert regression_estimate(everything, WEIGHT).variance == pytest.approx(0, abs=1e-24)
    assert mean_estimate(everything, WEIGHT).rate == pytest.approx(1.1)
    assert ratio_estimate(everything, WEIGHT) == pytest.approx((1, 0, 5))
    assert regression_estimate(HARMFUL, np.ones(5)) == mean_estimate(HARMFUL, np.ones(5))


def test_without_weights_all_estimates_are_one() -> None:
    for estimate in (mean_estimate, regression_estimate, ratio_estimate):
        found = estimate(HARMFUL, np.ones(5))
        assert found.rate == pytest.approx(0.4)
        assert found.variance == pytest.approx(0.24 if estimate is ratio_estimate else 0.3)


@pytest.mark.slow
def test_aiming_at_effects_needs_five_times_fewer_runs() -> None:
    """On the built-in model: the same rate of harmful flips, as well known from a fifth of the runs."""
    rows = collect(["--model.path=reference"], ("uniform", "effect"), 700)
    plain, found = compare(rows, "effect")
    for estimate in found.values():
        spread = math.sqrt(plain.variance / plain.runs + estimate.variance / estimate.runs)
        assert abs(estimate.rate - plain.rate) <= 3 * spread
        assert estimate.rate > 0.02
    assert plain.variance / found["mean"].variance >= 5
    assert plain.variance / found["regression"].variance >= 5
