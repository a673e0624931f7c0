"""Clusters: runs that are not independent, because they share an input, a layer and a head.

Sums are taken over each cluster first (pseudo-bulk); everything that follows treats the cluster, never the run, as the
unit that was drawn. So a million runs cost one pass, and an interval says how the estimate would vary had other
inputs, layers and heads been drawn.

    for key, sums in grouped_sums(runs, detected(runs), by=["bit_field"]):
        estimate = ratio(sums)          # estimate.value, estimate.variance, estimate.degrees

Sources: the ratio estimator and its linearised variance between clusters, W. G. Cochran, "Sampling Techniques", 3rd
ed. 1977, 6.3 and 9A; the delete-one-cluster form, K. M. Wolter, "Introduction to Variance Estimation", 2nd ed. 2007,
4.2.

Public names: ``DEFAULT_CLUSTER``, ``ClusterSums``, ``Ratio``, ``grouped_sums``, ``ratio``.
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
"""Columns whose values runs of one cluster share. The campaign is none: two campaigns on one input are not independent."""

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
    >>> estimate.value, round(estimate.variance, 6), estimate.degrees
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
    return Ratio(value, variance, sums.effective_clusters - 1)


def grouped_sums(
    frame: pd.DataFrame,
    values: NDArray[Any],
    by: str | Sequence[str] | None = None,
    cluster: Sequence[str] = DEFAULT_CLUSTER,
    weights: Floats | None = None,
) -> Iterator[tuple[tuple[Any, ...], ClusterSums]]:
    """Yield each group's key (its values of ``by``, in order) and the sums of its clusters.

    Args:
        frame: one row per run.
        values: one number per row.
        by: the columns that make groups; groups come sorted. None: one group, even of no rows.
        cluster: the columns that make clusters. An empty cell is a value like any other.
        weights: one number per row; 1 if left out.

    Raises:
        UsageError: an unknown column.
    """
    names = listed(by)
    require_columns(frame, [*names, *cluster])
    keys, group = _codes(frame, names)
    _, unit = _codes(frame, list(cluster))
    count = int(unit.max(initial=0)) + 1
    pairs, place = np.unique(group.astype(np.int64) * count + unit, return_inverse=True)
    weight = np.ones(len(frame)) if weights is None else weights
    number = values.astype(np.float64)
    columns = [
        np.bincount(place, weights=part, minlength=len(pairs))
        for part in (weight * number, weight, np.ones(len(frame)), weight**2, number)
    ]
    ends = np.searchsorted(pairs // count, np.arange(len(keys) + 1))
    for position, key in enumerate(keys):
        part = slice(ends[position], ends[position + 1])
        yield key, ClusterSums(*(column[part] for column in columns))


def _codes(frame: pd.DataFrame, names: list[str]) -> tuple[list[tuple[Any, ...]], NDArray[np.int64]]:
    """Return the sorted distinct values of some columns, and for each row which of them it has."""
    if not names:
        return [()], np.zeros(len(frame), np.int64)
    groups = frame.groupby(names, observed=True, dropna=False, sort=True)
    keys = groups.size().index
    tuples = [key if isinstance(key, tuple) else (key,) for key in keys]
    return tuples, groups.ngroup().to_numpy(np.int64)
