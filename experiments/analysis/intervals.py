"""Confidence limits of one rate: Wilson, Clopper-Pearson, and Korn-Graubard for runs that are not independent.

>>> [round(limit, 4) for limit in wilson_interval(0, 1000)]
[0.0, 0.0038]
>>> [round(limit, 4) for limit in exact_interval(81, 263)]
[0.2527, 0.3676]

Runs that share an input, a layer and a head tell partly the same story: 16 of them are worth fewer than 16 independent
ones. ``korn_graubard_interval`` counts what they are worth, the *effective* number of trials, from the variance
between clusters, and gives the Clopper-Pearson limits for that number.

Sources: E. B. Wilson, JASA 22:209, 1927; C. J. Clopper, E. S. Pearson, Biometrika 26:404, 1934; E. L. Korn, B. I.
Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated from survey
data", Survey Methodology 24:193, 1998.

Public names: ``wilson_interval``, ``exact_interval``, ``wilson_limits``, ``exact_limits``, ``korn_graubard_interval``,
``CONFIDENCE``.
"""

from __future__ import annotations

import math

from scipy.special import betaincinv, stdtrit
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
"""The confidence of every interval, unless a function is told otherwise."""

Limits = tuple[float, float]


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Limits:
    """Return the Wilson score interval of a rate.

    >>> [round(limit, 3) for limit in wilson_interval(0, 100)]
    [0.0, 0.037]
    """
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def exact_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Limits:
    """Return the Clopper-Pearson interval of a rate.

    >>> [round(limit, 4) for limit in exact_interval(0, 20)]
    [0.0, 0.1684]
    """
    interval = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def wilson_limits(rate: float, trials: float, confidence: float = CONFIDENCE) -> Limits:
    """Return Wilson's limits for a number of trials that need not be whole; NaN without trials.

    >>> [round(limit, 4) for limit in wilson_limits(81 / 263, 263.0)]
    [0.2553, 0.3662]
    """
    if not trials > 0:
        return math.nan, math.nan
    quantile = float(norm.isf((1 - confidence) / 2))
    weight = quantile**2 / trials
    centre = (rate + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (rate * (1 - rate) + weight / 4)) / (1 + weight)
    return max(0.0, centre - half) if rate > 0 else 0.0, min(1.0, centre + half) if rate < 1 else 1.0


def exact_limits(rate: float, trials: float, confidence: float = CONFIDENCE) -> Limits:
    """Return Clopper and Pearson's limits for a number of trials that need not be whole; NaN without trials.

    >>> [round(limit, 4) for limit in exact_limits(81 / 263, 263.0)]
    [0.2527, 0.3676]
    """
    if not trials > 0:
        return math.nan, math.nan
    tail, successes = (1 - confidence) / 2, rate * trials
    failures = trials - successes
    low = float(betaincinv(successes, failures + 1, tail)) if rate > 0 else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if rate < 1 else 1.0
    return low, high


def korn_graubard_interval(
    rate: float, variance: float, trials: float, clusters: float, confidence: float = CONFIDENCE
) -> Limits:
    """Return the limits of a rate whose trials come in clusters.

    The effective number of trials is ``rate (1 - rate) / variance``, times the squared ratio of the t quantiles for
    ``trials - 1`` and ``clusters - 1`` degrees of freedom, and at most ``trials``. A rate of 0 or 1 says nothing about
    the correlation within clusters; each then counts as one trial, which is the worst case. So does a lone cluster.

    Args:
        rate: the estimated rate.
        variance: of that estimate, between clusters; see ``experiments.analysis.clusters``.
        trials: how many runs there are.
        clusters: how many clusters there are; if they differ in size, what they are worth: (sum n)^2 / sum n^2.
        confidence: of the interval.

    >>> rate, clusters, runs = 0.2, 60, 960
    >>> alone = rate * (1 - rate) / runs
    >>> [round(limit, 3) for limit in korn_graubard_interval(rate, 4 * alone, runs, clusters)]
    [0.15, 0.257]
    >>> [round(limit, 3) for limit in korn_graubard_interval(0.0, 0.0, runs, clusters)]
    [0.0, 0.06]
    """
    if not trials > 0:
        return math.nan, math.nan
    if not 0 < rate < 1 or not clusters > 1:
        return exact_limits(rate, min(clusters, trials), confidence)
    if not variance > 0:
        return exact_limits(rate, trials, confidence)
    tail = (1 + confidence) / 2
    ratio = float(stdtrit(trials - 1, tail) / stdtrit(clusters - 1, tail))
    return exact_limits(rate, min(trials, rate * (1 - rate) / variance * ratio**2), confidence)
