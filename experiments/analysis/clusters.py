"""Clusters: runs that are not independent, because they share an input, a layer and a head.

Sums are taken over each cluster first (pseudo-bulk); everything that follows treats the cluster, never the run, as the
unit that was drawn. So a million runs cost one pass, and an interval says how the estimate would vary had other
inputs, layers and heads been drawn.

    for key, sums in Grouping(runs, "bit_field").sums(detected(runs)):
        estimate = ratio(sums)          # estimate.value, estimate.variance, estimate.degrees

Sources: the ratio estimator and its linearised variance between clusters, W. G. Cochran, "Sampling Techniques", 3rd
ed. 1977, 6.3 and 9A; the delete-one-cluster form, K. M. Wolter, "Introduction to Variance Estimation", 2nd ed. 2007,
4.2; degrees of freedom from the variance of that variance, W. Pan, M. M. Wall, Statistics in Medicine 21:1429, 2002.

Public names: ``DEFAULT_CLUSTER``, ``ClusterSums``, ``Grouping``, ``Ratio``, ``ratio``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.analysis.distinct import listed, require_columns

DEFAULT_CLUSTER = ("model", "batch_index", "layer", "index_head")
"""What runs of one cluster share. The campaign is not part of it: two campaigns on one input are not independent."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClusterSums:
    """Sums over the runs of each cluster of one group; arrays of one length, the number of clusters.

    Attributes:
        values: sum of weight times value.
        weights: sum of weights; where no run is weighted, the number of runs.
        runs: number of runs.
        squares: sum of squared weights.
        hits: sum of values, without weights.
    """

    values: Floats
    weights: Floats
    runs: Floats
    squares: Floats
    hits: Floats

    @property
    def effective_clusters(self) -> float:
        """What the clusters are worth if they differ in weight: (sum w)^2 / sum w^2 (Kish)."""
        total = float((self.weights**2).sum())
        return float(self.weights.sum()) ** 2 / total if total > 0 else 0.0

    @property
    def effective_runs(self) -> float:
        """What the runs would be worth if they were independent, given their weights (Kish)."""
        total = float(self.squares.sum())
        return float(self.weights.sum()) ** 2 / total if total > 0 else 0.0

    @property
    def are_singletons(self) -> bool:
        """Whether every cluster is a single run."""
        return bool((self.runs == 1).all())


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums over clusters, and how well it is known.

    Attributes:
        value: sum of values divided by sum of weights.
        variance: of ``value``, from the differences between clusters; NaN with fewer than two.
        degrees: degrees of freedom of that variance.
    """

    value: float
    variance: float
    degrees: float


def ratio(sums: ClusterSums) -> Ratio:
    """Return the ratio estimate and its delete-one-cluster variance.

    Without cluster i the ratio changes by ``-(values_i - ratio weights_i) / (total - weights_i)``; the variance is
    (C - 1) / C times the sum of the squares of these.

    >>> ones = np.ones(4)
    >>> sums = ClusterSums(np.array([0.0, 1.0, 1.0, 2.0]), 2 * ones, 2 * ones, 2 * ones, np.array([0.0, 1.0, 1.0, 2.0]))
    >>> estimate = ratio(sums)
    >>> estimate.value, round(estimate.variance, 6), round(estimate.degrees, 6)
    (0.5, 0.041667, 3.0)
    """
    # A cluster of weight 0 says nothing and must not count as one.
    kept = sums.weights > 0
    values, weights = sums.values[kept], sums.weights[kept]
    total, count = float(weights.sum()), len(weights)
    if not count:
        return Ratio(math.nan, math.nan, math.nan)
    value = float(values.sum()) / total
    if count < 2:
        return Ratio(value, math.nan, 0.0)
    change = (values - value * weights) / (total - weights)
    variance = (count - 1) / count * float((change**2).sum())
    return Ratio(value, variance, _degrees(change, sums.effective_clusters))


def _degrees(change: Floats, clusters: float) -> float:
    """Return the degrees of freedom of a variance: how well so many clusters, as skewed as these, can tell it.

    A variance of C normal numbers has C - 1. In general the variance of a sample variance s^2 is
    s^4 (kurtosis - (C - 3) / (C - 1)) / C, which a chi-squared variable of 2 C / (...) degrees of freedom has.
    """
    count, squares = len(change), change**2
    if not squares.any():
        return clusters - 1
    kurtosis = count * float((squares**2).sum()) / float(squares.sum()) ** 2
    excess = kurtosis - (count - 3) / (count - 1)
    return max(1.0, min(clusters - 1, 2 * count / excess if excess > 0 else math.inf))


class Grouping:
    """Which group and which cluster every row of a table belongs to; found once, for any number of values.

    Args:
        frame: one row per run.
        by: the columns that make groups; groups come sorted. None: one group, even of no rows.
        cluster: the columns that make clusters. An empty cell is a value like any other.

    Attributes:
        keys: the values of ``by`` of each group.

    Raises:
        UsageError: an unknown column.

    >>> frame = pd.DataFrame({"bit": [1, 1, 2], "input": [0, 1, 0]})
    >>> [(key, sums.hits.tolist()) for key, sums in Grouping(frame, "bit", ["input"]).sums(np.array([1, 0, 1]))]
    [((1,), [1.0, 0.0]), ((2,), [1.0])]
    """

    def __init__(
        self, frame: pd.DataFrame, by: str | Sequence[str] | None = None, cluster: Sequence[str] = DEFAULT_CLUSTER
    ) -> None:
        names = listed(by)
        require_columns(frame, [*names, *cluster])
        self.keys, group = _codes(frame, names)
        _, unit = _codes(frame, list(cluster))
        count = int(unit.max(initial=0)) + 1
        # Clusters are numbered group by group, in the order of their keys: the rows' order changes nothing.
        pairs, self._place = np.unique(group * count + unit, return_inverse=True)
        self._count = len(pairs)
        self._ends = np.searchsorted(pairs // count, np.arange(len(self.keys) + 1))
        self._group = group

    def rows(self) -> list[NDArray[np.intp]]:
        """Return the positions of each group's rows."""
        order = np.argsort(self._group, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self._group, minlength=len(self.keys)))[:-1])

    def sums(
        self, values: NDArray[Any], weights: Floats | None = None
    ) -> Iterator[tuple[tuple[Any, ...], ClusterSums]]:
        """Yield each group's key and the sums of its clusters.

        Args:
            values: one number per row.
            weights: one number per row; 1 if left out.
        """
        number = values.astype(np.float64)
        runs = self._summed(np.ones(len(number)))
        hits = self._summed(number)
        if weights is None:
            totals = ClusterSums(hits, runs, runs, runs, hits)
        else:
            totals = ClusterSums(
                self._summed(weights * number), self._summed(weights), runs, self._summed(weights**2), hits
            )
        for position, key in enumerate(self.keys):
            part = slice(self._ends[position], self._ends[position + 1])
            yield key, ClusterSums(*(column[part] for column in vars(totals).values()))

    def _summed(self, numbers: Floats) -> Floats:
        return np.bincount(self._place, weights=numbers, minlength=self._count).astype(np.float64, copy=False)


def _codes(frame: pd.DataFrame, names: list[str]) -> tuple[list[tuple[Any, ...]], NDArray[np.int64]]:
    """Return the sorted distinct values of some columns, and for each row which of them it has."""
    if not names:
        return [()], np.zeros(len(frame), np.int64)
    groups = frame.groupby(names, observed=True, dropna=False, sort=True)
    keys = groups.size().index
    tuples = [key if isinstance(key, tuple) else (key,) for key in keys]
    return tuples, groups.ngroup().to_numpy(np.int64)
