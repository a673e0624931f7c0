"""How far a fault moves the residual stream after each block, from the block it hit to the last.

    propagation_by_outcome(runs, load_propagation(folder)); propagation_by_location(runs, load_propagation(folder))

Blocks are counted from the one that was hit, not from the first, because faults in different layers reach a given block
after different distances.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis import distinct_faults
from experiments.figures.drawing.no_data import NoDataError
from experiments.figures.drawing.population import ordered, population
from experiments.figures.drawing.quantiles import BARS, draw_quantiles, draw_shares, quantile_table
from experiments.figures.drawing.style import OUTCOME_STYLES, SERIES_STYLES, legend_above, new_figure, styled

_UNKNOWN = "outcome not known"


@styled
def propagation_by_outcome(runs: pd.DataFrame, propagation: pd.DataFrame) -> Figure:
    """Draw the relative change behind each block, for the faults of each outcome.

    Raises:
        NoDataError: the campaign did not measure it.
    """
    return _figure(runs, propagation, "outcome")


@styled
def propagation_by_location(runs: pd.DataFrame, propagation: pd.DataFrame) -> Figure:
    """Draw the relative change behind each block, for the faults of each location.

    Raises:
        NoDataError: the campaign did not measure it.
    """
    return _figure(runs, propagation, "location")


def propagation_quantiles(runs: pd.DataFrame, propagation: pd.DataFrame, by: str) -> pd.DataFrame:
    """Return the quantiles of ``relative_change`` by a column of the runs and by ``distance``.

    ``distance`` counts blocks from the block of the (first) injected layer, which is 0. See ``quantile_table`` for the
    other columns.

    Raises:
        NoDataError: no row of propagation belongs to a run.
    """
    if propagation.empty:
        raise NoDataError("this campaign has no propagation.csv: it did not measure the change behind every block")
    faults = distinct_faults(runs)[["campaign", "run_id", "layer", by]].rename(columns={"layer": "injected"})
    joined = propagation.merge(faults.astype({"campaign": object}), on=["campaign", "run_id"], how="inner")
    if joined.empty:
        raise NoDataError("no row of propagation.csv belongs to a run of this campaign")
    joined["distance"] = joined["layer"].astype(int) - joined["injected"].astype(int)
    joined[by] = joined[by].astype(object).fillna(_UNKNOWN)
    return quantile_table(joined, "relative_change", [by, "distance"])


def _figure(runs: pd.DataFrame, propagation: pd.DataFrame, by: str) -> Figure:
    table = propagation_quantiles(runs, propagation, by)
    groups = ordered(list(table[by]))
    figure = new_figure(max(4.6, 0.8 + 1.9 * len(groups)), 4.2)
    grid = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row", height_ratios=[3.0, 1.0])
    entries = []
    for column, (upper, lower, group) in enumerate(zip(grid[0], grid[1], groups, strict=True)):
        part = table[table[by] == group]
        default = SERIES_STYLES[0]
        draw_quantiles(upper, part["distance"], part, OUTCOME_STYLES.get(group, default), line=True)
        upper.set_title(f"{group}\nn = {int(part['n'].max()):,}", fontsize=8)
        upper.grid(axis="y")
        if not part["changed"].any():
            upper.text(0.5, 0.5, "none is finite\nand not 0", ha="center", va="center", transform=upper.transAxes)
        entries = draw_shares(lower, part["distance"], part)
        if column:
            upper.tick_params(labelleft=False)
            lower.tick_params(labelleft=False)
    last = int(table["distance"].max())
    grid[0, 0].set(
        yscale="log" if table["changed"].any() else "linear", ylabel="relative L2 change of the residual stream"
    )
    grid[0, 0].set_xticks(np.arange(0, last + 1, max(1, -(-(last + 1) // 8))))
    grid[0, 0].set_xlim(-0.7, last + 0.7)
    grid[1, 0].set_ylabel("share")
    figure.supxlabel("blocks behind the one that was hit", fontsize=9)
    figure.align_ylabels()
    legend_above(figure, entries)
    return figure


def propagation_by_outcome_caption(runs: pd.DataFrame, propagation: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return _caption(runs, propagation, "outcome")


def propagation_by_location_caption(runs: pd.DataFrame, propagation: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return _caption(runs, propagation, "location")


def _caption(runs: pd.DataFrame, propagation: pd.DataFrame, by: str) -> str:
    table = propagation_quantiles(runs, propagation, by)
    measured = int(table.groupby(by)["n"].max().sum())
    return (
        f"Relative L2 change of the residual stream behind each block, by {by}: {BARS}. Above: changes that are finite "
        "and not 0; below: how many are neither. Far from the fault n falls, since faults in late layers have few "
        f"blocks behind them. Measured in {measured:,} faults; {population(runs)}."
    )
