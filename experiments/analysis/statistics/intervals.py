"""Confidence limits of one rate: Wilson, Clopper-Pearson, and Wilson for runs that are not independent.

>>> [round(limit, 4) for limit in wilson_interval(0, 1000)]
[0.0, 0.0038]
>>> [round(limit, 4) for limit in exact_interval(81, 263)]
[0.2527, 0.3676]

Runs that share an input, a layer and a head are correlated: 16 of them have less information than 16 independent runs.
``clustered_interval`` computes the *effective* number of independent trials from the variance between clusters, and
returns Wilson's limits for that number.

Sources: E. B. Wilson, JASA 22:209, 1927; C. J. Clopper, E. S. Pearson, Biometrika 26:404, 1934. The effective number of
trials: E. L. Korn, B. I. Graubard, Survey Methodology 24:193, 1998. With Wilson's limits: C. Franco, R. J. A. Little,
T. A. Louis, E. V. Slud, Journal of Survey Statistics and Methodology 7:334, 2019. How well the limits hold is measured
by ``python -m benchmarks.interval_coverage``.
"""

from __future__ import annotations

import math

from scipy.special import betaincinv, ndtri, stdtrit

CONFIDENCE = 0.95
"""The confidence of every interval, unless a function is told otherwise."""

Limits = tuple[float, float]


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Limits:
    """Return the Wilson score interval of a rate.

    Raises:
        ValueError: no trials, or successes that are not between 0 and their number.

    >>> [round(limit, 3) for limit in wilson_interval(0, 100)]
    [0.0, 0.037]
    """
    _check_counts(successes, trials)
    return wilson_limits(successes / trials, trials, confidence)


def exact_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> Limits:
    """Return the Clopper-Pearson interval of a rate.

    Raises:
        ValueError: no trials, or successes that are not between 0 and their number.

    >>> [round(limit, 4) for limit in exact_interval(0, 20)]
    [0.0, 0.1684]
    """
    _check_counts(successes, trials)
    return _beta_limits(successes, trials - successes, confidence)


def wilson_limits(rate: float, trials: float, confidence: float = CONFIDENCE) -> Limits:
    """Return Wilson's limits for a number of trials that need not be whole; NaN without trials.

    >>> [round(limit, 4) for limit in wilson_limits(81 / 263, 263.0)]
    [0.2553, 0.3662]
    """
    if not trials > 0:
        return math.nan, math.nan
    quantile = -float(ndtri((1 - confidence) / 2))
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
    return _beta_limits(rate * trials, (1 - rate) * trials, confidence)


def _beta_limits(successes: float, failures: float, confidence: float) -> Limits:
    tail = (1 - confidence) / 2
    low = float(betaincinv(successes, failures + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if failures > 0 else 1.0
    return low, high


def _check_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"got {successes} of {trials}, allowed 1 trial or more and from 0 to all of them")


def clustered_interval(
    rate: float,
    variance: float,
    degrees: float,
    trials: float,
    clusters: float,
    confidence: float = CONFIDENCE,
    *,
    weighted: bool = False,
) -> Limits:
    """Return the limits of a rate whose trials come in clusters.

    These are Wilson's limits for the effective number of trials: ``rate (1 - rate) / variance``, times the squared
    ratio of the t quantiles for ``trials - 1`` and for ``degrees`` degrees of freedom, and at most ``trials``. If the
    rate is 0 or 1, the data do not show the correlation within clusters; then each cluster counts as one trial. So does
    a single cluster. (With clusters in several ways, the clusters of the intersection count: runs that share only an
    input, or only a head, are then treated as independent, because their correlation is unknown.)

    Args:
        rate: the estimated rate.
        variance: the variance of that estimate, between clusters; see ``experiments.analysis.statistics.clusters``.
        degrees: the degrees of freedom of that variance.
        trials: the number of runs.
        clusters: the number of clusters; if they differ in size, the effective number (sum n)^2 / sum n^2.
        confidence: the confidence of the interval.
        weighted: whether the runs were drawn with unequal probabilities. Such runs can have more information than as
            many uniform ones, so the effective number of trials may then exceed ``trials``.

    >>> rate, clusters, runs = 0.2, 60, 960
    >>> alone = rate * (1 - rate) / runs
    >>> [round(limit, 3) for limit in clustered_interval(rate, 4 * alone, 59, runs, clusters)]
    [0.153, 0.256]
    >>> [round(limit, 3) for limit in clustered_interval(0.0, 0.0, 59, runs, clusters)]
    [0.0, 0.06]
    """
    if not trials > 0:
        return math.nan, math.nan
    if not 0 < rate < 1 or not clusters > 1:
        return wilson_limits(rate, min(clusters, trials), confidence)
    if not variance > 0:
        return wilson_limits(rate, trials, confidence)
    tail = (1 + confidence) / 2
    factor = float(stdtrit(trials - 1, tail) / stdtrit(degrees, tail)) ** 2
    effective = rate * (1 - rate) / variance * factor
    return wilson_limits(rate, effective if weighted else min(trials, effective), confidence)
