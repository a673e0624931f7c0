"""Are two sets of runs different? The difference of their rates, with limits and a p-value.

    compare(load_runs("results/before"), load_runs("results/after"), "bit_field")

Campaigns that differ only in detectors or in the engine inject the same faults: if both tables have a fault, it is
compared with itself. In any case the common effect of a shared cluster, such as one input for both, cancels in the
difference.

Each side keeps its own limits, from its own clusters and their degrees of freedom. The distances from both rates to
their limits add like standard errors, minus the part that both sides share. So few clusters on one side, or a rate of 0
or 1, widen the limits as they should. The p-value follows from the same limits: it is below 0.05 exactly if they
exclude 0.

Sources: R. G. Newcombe, Statistics in Medicine 17:873, 1998 (two samples), 17:2635 (pairs); G. Y. Zou, A. Donner,
Statistics in Medicine 27:1693, 2008 (any limits, and a correlation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.analysis.rates import By, rate_of, table_of
from experiments.analysis.statistics.cluster_sums import ClusterSums, changes, ratio
from experiments.analysis.statistics.clusters import DEFAULT_CLUSTER, Cluster, Grouping, Ways, cluster_columns, crossed
from experiments.analysis.statistics.distinct import listed, measured, require_columns, sampling_weights
from experiments.analysis.statistics.intervals import CONFIDENCE, clustered_interval, exact_limits, wilson_limits

COMPARISON_COLUMNS = (
    *("successes_a", "n_a", "rate_a", "successes_b", "n_b", "rate_b"),
    *("difference", "low", "high", "p_value", "paired", "clusters", "method"),
)

METHOD = "both rates' limits (MOVER)"

SMALLEST = 1e-12
"""A smaller p-value counts as 0."""

BISECTIONS = 40

Parts = Mapping[Ways, ClusterSums]

LEAST_SHARED = 0.5
"""Only pairs are compared if at least this share of the smaller table's faults is in the other table."""


def compare(
    a: pd.DataFrame,
    b: pd.DataFrame,
    by: By = None,
    measure: str = "detected",
    *,
    cluster: Cluster = DEFAULT_CLUSTER,
) -> pd.DataFrame:
    """Return the rate in ``a`` minus the rate in ``b``, for each group.

    If at least half of the smaller table's faults are in the other table, too (by ``fault_id``), only the shared faults
    count (``paired``). ``low`` and ``high`` are the 95 % limits of the difference; ``p_value`` tests "no difference"
    and follows from the same limits. ``clusters`` is the number of clusters of the side that has fewer.

    Args:
        a: runs.
        b: the runs to compare with.
        by: columns that make groups, or None for one row.
        measure: ``detected`` (of all faults) or ``harmful`` (of those that were propagated).
        cluster: columns that make clusters; a cluster may have runs in both tables.

    Raises:
        UsageError: an unknown column or measure.

    >>> runs = pd.DataFrame({"fault_id": list("abcdefghijklmnop"), "scope": "full", "outcome": "benign", "model": "m",
    ...                      "batch_index": range(16), "layer": 0, "index_head": 0, "violation_detected": True})
    >>> row = compare(runs, runs.assign(violation_detected=[False] * 8 + [True] * 8)).iloc[0]
    >>> float(row.difference), bool(row.paired), int(row.n_a), bool(0 < row.low < 0.5 < row.high)
    (0.5, True, 16, True)
    """
    names = listed(by)
    sides = [measured(runs, measure, names) for runs in (a, b)]
    for faults, _ in sides:
        require_columns(faults, [*names, *cluster_columns(cluster)])
    (faults_a, hits_a), (faults_b, hits_b), paired = _paired(*sides)
    needed = list(dict.fromkeys([*names, *cluster_columns(cluster)]))
    frame = pd.concat([faults_a[needed].astype(object), faults_b[needed].astype(object)], ignore_index=True)
    hits = np.concatenate([hits_a, hits_b])
    weights = np.concatenate([sampling_weights(faults_a), sampling_weights(faults_b)])
    first = np.arange(len(frame)) < len(faults_a)
    grouping = Grouping(frame, names, cluster)
    found = [grouping.parts(hits, weights, counted=side) for side in (first, ~first)]
    weighted = bool((weights != 1).any())
    rows = [(key, _row(in_a, in_b, paired, weighted)) for (key, in_a), (_, in_b) in zip(*found, strict=True)]
    types = faults_a.dtypes if len(faults_a) else frame.dtypes
    return table_of(frame.astype({name: types[name] for name in names if types[name] != "category"}), names, rows,
                    COMPARISON_COLUMNS)  # fmt: skip


def _paired(
    a: tuple[pd.DataFrame, NDArray[np.bool_]], b: tuple[pd.DataFrame, NDArray[np.bool_]]
) -> tuple[tuple[pd.DataFrame, NDArray[np.bool_]], tuple[pd.DataFrame, NDArray[np.bool_]], bool]:
    """Return both sides, and whether they are paired; if many faults are shared, both sides have only these."""
    ids_a, ids_b = (faults["fault_id"].astype(object) for faults, _ in (a, b))
    in_b, in_a = ids_a.isin(set(ids_b)).to_numpy(bool), ids_b.isin(set(ids_a)).to_numpy(bool)
    shared = min(int(in_b.sum()), int(in_a.sum()))
    if not shared or shared < LEAST_SHARED * min(len(ids_a), len(ids_b)):
        return a, b, False
    return (a[0][in_b], a[1][in_b]), (b[0][in_a], b[1][in_a]), True


def _row(a: Parts, b: Parts, paired: bool, weighted: bool) -> dict[str, Any]:
    first, second = crossed(a), crossed(b)
    rate_a, rate_b = (rate_of(side, weighted) for side in (first, second))
    if not rate_a["n"] or not rate_b["n"]:
        low = high = p_value = math.nan
        method = "none: no runs on one side"
    elif paired and all(np.array_equal(a[ways].values, b[ways].values) for ways in a):
        # The sides differ in no cluster: these limits say in how many clusters they may differ, in either direction.
        high = exact_limits(0.0, first.units)[1]
        low, p_value, method = -high, 1.0, "Clopper-Pearson over clusters, no difference seen"
    else:
        sides = _Sides(first, second, weighted, _correlation(a, b, first, second))
        (low, high), p_value, method = sides.limits(CONFIDENCE), sides.p_value(), METHOD
    return {
        **{f"{name}_a": rate_a[name] for name in ("successes", "n", "rate")},
        **{f"{name}_b": rate_b[name] for name in ("successes", "n", "rate")},
        "difference": rate_a["rate"] - rate_b["rate"],
        "low": low,
        "high": high,
        "p_value": p_value,
        "paired": paired,
        "clusters": min(rate_a["clusters"], rate_b["clusters"]),
        "method": method,
    }


class _Sides:
    """Two rates, each with limits of its own, and the correlation of their errors."""

    def __init__(self, a: ClusterSums, b: ClusterSums, weighted: bool, correlation: float) -> None:
        self._sides, self._estimates = (a, b), (ratio(a), ratio(b))
        self._weighted, self._correlation = weighted, correlation
        self._difference = self._estimates[0].value - self._estimates[1].value

    def limits(self, confidence: float) -> tuple[float, float]:
        """Return limits of the difference: each side's distance to its own limits, added like standard errors."""
        a, b = (estimate.value for estimate in self._estimates)
        (low_a, high_a), (low_b, high_b) = (self._own(side, confidence) for side in (0, 1))
        below, above = self._added(a - low_a, high_b - b), self._added(high_a - a, b - low_b)
        return max(-1.0, self._difference - below), min(1.0, self._difference + above)

    def p_value(self) -> float:
        """Return the p-value p: limits of confidence 1 - p just touch 0, so p < 0.05 if the 95 % limits exclude 0."""
        if self._difference == 0:
            return 1.0
        inside, outside = math.log(SMALLEST), 0.0
        middle = math.log(1 - CONFIDENCE)
        for _ in range(BISECTIONS):
            low, high = self.limits(-math.expm1(middle))
            inside, outside = (middle, outside) if low <= 0 <= high else (inside, middle)
            middle = (inside + outside) / 2
        return math.exp(middle)

    def _own(self, side: int, confidence: float) -> tuple[float, float]:
        sums, estimate = self._sides[side], self._estimates[side]
        runs = float(sums.runs.sum())
        if sums.are_singletons and not self._weighted:
            return wilson_limits(estimate.value, runs, confidence)
        return clustered_interval(estimate.value, estimate.variance, estimate.degrees, runs, sums.units, confidence)

    def _added(self, one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 + other**2 - 2 * self._correlation * one * other))


def _correlation(a: Parts, b: Parts, first: ClusterSums, second: ClusterSums) -> float:
    """Return the correlation of both rates' errors, from the clusters that have runs on both sides.

    A positive correlation is corrected for continuity, as Newcombe does for n pairs: it is reduced by
    1 / (2 n sqrt(a (1 - a) b (1 - b))).
    """
    one, other = ratio(first), ratio(second)
    if not (one.variance > 0 and other.variance > 0 and 0 < one.value < 1 and 0 < other.value < 1):
        return 0.0
    error = math.sqrt(one.variance * other.variance)
    # If a way has a single cluster on one side, it contributes nothing to that side's variance.
    several = {way for way, *more in a if not more and min((side[(way,)].runs > 0).sum() for side in (a, b)) > 1}
    shared = sum(
        (-1) ** (len(ways) + 1) * float((changes(a[ways]) * changes(b[ways])).sum())
        for ways in a
        if several >= set(ways)
    )
    runs = math.sqrt(first.effective_runs * second.effective_runs)
    spread = math.sqrt(one.value * (1 - one.value) * other.value * (1 - other.value))
    found = min(1.0, shared / error)
    return max(-1.0, found) if found <= 0 else max(0.0, found - 1 / (2 * runs * spread))
