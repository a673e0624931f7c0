"""Sums over clusters, and the ratio of two of them with its variance between clusters.

>>> ones = np.ones(4)
>>> sums = ClusterSums(np.array([0.0, 1.0, 1.0, 2.0]), 2 * ones, 2 * ones, 2 * ones, np.array([0.0, 1.0, 1.0, 2.0]))
>>> estimate = ratio(sums)
>>> estimate.value, round(estimate.variance, 6), round(estimate.degrees, 6)
(0.5, 0.041667, 3.0)

``experiments.analysis.statistics.clusters`` makes the sums of a table of runs.

Sources: the ratio estimator and its linearised variance between clusters, W. G. Cochran, "Sampling Techniques", 3rd
ed. 1977, 6.3 and 9A; the delete-one-cluster form, K. M. Wolter, "Introduction to Variance Estimation", 2nd ed. 2007,
4.2; degrees of freedom from the variance of that variance, W. Pan, M. M. Wall, Statistics in Medicine 21:1429, 2002;
clusters in several ways, A. C. Cameron, J. B. Gelbach, D. L. Miller, Journal of Business & Economic Statistics 29:238,
2011.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClusterSums:
    """Sums over the runs of each cluster of one group; arrays of one length, the number of clusters.

    With clusters in several ways, the arrays belong to the way with the smallest effective number of clusters.

    Attributes:
        values: sum of weight times value.
        weights: sum of weights; the number of runs if no run is weighted.
        runs: number of runs.
        squares: sum of squared weights.
        hits: sum of values, without weights.
        crossed: the same of the other ways (1) and of the intersections of two ways (2), of three (3).
    """

    values: Floats
    weights: Floats
    runs: Floats
    squares: Floats
    hits: Floats
    crossed: tuple[tuple[int, ClusterSums], ...] = ()

    @property
    def ways(self) -> tuple[ClusterSums, ...]:
        """The sums of every way, without intersections."""
        return (self, *(sums for count, sums in self.crossed if count == 1))

    def where(self, held: NDArray[np.bool_]) -> ClusterSums:
        """Return some of the clusters, as clusters of one way."""
        return ClusterSums(self.values[held], self.weights[held], self.runs[held], self.squares[held], self.hits[held])

    @property
    def effective_clusters(self) -> float:
        """The effective number of clusters, which may differ in weight: (sum w)^2 / sum w^2 (Kish)."""
        total = float((self.weights**2).sum())
        return float(self.weights.sum()) ** 2 / total if total > 0 else 0.0

    @property
    def units(self) -> float:
        """The effective number of clusters of the intersection of all ways: their runs share all cluster columns."""
        return (
            max(self.crossed, key=lambda part: part[0])[1].effective_clusters
            if self.crossed
            else (self.effective_clusters)
        )

    @property
    def effective_runs(self) -> float:
        """The effective number of runs, given their weights, if they were independent (Kish)."""
        total = float(self.squares.sum())
        return float(self.weights.sum()) ** 2 / total if total > 0 else 0.0

    @property
    def are_singletons(self) -> bool:
        """Whether every cluster is a single run."""
        return bool((self.runs == 1).all())


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums over clusters, and its precision.

    Attributes:
        value: sum of values divided by sum of weights.
        variance: the variance of ``value``, from the differences between clusters; NaN with fewer than two.
        degrees: degrees of freedom of that variance.
    """

    value: float
    variance: float
    degrees: float


def ratio(sums: ClusterSums) -> Ratio:
    """Return the ratio estimate and its delete-one-cluster variance.

    Without cluster i the ratio changes by ``-(values_i - ratio weights_i) / (total - weights_i)``. The variance is
    (C - 1) / C times the sum of the squares of these changes. With several ways, it is the sum over the ways, minus the
    sum over intersections of two, plus that over three, and so on; it is at least the largest variance of one way. The
    degrees of freedom are those of the way with the fewest.
    """
    found = _ratio_of_one_way(sums)
    ways = [found, *(_ratio_of_one_way(way) for way in sums.ways[1:])]
    if len(ways) == 1:
        return found
    total = found.variance - sum((-1) ** count * _ratio_of_one_way(part).variance for count, part in sums.crossed)
    return Ratio(found.value, max(total, *(way.variance for way in ways)), min(way.degrees for way in ways))


def changes(sums: ClusterSums) -> Floats:
    """Return how much each cluster of a way moves the ratio; the squares sum to the variance of that way.

    A cluster of weight 0 moves nothing. With fewer than two clusters all changes are NaN.
    """
    total, count = float(sums.weights.sum()), int((sums.weights > 0).sum())
    if count < 2:
        return np.full(len(sums.weights), math.nan)
    change = (sums.values - float(sums.values.sum()) / total * sums.weights) / (total - sums.weights)
    return np.where(sums.weights > 0, change * math.sqrt((count - 1) / count), 0.0)


def _ratio_of_one_way(sums: ClusterSums) -> Ratio:
    # A cluster of weight 0 has no information and must not count.
    kept = sums.where(sums.weights > 0)
    total, count = float(kept.weights.sum()), len(kept.weights)
    if not count:
        return Ratio(math.nan, math.nan, math.nan)
    value = float(kept.values.sum()) / total
    if count < 2:
        return Ratio(value, math.nan, 0.0)
    change = changes(kept)
    return Ratio(value, float((change**2).sum()), _degrees(change, sums.effective_clusters))


def _degrees(change: Floats, clusters: float) -> float:
    """Return the degrees of freedom of a variance: the precision that this many clusters, this skewed, give it.

    A variance of C normal numbers has C - 1. In general the variance of a sample variance s^2 is
    s^4 (kurtosis - (C - 3) / (C - 1)) / C, which a chi-squared variable of 2 C / (...) degrees of freedom has.
    """
    count, squares = len(change), change**2
    if not squares.any():
        return clusters - 1
    kurtosis = count * float((squares**2).sum()) / float(squares.sum()) ** 2
    excess = kurtosis - (count - 3) / (count - 1)
    return max(1.0, min(clusters - 1, 2 * count / excess if excess > 0 else math.inf))
