"""A rate under uniform drawing, estimated from runs that were drawn with unequal probabilities (``fault.aim``).

    estimate = regression_estimate(counts, weight)       # 1.0 where a run counts; the column sampling_weight
    estimate.rate, estimate.margin

The mean of weight times outcome is unbiased (Horvitz and Thompson, JASA 47, 1952). The regression uses that the mean
weight is 1, and has the smallest variance of the three for many runs; the ratio is Hajek's. See docs/sampling.md.

Public names: ``Estimate``, ``uniform_share``, ``mean_estimate``, ``regression_estimate``, ``regression_parts``,
``ratio_estimate``, ``Numbers``.

>>> uniform_share(np.array([1.0, 0.0, 0.0, 0.0]))
Estimate(rate=0.25, variance=0.1875, runs=4)
>>> mean_estimate(np.array([1.0, 0.0]), np.array([0.5, 1.5])).rate
0.25
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Estimate(NamedTuple):
    """A rate, the variance of one run's contribution to it, and how many runs there were."""

    rate: float
    variance: float
    runs: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval (normal)."""
        return 1.959964 * math.sqrt(self.variance / self.runs)


def uniform_share(counts: Numbers) -> Estimate:
    """Return the share of unweighted runs."""
    rate = float(counts.mean())
    return Estimate(rate, rate * (1 - rate), len(counts))


def mean_estimate(counts: Numbers, weight: Numbers) -> Estimate:
    """Return the mean of weight times outcome: unbiased."""
    return Estimate(float((weight * counts).mean()), float((weight * counts).var(ddof=1)), len(counts))


def regression_estimate(counts: Numbers, weight: Numbers) -> Estimate:
    """Return the mean of weight times outcome, corrected by the mean weight, which is 1 but for chance."""
    parts = regression_parts(counts, weight)
    return Estimate(float(parts.mean()), float(parts.var(ddof=1)), len(counts))


def regression_parts(counts: Numbers, weight: Numbers) -> Numbers:
    """Return what each run contributes to the regression estimate, which is their mean: ``w h - b (w - 1)``.

    ``b`` is the slope of ``w h`` over ``w``; without two different weights it is 0.

    >>> regression_parts(np.array([1.0, 1.0, 0.0]), np.array([0.5, 0.5, 2.0])).round(9).tolist()
    [0.333333333, 0.333333333, 0.333333333]
    """
    if len(weight) < 2 or float(weight.var()) == 0:
        return weight * counts
    slope = float(np.cov(weight * counts, weight)[0, 1] / weight.var(ddof=1))
    return weight * counts - slope * (weight - 1)


def ratio_estimate(counts: Numbers, weight: Numbers) -> Estimate:
    """Return the weighted mean (Hajek), with its linearised variance."""
    rate = float((weight * counts).sum() / weight.sum())
    return Estimate(rate, float(np.mean((weight * (counts - rate) / weight.mean()) ** 2)), len(counts))
