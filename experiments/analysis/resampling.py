"""The bootstrap over clusters: how far an estimate would move had other clusters been drawn.

    limits = bootstrap_limits(estimate, influence)        # influence: one number for each cluster

An estimate's *influence* of a cluster is by how much it leans on it: the values sum to 0, and the variance of the
estimate is C / (C - 1) times the sum of their squares. Whole clusters are drawn with replacement, and the
*studentised* mean of each draw is kept (bootstrap-t): unlike the percentiles of the estimate itself, its quantiles are
right for skewed values and few clusters. With fewer than ``FEWEST`` clusters too few different draws exist, with more
than ``MOST`` the t distribution is as good; both take that.

Sources: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, 12.5; A. C. Davison, D. V. Hinkley,
"Bootstrap Methods and their Application", 1997, 2.4 and 5.2.1 (and why 1,999 draws: 0.025 of 2,000 is a whole number).

Public names: ``bootstrap_limits``, ``ratio_influence``, ``Limits``, ``RESAMPLES``, ``FEWEST``, ``MOST``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from experiments.analysis.clusters import ClusterSums
from experiments.analysis.intervals import CONFIDENCE

RESAMPLES = 1999
FEWEST = 8
MOST = 10_000
CHUNK = 1 << 21
"""Most drawn numbers that are held at a time."""

SEED = 0
"""Of the draws: the same table gives the same limits."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """Limits of an estimate, the p-value of "it is 0", and how they were made."""

    low: float
    high: float
    p_value: float
    method: str


def ratio_influence(sums: ClusterSums) -> Floats:
    """Return the influence of each cluster on sum of values / sum of weights; of lone clusters NaN.

    >>> ones = np.ones(2)
    >>> ratio_influence(ClusterSums(np.array([1.0, 3.0]), 2 * ones, 2 * ones, 2 * ones, ones)).tolist()
    [-0.25, 0.25]
    """
    total, count = float(sums.weights.sum()), int((sums.weights > 0).sum())
    if count < 2:
        return np.full(len(sums.weights), math.nan)
    # Delete-one form, as in ``clusters.ratio``, scaled so that C / (C - 1) times its squares is that variance.
    change = (sums.values - sums.values.sum() / total * sums.weights) / (total - sums.weights)
    return np.where(sums.weights > 0, change * (count - 1) / count, 0.0)


def bootstrap_limits(estimate: float, influence: Floats, confidence: float = CONFIDENCE, seed: int = SEED) -> Limits:
    """Return limits of an estimate from the influence of its clusters.

    >>> limits = bootstrap_limits(2.0, np.array([-0.5, 0.5] * 8) / 16)
    >>> round(limits.low, 2), round(limits.high, 2), limits.method
    (1.71, 2.29, 'bootstrap-t over clusters')
    """
    count = len(influence)
    if count < 2 or not np.isfinite(influence).all():
        return Limits(math.nan, math.nan, math.nan, "none: fewer than two clusters")
    error = math.sqrt(count / (count - 1) * float((influence**2).sum()))
    if error == 0:
        return Limits(estimate, estimate, float(estimate == 0), "none: all clusters agree")
    tail = (1 - confidence) / 2
    if not FEWEST <= count <= MOST:
        quantile = float(stdtrit(count - 1, 1 - tail))
        p_value = 2 * float(stdtr(count - 1, -abs(estimate / error)))
        return Limits(estimate - quantile * error, estimate + quantile * error, p_value, "t over clusters")
    drawn = np.sort(_studentised(influence - influence.mean(), seed))
    lower, upper = np.quantile(drawn, [tail, 1 - tail], method="weibull")
    beyond = int((np.abs(drawn) >= abs(estimate / error)).sum())
    return Limits(
        estimate - float(upper) * error,
        estimate - float(lower) * error,
        (1 + beyond) / (1 + len(drawn)),
        "bootstrap-t over clusters",
    )


def _studentised(influence: Floats, seed: int) -> Floats:
    """Return the studentised sums of draws of whole clusters."""
    generator, count = np.random.default_rng(seed), len(influence)
    step = max(1, CHUNK // count)
    parts = []
    for start in range(0, RESAMPLES, step):
        drawn = influence[generator.integers(0, count, (min(step, RESAMPLES - start), count))]
        error = np.sqrt(count * drawn.var(axis=1, ddof=1))
        # A draw of equal clusters alone has no spread to compare with; with eight clusters that is one in millions,
        # unless most clusters are equal: then it counts as infinitely far on its side.
        total = drawn.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.where(total == 0, 0.0, total / error))
    return np.concatenate(parts)
