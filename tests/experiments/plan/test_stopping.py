"""The confidence sequence against integration by quadrature, and against the promise that it makes."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, norm

from experiments.plan.stopping import Interval, StopRule, confidence_sequence


def mixture_ratio(successes: int, trials: int, p: float) -> float:
    """M_n(p) by its definition: the likelihood at q relative to that at p, averaged over q from Jeffreys' prior."""

    def integrand(angle: float) -> float:
        # q = sin^2(angle) makes Beta(1/2, 1/2) uniform: no poles.
        q = math.sin(angle) ** 2
        logarithm = 0.0
        for count, new, old in ((successes, q, p), (trials - successes, 1 - q, 1 - p)):
            logarithm += count * (math.log(max(new, 1e-300)) - math.log(old)) if count else 0.0
        return math.exp(logarithm) * 2 / math.pi

    peak = math.asin(math.sqrt(successes / trials))
    return quad(integrand, 0, math.pi / 2, points=[peak] if 0 < peak < math.pi / 2 else None, limit=400)[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_the_limits_are_where_the_mixture_reaches_one_over_alpha(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    low, high = confidence_sequence(successes, trials, confidence)
    assert 0 <= low <= successes / trials <= high <= 1
    for limit in (low, high):
        if 0 < limit < 1:
            assert mixture_ratio(successes, trials, limit) == pytest.approx(1 / (1 - confidence), rel=1e-5)
    assert (low == 0) == (successes == 0)
    assert (high == 1) == (successes == trials)


def test_known_limits() -> None:
    # s = 0: B(1/2, n + 1/2) / B(1/2, 1/2) / (1 - p)^n = 20, solved by hand for n = 100.
    ratio = math.exp(math.lgamma(100.5) - math.lgamma(101.0) - math.lgamma(0.5))
    assert confidence_sequence(0, 100, 0.95).high == pytest.approx(1 - (ratio / 20) ** (1 / 100), rel=1e-12)
    assert confidence_sequence(0, 0, 0.95) == (0.0, 1.0)
    assert confidence_sequence(7, 7, 0.95) == (1 - confidence_sequence(0, 7, 0.95).high, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(1, 10**6), (10**6 - 1, 10**6), (5 * 10**5, 10**6), (3, 10**8)])
def test_many_runs_are_no_obstacle(successes: int, trials: int) -> None:
    low, high = confidence_sequence(successes, trials, 0.999)
    assert 0 < low < successes / trials < high < 1
    assert high - low < 0.01


@given(st.integers(0, 300), st.integers(0, 300))
def test_success_and_failure_are_mirror_images(successes: int, failures: int) -> None:
    one = confidence_sequence(successes, successes + failures, 0.9)
    other = confidence_sequence(failures, successes + failures, 0.9)
    assert other == pytest.approx((1 - one.high, 1 - one.low), abs=1e-12)


def excluded_sometime(rate: float, alpha: float, paths: int, interval) -> float:
    """The share of paths on which an interval excludes the rate at any look up to 3,000 runs, stopping or not."""
    known = functools.cache(lambda successes, trials: interval(successes, trials))
    random, looks = np.random.default_rng(1), StopRule(0.1, minimum=8, growth=1.15).looks(3000)
    counts = np.cumsum(random.random((paths, 3000)) < rate, axis=1)[:, np.array(looks) - 1]
    outside = 0
    for path in counts.tolist():
        limits = (known(successes, trials) for successes, trials in zip(path, looks, strict=True))
        outside += any(not low <= rate <= high for low, high in limits)
    return outside / paths


@pytest.mark.parametrize("rate", [0.02, 0.2, 0.5])
def test_the_truth_is_ever_excluded_with_a_probability_of_at_most_alpha(rate: float) -> None:
    alpha, paths = 0.1, 1500
    share = excluded_sometime(rate, alpha, paths, lambda s, n: confidence_sequence(s, n, 1 - alpha))
    assert share <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / paths)


def test_an_interval_for_one_look_excludes_the_truth_more_often() -> None:
    """The test above can fail: Clopper-Pearson intervals, each of them conservative, do not survive many looks."""

    def exact(successes: int, trials: int) -> tuple[float, float]:
        failures = trials - successes
        low = beta.ppf(0.05, successes, failures + 1) if successes else 0.0
        return float(low), float(beta.ppf(0.95, successes + 1, failures) if failures else 1.0)

    assert excluded_sometime(0.5, 0.1, 400, exact) > 0.2


def test_the_price_of_looking_is_moderate() -> None:
    """At 1,000 runs the interval is less than twice as wide as one for a single look."""
    ordinary = norm.isf(0.025) * math.sqrt(0.25 / 1000)
    assert ordinary < confidence_sequence(500, 1000, 0.95).margin < 2 * ordinary


# ------------------------------------------------------------------------------------------------- looks


@given(st.integers(1, 5000), st.integers(1, 300), st.floats(1.001, 10))
def test_looks_grow_and_end_with_the_last_repeat(repeats: int, minimum: int, growth: float) -> None:
    looks = StopRule(0.1, minimum=minimum, growth=growth).looks(repeats)
    assert looks[-1] == repeats
    assert looks[0] == min(minimum, repeats)
    assert all(a < b for a, b in itertools.pairwise(looks))
    assert all(b == max(a + 1, math.ceil(a * growth)) for a, b in itertools.pairwise(looks[:-1]))
    # More repeats add looks and change none before the last: a longer campaign contains the shorter one.
    assert StopRule(0.1, minimum=minimum, growth=growth).looks(repeats + 7)[: len(looks) - 1] == looks[:-1]


def test_half_the_width_is_the_margin() -> None:
    assert Interval(0.2, 0.5).margin == pytest.approx(0.15)


@pytest.mark.parametrize(("successes", "trials", "confidence", "message"), [
    (-1, 3, 0.9, r"successes: got -1, allowed 0\.\.3"),
    (4, 3, 0.9, r"successes: got 4, allowed 0\.\.3"),
    (1, 3, 1.0, "confidence: got 1.0, allowed a number between 0 and 1"),
    (1, 3, math.nan, "confidence: got nan"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(successes: int, trials: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confidence_sequence(successes, trials, confidence)
