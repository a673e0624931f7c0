"""Detectors side by side: the shares of harmful faults and of all faults that each saw, and its false positives.

detector_recall(runs, load_clean(folder))
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from experiments.analysis import detector_comparison
from experiments.figures.drawing.no_data import need_one_setting, need_rows
from experiments.figures.drawing.population import population, propagated
from experiments.figures.drawing.style import (
    OUTCOME_STYLES,
    SERIES_STYLES,
    error_bars,
    legend_above,
    new_figure,
    styled,
)
from experiments.figures.drawing.style import percent_axis as percent

_KINDS = {
    "suite": "suites",
    "proved": "proved",
    "unproved": "without a proof",
    "oracle": "read the fault-free\npass (no detectors)",
}


@styled
def detector_recall(runs: pd.DataFrame, clean: pd.DataFrame, compared: pd.DataFrame | None = None) -> Figure:
    """Draw the recall of harmful faults and the share of all faults that each detector saw, with intervals.

    The false positives are at the right: rows in violation among the rows it checked in fault-free passes.

    Args:
        runs: runs of one setting of the detectors.
        clean: their fault-free passes.
        compared: the ``detector_comparison`` of the two, if the caller has it already.

    Raises:
        NoDataError: no detector took part, or runs differ in a field of ``detect``.
    """
    table = _table(runs, clean, compared)
    places = _places(table)
    figure = new_figure(7.2, 1.0 + 0.2 * (float(places.max()) + 1))
    axes = figure.subplots()
    bars = [_draw(axes, table, places + 0.14, "detected", "of all faults")]
    if _harmful(table):
        bars.insert(0, _draw(axes, table, places - 0.14, "recall_critical", "of harmful faults"))
    axes.set_yticks(places, [str(name) for name in table["detector"]])
    axes.set_ylim(float(places.max()) + 0.7, -0.9)
    percent(axes.xaxis)
    axes.set_xlabel("share that the detector saw")
    axes.grid(axis="x")
    _label(axes, table, places)
    legend_above(figure, bars)
    return figure


def _table(runs: pd.DataFrame, clean: pd.DataFrame, compared: pd.DataFrame | None) -> pd.DataFrame:
    need_one_setting(runs)
    table = detector_comparison(runs, clean) if compared is None else compared
    need_rows(table, "no detector looked in this campaign")
    order = {kind: place for place, kind in enumerate(_KINDS)}
    kinds = table["kind"].astype(str).map(order).fillna(len(order))
    return table.iloc[np.argsort(kinds, kind="stable")].reset_index(drop=True)


def _harmful(table: pd.DataFrame) -> int:
    """Return the number of harmful faults; a detector that applies nowhere has no number."""
    return int(table["harmful_n"].fillna(0).max())


def _places(table: pd.DataFrame) -> np.ndarray:
    """Return the heights of the rows, with a gap between kinds."""
    kinds = table["kind"].astype(str)
    return np.arange(len(table)) + 0.8 * ((kinds != kinds.shift()).cumsum().to_numpy(float) - 1)


def _draw(axes: Axes, table: pd.DataFrame, places: np.ndarray, column: str, label: str) -> ErrorbarContainer:
    style = OUTCOME_STYLES["critical"] if column == "recall_critical" else SERIES_STYLES[0]
    rates = table.rename(columns={f"{column}_low": "lower", f"{column}_high": "upper"})
    return axes.errorbar(
        table[column].to_numpy(float), places, xerr=error_bars(rates, column, "lower", "upper"), label=label,
        fmt=style.marker, color=style.colour, markersize=4.5, linewidth=1.0, capsize=1.5,
        markerfacecolor="white" if column == "recall_critical" else style.colour,
    )  # fmt: skip


def _label(axes: Axes, table: pd.DataFrame, places: np.ndarray) -> None:
    """Write false positives at the right, and the kinds above their rows."""
    end = axes.get_xlim()[1]
    axes.text(end + 0.02, -0.9, "false positives\n/ clean rows", fontsize=7, va="bottom")
    for place, row in zip(places, table.itertuples(index=False), strict=True):
        text = "not applicable" if pd.isna(row.n) else "-"
        if pd.notna(row.clean_rows) and row.clean_rows > 0:
            text = f"{int(row.false_positives):,} / {int(row.clean_rows):,}"
        axes.text(end + 0.02, place, text, fontsize=7, va="center")
    kinds = table["kind"].astype(str)
    for kind, first in zip(kinds, places, strict=True):
        if kind in _KINDS and first == places[(kinds == kind).to_numpy()][0]:
            axes.text(0.01, first - 0.55, _KINDS[kind].replace("\n", " "), fontsize=7, style="italic", va="center")


def detector_recall_caption(runs: pd.DataFrame, clean: pd.DataFrame, compared: pd.DataFrame | None = None) -> str:
    """Return what the figure shows, and of how many faults."""
    table = _table(runs, clean, compared)
    harmful = _harmful(table)
    none = "" if harmful else " None was harmful."
    if propagated(runs).empty:
        none = " No run was propagated to the output, so harm is not known."
    return (
        "Share of faults that each detector saw, with 95 % intervals: of the harmful ones "
        f"(critical or not finite, n = {harmful:,}) and of all. The same faults under every detector. False positives: "
        f"rows in violation in fault-free passes, of the rows checked there. {population(runs)}.{none}"
    )
