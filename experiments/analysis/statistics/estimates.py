"""The sharper estimate of a rate from weighted draws, for groups of runs whose weights have mean 1.

    estimates = regressions(Grouping(runs, "run.scope"), harmful(runs), weights)      # one for each group, or None

A weight is the probability of a fault under uniform drawing over that of its draw, so over all draws the mean weight
is 1. Where it came out as 1.1, more than its share was drawn of what weighs much, and the regression takes that out:
``rate = mean(w h) - b (mean(w) - 1)``, with b the slope of ``w h`` over ``w``. The variance is that of its residuals
``w h - b (w - 1)``, between clusters. The ratio ``sum(w h) / sum(w)`` does so too, but with the rate in place of b,
which is far off where weight and harm go together, as ``fault.aim`` wants it.

Source: W. G. Cochran, "Sampling Techniques", 3rd ed. 1977, 7.1-7.3 (regression estimates); see docs/sampling.md.

Public names: ``regressions``, ``FEWEST``, ``FARTHEST``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from experiments.analysis.statistics.clusters import Grouping, Ratio, ratio
from experiments.analysis.statistics.weighted import regression_parts

FEWEST = 30
"""Runs below which a slope is not to be relied on."""

FARTHEST = 4.0
"""Standard errors by which the mean weight may be from 1; beyond, the rows are a part of what was drawn."""


def regressions(grouping: Grouping, hits: NDArray[np.bool_], weights: NDArray[np.float64]) -> list[Ratio | None]:
    """Return the regression estimate of each group's rate, or None where it cannot be had.

    That is with fewer than ``FEWEST`` runs, where the mean weight is not 1, and where the estimate is not between 0
    and 1: a rate of nothing is one, too.
    """
    parts, usable = np.zeros(len(hits)), []
    for rows in grouping.rows():
        weight = weights[rows]
        usable.append(len(rows) >= FEWEST and _has_mean_one(weight))
        if usable[-1]:
            parts[rows] = regression_parts(hits[rows].astype(np.float64), weight)
    estimates = [ratio(sums) for _, sums in grouping.sums(parts)]
    return [
        estimate if good and 0 < estimate.value < 1 else None for good, estimate in zip(usable, estimates, strict=True)
    ]


def _has_mean_one(weight: NDArray[np.float64]) -> bool:
    return bool(abs(weight.mean() - 1) <= FARTHEST * weight.std(ddof=1) / math.sqrt(len(weight)))
