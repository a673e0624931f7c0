"""Rank the cells of a model, such as heads, and test whether any is more sensitive than the rest.

    ranking = rank_cells(runs)
    ranking.attrs["verdict"]                # "layer 2 index_head 1: harmful in 31.0 % ... against 5.2 % elsewhere ..."

A one-sided Fisher's exact test compares every cell with all others together. Its counts are divided by the design
effect: how much more the clusters of a cell differ than independent runs would. With many cells some look bad by
chance, so the p-values are adjusted by Holm's method: if all cells are alike, the probability that any is called
sensitive is at most 5 %.

Sources: J. N. K. Rao, A. J. Scott, "A simple method for the analysis of clustered binary data", Biometrics 48:577,
1992; S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6:65, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import hypergeom

from experiments.analysis.rates import By, rate_of, table_of
from experiments.analysis.statistics.cluster_sums import ClusterSums, ratio
from experiments.analysis.statistics.clusters import DEFAULT_CLUSTER, Cluster, Grouping, cluster_columns
from experiments.analysis.statistics.distinct import listed, measured, require_columns, weights_of
from experiments.errors import UsageError

RANKING_COLUMNS = ("successes", "n", "rate", "low", "high", "p_value", "p_adjusted", "evidence")

SIGNIFICANCE = 0.05

NAMED = 5
"""The largest number of cells that the verdict names."""


def rank_cells(
    runs: pd.DataFrame,
    by: By = ("layer", "index_head"),
    measure: str = "harmful",
    *,
    cluster: Cluster = DEFAULT_CLUSTER,
) -> pd.DataFrame:
    """Return the cells, most sensitive first.

    ``p_value`` tests "this cell is no more sensitive than the rest"; ``p_adjusted`` is the same after Holm's method,
    and ``evidence`` says whether it is at most 0.05. ``attrs["verdict"]`` is the result in a sentence. Runs that belong
    to several cells (a fault in several heads) are left out; a cell whose runs have no weight has a p-value of 1.

    Args:
        runs: runs of one or several campaigns.
        by: the columns that make cells.
        measure: ``harmful`` or ``detected``.
        cluster: columns that make clusters, or a list of such lists: several ways.

    Raises:
        UsageError: an unknown column or measure, or no column to rank by.
    """
    names = listed(by)
    if not names:
        raise UsageError("by: got no column, allowed one or more that make cells, such as layer and index_head")
    require_columns(runs, [*names, *cluster_columns(cluster)])
    faults, hits = measured(runs, measure, names)
    inside = faults[names].notna().all(axis=1).to_numpy(bool)
    faults, hits = faults[inside], hits[inside]
    weights = weights_of(faults)
    cells = list(Grouping(faults, names, cluster).sums(hits, weights))
    p_values = _against_the_rest([sums for _, sums in cells])
    adjusted = holm(p_values)
    rows = []
    for (key, sums), p_value, p_adjusted in zip(cells, p_values, adjusted, strict=True):
        row = {name: value for name, value in rate_of(sums, weights is not None).items() if name in RANKING_COLUMNS}
        tested = {"p_value": p_value, "p_adjusted": p_adjusted, "evidence": bool(p_adjusted <= SIGNIFICANCE)}
        rows.append((key, {**row, **tested}))
    table = table_of(faults, names, rows, RANKING_COLUMNS)
    order = table.sort_values(["p_value", "rate"], ascending=[True, False], kind="stable").index
    elsewhere = _elsewhere([sums for _, sums in cells])[order]
    table = table.loc[order].reset_index(drop=True)
    table.attrs["verdict"] = _verdict(table, elsewhere, names, measure)
    return table


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values adjusted for their number, in the order given.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p_values, np.float64)
    order = np.argsort(given, kind="stable")
    factors = np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(given[order] * factors))
    return adjusted


def design_effect(cells: Sequence[ClusterSums]) -> float:
    """Return the factor by which clustering increases the variance of a cell's rate, over all cells; at least 1.

    If no cell shows the factor (it has no two clusters, or only rates of 0 and 1), it is the mean size of a cluster, as
    if the runs of a cluster always agreed.
    """
    between = independent = 0.0
    for sums in cells:
        estimate = ratio(sums)
        if math.isfinite(estimate.variance) and 0 < estimate.value < 1:
            runs = sums.effective_runs
            between += estimate.variance * runs**2
            independent += estimate.value * (1 - estimate.value) * runs
    if independent:
        return max(1.0, between / independent)
    clusters = sum(len(sums.runs) for sums in cells)
    return max(1.0, sum(float(sums.runs.sum()) for sums in cells) / clusters) if clusters else 1.0


def _against_the_rest(cells: Sequence[ClusterSums]) -> list[float]:
    """Return, for each cell, the p-value of at least as many hits, given the hits of all cells."""
    effect = design_effect(cells)
    runs = np.array([sums.effective_runs for sums in cells]) / effect
    # A cell without weight has no rate and no runs to test.
    hits = np.array([ratio(sums).value if size else 0.0 for sums, size in zip(cells, runs, strict=True)]) * runs
    p_values = []
    for place in range(len(cells)):
        # Rounded so that the cell looks no worse and the rest no better than they are. A tiny number is added or
        # subtracted, because 3 hits out of 12 may come back as 2.9999.
        inside, size = math.floor(hits[place] + 1e-9), math.floor(runs[place] + 1e-9)
        others, rest = math.ceil(hits.sum() - hits[place] - 1e-9), math.floor(runs.sum() - runs[place] + 1e-9)
        others = min(others, rest)
        p_values.append(float(hypergeom.sf(inside - 1, size + rest, inside + others, size)) if size and rest else 1.0)
    return p_values


def _elsewhere(cells: Sequence[ClusterSums]) -> NDArray[np.float64]:
    """Return, for each cell, the rate in all other cells together, with the same weights."""
    values = np.array([sums.values.sum() for sums in cells])
    weights = np.array([sums.weights.sum() for sums in cells])
    with np.errstate(divide="ignore", invalid="ignore"):
        return (values.sum() - values) / (weights.sum() - weights)


def _verdict(table: pd.DataFrame, elsewhere: NDArray[np.float64], names: list[str], measure: str) -> str:
    if len(table) < 2:
        return "fewer than two cells: nothing to compare"
    found = table[table["evidence"].to_numpy(bool)]
    if found.empty:
        smallest = float(table["p_adjusted"].min())
        return f"no evidence that cells differ ({len(table)} cells, smallest adjusted p-value {smallest:.2g})"
    named = [_sentence(row, elsewhere[place], names, measure) for place, row in found.head(NAMED).iterrows()]
    more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    return "; ".join([*named, *more])


def _sentence(row: Any, elsewhere: float, names: list[str], measure: str) -> str:
    cell = " ".join(f"{name} {row[name]}" for name in names)
    return (
        f"{cell}: {measure} in {100 * row['rate']:.1f} % ({100 * row['low']:.1f} - {100 * row['high']:.1f}) against "
        f"{100 * elsewhere:.1f} % elsewhere (adjusted p-value {row['p_adjusted']:.2g})"
    )
