"""The regression estimate of a rate from weighted draws, for groups of runs whose weights have mean 1.

    estimates = regressions(Grouping(runs, "run.scope"), harmful(runs), weights)      # one for each group, or None

A weight is the probability of a fault under uniform drawing, divided by the probability of its draw, so the expected
weight over all draws is 1. If the observed mean is 1.1, faults of large weight were drawn too often by chance. The
regression corrects this: ``rate = mean(w h) - b (mean(w) - 1)``, with b the slope of ``w h`` over ``w``. Its variance
is that of the residuals ``w h - b (w - 1)``, between clusters. The ratio ``sum(w h) / sum(w)`` corrects it, too, but
with the rate in place of b. The rate is far from b if weight and harm are correlated, as they are with ``fault.aim``.

Source: W. G. Cochran, "Sampling Techniques", 3rd ed. 1977, 7.1-7.3 (regression estimates); see docs/sampling.md.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from experiments.analysis.statistics.cluster_sums import Ratio, ratio
from experiments.analysis.statistics.clusters import Grouping
from experiments.analysis.statistics.weighted import regression_parts

FEWEST = 30
"""With fewer runs than this, a slope is not reliable."""

FARTHEST = 4.0
"""The mean weight may differ from 1 by this many standard errors; beyond that, some draws are missing from the rows."""


def regressions(grouping: Grouping, hits: NDArray[np.bool_], weights: NDArray[np.float64]) -> list[Ratio | None]:
    """Return the regression estimate of each group's rate, or None without one.

    A group has no estimate if it has fewer than ``FEWEST`` runs, if the mean weight is not 1, or if the estimate is not
    strictly between 0 and 1.
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
