"""Clusters: runs that are not independent, because they share an input, or a head.

Values are first summed over each cluster (pseudo-bulk). From then on the cluster, never the run, is the sampled unit.
So a million runs cost one pass, and an interval says how the estimate would vary with other inputs and other heads.

    for key, sums in Grouping(runs, "bit_field").sums(detected(runs)):
        estimate = ratio(sums)          # estimate.value, estimate.variance, estimate.degrees

By default runs are clustered in two crossing *ways*, by input and by head. The estimate is the rate over all texts, of
which the inputs are a sample, and over heads like these: layers and heads count as a sample, too. The variance is
V(input) + V(head) - V(input and head). ``cluster=["model", "layer"]`` makes one way, a list of such lists several. If a
way has a single cluster in a group (a table by head; a campaign on one input), its variation is unknown and the way is
left out; the limits then describe that head or that input alone.

``experiments.analysis.statistics.cluster_sums`` has the estimate, and the sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.analysis.statistics.cluster_sums import ClusterSums, Floats
from experiments.analysis.statistics.distinct import listed, require_columns
from experiments.errors import UsageError

Cluster = Sequence[str] | Sequence[Sequence[str]]
"""Columns that make clusters in one way, or a list of such lists: several ways."""

DEFAULT_CLUSTER = (("model", "batch_index"), ("model", "layer", "index_head"))
"""The columns that runs of one cluster share. The campaign is none: two campaigns on one input are not independent."""

Ways = tuple[int, ...]
"""Positions of ways; several positions mean the clusters of their intersection."""


def cluster_columns(cluster: Cluster) -> list[str]:
    """Return every column that a choice of clusters names, once.

    >>> cluster_columns([["model", "layer"], ["model", "bit"]])
    ['model', 'layer', 'bit']
    """
    return list(dict.fromkeys(name for way in _ways(cluster) for name in way))


def _ways(cluster: Cluster) -> list[list[str]]:
    given = [cluster] if isinstance(cluster, str) else list(cluster)
    columns = [way for way in given if isinstance(way, str)]
    if columns and len(columns) < len(given):
        raise UsageError(f"cluster: got {cluster!r}, allowed a list of columns, or a list of such lists")
    return [list(way) for way in given if not isinstance(way, str)] or [columns]


class Grouping:
    """The group and the clusters of every row of a table; computed once, for any number of values.

    Args:
        frame: one row per run.
        by: the columns that make groups, which are sorted. None: one group, even without rows.
        cluster: the columns that make clusters, in one way or several. An empty cell counts as a value.

    Attributes:
        keys: the values of ``by`` of each group.

    Raises:
        UsageError: an unknown column.

    >>> frame = pd.DataFrame({"bit": [1, 1, 2], "input": [0, 1, 0]})
    >>> [(key, sums.hits.tolist()) for key, sums in Grouping(frame, "bit", ["input"]).sums(np.array([1, 0, 1]))]
    [((1,), [1.0, 0.0]), ((2,), [1.0])]
    """

    def __init__(
        self, frame: pd.DataFrame, by: str | Sequence[str] | None = None, cluster: Cluster = DEFAULT_CLUSTER
    ) -> None:
        names, ways = listed(by), _ways(cluster)
        require_columns(frame, [*names, *cluster_columns(cluster)])
        self.keys, self._group = _codes(frame, names)
        units = [_codes(frame, way)[1] for way in ways]
        self._partitions = {
            chosen: _Partition(self._group, [units[way] for way in chosen], len(self.keys))
            for count in range(1, len(ways) + 1)
            for chosen in combinations(range(len(ways)), count)
        }

    def rows(self) -> list[NDArray[np.intp]]:
        """Return the positions of each group's rows."""
        order = np.argsort(self._group, kind="stable")
        return np.split(order, np.cumsum(np.bincount(self._group, minlength=len(self.keys)))[:-1])

    def sums(
        self,
        values: NDArray[Any],
        weights: Floats | None = None,
        *,
        counted: NDArray[np.bool_] | None = None,
        denominators: Floats | None = None,
    ) -> Iterator[tuple[tuple[Any, ...], ClusterSums]]:
        """Yield each group's key and the sums of its clusters.

        Args:
            values: one number per row.
            weights: one number per row; default 1.
            counted: the rows that count; default: all. Clusters without such a row are left out.
            denominators: one number per row, multiplied with its weight; default 1.
        """
        for key, parts in self.parts(values, weights, counted=counted, denominators=denominators):
            yield key, crossed(parts)

    def parts(
        self,
        values: NDArray[Any],
        weights: Floats | None = None,
        *,
        counted: NDArray[np.bool_] | None = None,
        denominators: Floats | None = None,
    ) -> Iterator[tuple[tuple[Any, ...], dict[Ways, ClusterSums]]]:
        """Yield each group's key and, for each way and intersection of ways, the sums of all its clusters.

        Arguments as for ``sums``; clusters without a counted row are included, with sums of 0.
        """
        rows = np.ones(len(values)) if counted is None else counted.astype(np.float64)
        number = np.where(rows > 0, values.astype(np.float64), 0.0)
        weight = rows if weights is None else rows * weights
        columns = [weight * number, weight, rows, weight**2, number]
        if denominators is not None:
            columns[1] = weight * np.where(rows > 0, denominators, 0.0)
        totals = {ways: [part.summed(column) for column in columns] for ways, part in self._partitions.items()}
        for position, key in enumerate(self.keys):
            yield (
                key,
                {ways: _sliced(totals[ways], part.span(position)) for ways, part in self._partitions.items()},
            )


def _sliced(columns: list[Floats], span: slice) -> ClusterSums:
    values, weights, runs, squares, hits = (column[span] for column in columns)
    return ClusterSums(values, weights, runs, squares, hits)


def crossed(parts: Mapping[Ways, ClusterSums]) -> ClusterSums:
    """Return the parts of a group as one object: only clusters with runs, and only ways with several clusters."""
    present = {ways: sums.where(sums.runs > 0) for ways, sums in parts.items()}
    several = [ways[0] for ways, sums in present.items() if len(ways) == 1 and len(sums.runs) > 1]
    if not several:
        return present[(0,)]
    first = min(several, key=lambda way: present[(way,)].effective_clusters)
    others = tuple(
        (len(ways), sums) for ways, sums in present.items() if set(ways) <= set(several) and ways != (first,)
    )
    return replace(present[(first,)], crossed=others)


class _Partition:
    """The clusters of one way, or of the intersection of several, numbered group by group in the order of their keys.

    So the order of the rows does not matter.
    """

    def __init__(self, group: NDArray[np.int64], units: Sequence[NDArray[np.int64]], groups: int) -> None:
        place, numbers = group, np.arange(groups)
        for unit in units:
            count = int(unit.max(initial=0)) + 1
            pairs, place = np.unique(place * count + unit, return_inverse=True)
            numbers = numbers[pairs // count]
        self._place, self._count = place, len(numbers)
        self._ends = np.searchsorted(numbers, np.arange(groups + 1))

    def span(self, position: int) -> slice:
        return slice(self._ends[position], self._ends[position + 1])

    def summed(self, numbers: Floats) -> Floats:
        return np.bincount(self._place, weights=numbers, minlength=self._count).astype(np.float64, copy=False)


def _codes(frame: pd.DataFrame, names: list[str]) -> tuple[list[tuple[Any, ...]], NDArray[np.int64]]:
    """Return the sorted distinct values of some columns, and for each row the number of its value."""
    if not names:
        return [()], np.zeros(len(frame), np.int64)
    groups = frame.groupby(names, observed=True, dropna=False, sort=True)
    keys = groups.size().index
    tuples = [key if isinstance(key, tuple) else (key,) for key in keys]
    return tuples, groups.ngroup().to_numpy(np.int64)
