"""Are two sets of runs different? The difference of their rates, with limits and a p-value.

    compare(load_runs("results/before"), load_runs("results/after"), "bit_field")

Campaigns that differ in detectors or in the engine alone inject the same faults: where both tables have a fault, it is
compared with itself. What clusters have in common, one input for both, cancels in the difference in any case.

Public names: ``compare``, ``COMPARISON_COLUMNS``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import fisher_exact

from experiments.analysis.clusters import DEFAULT_CLUSTER, ClusterSums, Grouping
from experiments.analysis.distinct import listed, measured, require_columns, sampling_weights
from experiments.analysis.intervals import exact_limits
from experiments.analysis.rates import By, rate_of, table_of
from experiments.analysis.resampling import Limits, bootstrap_limits, ratio_influence

COMPARISON_COLUMNS = (
    *("successes_a", "n_a", "rate_a", "successes_b", "n_b", "rate_b"),
    *("difference", "low", "high", "p_value", "paired", "clusters", "method"),
)

LEAST_SHARED = 0.5
"""Share of the smaller table's faults that must be in the other for a comparison of pairs alone."""


def compare(
    a: pd.DataFrame,
    b: pd.DataFrame,
    by: By = None,
    measure: str = "detected",
    *,
    cluster: Sequence[str] = DEFAULT_CLUSTER,
) -> pd.DataFrame:
    """Return the rate in ``a`` minus the rate in ``b``, for each group.

    Where at least half of the smaller table's faults are in the other one too (by ``fault_id``), only the faults that
    both have count (``paired``). ``low`` and ``high`` are the 95 % limits of the difference, ``p_value`` is that of "no
    difference", both from a bootstrap over clusters.

    Args:
        a: runs.
        b: runs that they are compared with.
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
    sides = [measured(runs, measure) for runs in (a, b)]
    for faults, _ in sides:
        require_columns(faults, [*names, *cluster])
    (faults_a, hits_a), (faults_b, hits_b), paired = _paired(*sides)
    needed = list(dict.fromkeys([*names, *cluster]))
    frame = pd.concat([faults_a[needed].astype(object), faults_b[needed].astype(object)], ignore_index=True)
    hits = np.concatenate([hits_a, hits_b])
    weights = np.concatenate([sampling_weights(faults_a), sampling_weights(faults_b)])
    first = np.arange(len(frame)) < len(faults_a)
    grouping = Grouping(frame, names, cluster)
    both = [(grouping.sums(hits & side, weights * side), grouping.sums(side)) for side in (first, ~first)]
    weighted = bool((weights != 1).any())
    rows = []
    for (key, in_a), (_, of_a), (_, in_b), (_, of_b) in zip(*both[0], *both[1], strict=True):
        rows.append((key, _row(_side(in_a, of_a), _side(in_b, of_b), paired, weighted)))
    types = faults_a.dtypes if len(faults_a) else frame.dtypes
    return table_of(frame.astype({name: types[name] for name in names if types[name] != "category"}), names, rows,
                    COMPARISON_COLUMNS)  # fmt: skip


def _paired(
    a: tuple[pd.DataFrame, NDArray[np.bool_]], b: tuple[pd.DataFrame, NDArray[np.bool_]]
) -> tuple[tuple[pd.DataFrame, NDArray[np.bool_]], tuple[pd.DataFrame, NDArray[np.bool_]], bool]:
    """Return both sides, cut to the faults that both have if these are many, and whether they are."""
    ids_a, ids_b = (faults["fault_id"].astype(object) for faults, _ in (a, b))
    in_b, in_a = ids_a.isin(set(ids_b)).to_numpy(bool), ids_b.isin(set(ids_a)).to_numpy(bool)
    shared = min(int(in_b.sum()), int(in_a.sum()))
    if not shared or shared < LEAST_SHARED * min(len(ids_a), len(ids_b)):
        return a, b, False
    return (a[0][in_b], a[1][in_b]), (b[0][in_a], b[1][in_a]), True


def _side(sums: ClusterSums, counted: ClusterSums) -> ClusterSums:
    """Return the sums of one side; clusters without a run there have weight 0."""
    return ClusterSums(sums.values, sums.weights, counted.hits, sums.squares, sums.hits)


def _row(a: ClusterSums, b: ClusterSums, paired: bool, weighted: bool) -> dict[str, Any]:
    rate_a, rate_b = (rate_of(_present(side), weighted) for side in (a, b))
    difference = rate_a["rate"] - rate_b["rate"]
    influence = ratio_influence(a) - ratio_influence(b)
    if not rate_a["n"] or not rate_b["n"]:
        limits = Limits(math.nan, math.nan, math.nan, "none: no runs on one side")
    elif np.isfinite(influence).all() and (influence != 0).any():
        limits = bootstrap_limits(difference, influence)
    elif paired and difference == 0:
        # Not one cluster in which they differ: at most so many clusters do, in either direction.
        unseen = exact_limits(0.0, a.effective_clusters)[1]
        limits = Limits(-unseen, unseen, 1.0, "Clopper-Pearson over clusters, no difference seen")
    else:
        limits = _worst(rate_a, rate_b, a.effective_clusters, b.effective_clusters)
    return {
        **{f"{name}_a": rate_a[name] for name in ("successes", "n", "rate")},
        **{f"{name}_b": rate_b[name] for name in ("successes", "n", "rate")},
        "difference": difference,
        "low": max(-1.0, limits.low),
        "high": min(1.0, limits.high),
        "p_value": limits.p_value,
        "paired": paired,
        "clusters": len(a.runs),
        "method": limits.method,
    }


def _present(side: ClusterSums) -> ClusterSums:
    held = side.runs > 0
    return ClusterSums(*(column[held] for column in vars(side).values()))


def _worst(rate_a: dict[str, Any], rate_b: dict[str, Any], clusters_a: float, clusters_b: float) -> Limits:
    """Return limits where no cluster differs from the others: those of both rates, put together the wide way.

    The p-value is Fisher's, of as many trials as there are clusters.
    """
    table = [
        [rate * clusters, (1 - rate) * clusters]
        for rate, clusters in ((rate_a["rate"], clusters_a), (rate_b["rate"], clusters_b))
    ]
    counts = [[math.floor(cell) for cell in row] for row in table]
    p_value = float(fisher_exact(counts).pvalue) if rate_a["rate"] != rate_b["rate"] else 1.0
    return Limits(
        rate_a["low"] - rate_b["high"], rate_a["high"] - rate_b["low"], p_value, "limits of both rates together"
    )
