"""The bootstrap over clusters: how far an estimate would move with other clusters.

    limits = bootstrap_limits(estimate, influence)        # influence: one number for each cluster
    limits = mean_limits(sums)                            # the same of a ratio of sums over clusters

The *influence* of a cluster is its contribution to the estimate. Influences sum to 0, and the variance of the estimate
is C / (C - 1) times the sum of their squares. The bootstrap draws whole clusters with replacement and keeps the
*studentised* mean of each draw (bootstrap-t). Its quantiles are right for skewed values and few clusters, unlike the
percentiles of the estimate itself. With fewer than ``FEWEST`` clusters too few different draws exist, and with more
than ``MOST`` the t distribution is as good; in both cases the t distribution is used.

Sources: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, 12.5; A. C. Davison, D. V. Hinkley,
"Bootstrap Methods and their Application", 1997, 2.4 and 5.2.1 (and why 1,999 draws: 0.025 of 2,000 is a whole number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from experiments.analysis.statistics.cluster_sums import ClusterSums, changes, ratio
from experiments.analysis.statistics.intervals import CONFIDENCE

RESAMPLES = 1999
FEWEST = 8
MOST = 10_000
CHUNK = 1 << 21
"""The largest number of draws in memory at a time."""

ROUNDING = 1e-12
"""A standard error below this share of the estimate is only rounding."""

SEED = 0
"""The seed of the draws: the same table gives the same limits."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """The limits of an estimate, and the method that gave them."""

    low: float
    high: float
    method: str


def mean_limits(sums: ClusterSums, confidence: float = CONFIDENCE) -> Limits:
    """Return limits of the ratio of the sums.

    With clusters in several ways, the clusters of the way with the largest variance are drawn; the width of the limits
    follows from the variance of all ways together.

    >>> ones = np.ones(2)
    >>> limits = mean_limits(ClusterSums(np.array([1.0, 3.0]), 2 * ones, 2 * ones, 2 * ones, ones))
    >>> round(limits.low, 2), round(limits.high, 2), limits.method
    (-5.35, 7.35, 't over clusters')
    """
    estimate = ratio(sums)
    moved = max((changes(way) for way in sums.ways), key=lambda change: float((change**2).sum()))
    return bootstrap_limits(estimate.value, moved, math.sqrt(estimate.variance), confidence)


def bootstrap_limits(
    estimate: float, influence: Floats, error: float | None = None, confidence: float = CONFIDENCE, seed: int = SEED
) -> Limits:
    """Return limits of an estimate from the influence of its clusters.

    Args:
        estimate: any number.
        influence: of each cluster; only its proportions count if ``error`` is given.
        error: standard error of the estimate; that of the clusters if left out.
        confidence: of the limits.
        seed: of the draws.

    >>> limits = bootstrap_limits(2.0, np.array([-0.5, 0.5] * 8) / 16)
    >>> round(limits.low, 2), round(limits.high, 2), limits.method
    (1.71, 2.29, 'bootstrap-t over clusters')
    """
    count = len(influence)
    if count < 2 or not np.isfinite(influence).all():
        return Limits(math.nan, math.nan, "none: fewer than two clusters")
    own = math.sqrt(count / (count - 1) * float((influence**2).sum()))
    # Sums of equal numbers differ in their last bits.
    if own <= ROUNDING * abs(estimate):
        return Limits(math.nan, math.nan, "none: all clusters agree")
    error = own if error is None else error
    tail = (1 - confidence) / 2
    if not FEWEST <= count <= MOST:
        quantile = float(stdtrit(count - 1, 1 - tail))
        return Limits(estimate - quantile * error, estimate + quantile * error, "t over clusters")
    drawn = np.sort(_studentised(influence - influence.mean(), seed))
    lower, upper = np.quantile(drawn, [tail, 1 - tail], method="weibull")
    return Limits(estimate - float(upper) * error, estimate - float(lower) * error, "bootstrap-t over clusters")


def _studentised(influence: Floats, seed: int) -> Floats:
    """Return the studentised sums of draws of whole clusters."""
    generator, count = np.random.default_rng(seed), len(influence)
    step = max(1, CHUNK // count)
    parts = []
    for start in range(0, RESAMPLES, step):
        drawn = influence[generator.integers(0, count, (min(step, RESAMPLES - start), count))]
        error = np.sqrt(count * drawn.var(axis=1, ddof=1))
        # A draw of only equal clusters has no spread. With eight clusters that is one draw in millions, unless most
        # clusters are equal: then the draw counts as infinitely far on its side.
        total = drawn.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.where(total == 0, 0.0, total / error))
    return np.concatenate(parts)
