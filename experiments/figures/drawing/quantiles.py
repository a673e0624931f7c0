"""Compute quantiles of many numbers by group, and draw them: a thin bar, a thick bar, a marker.

    table = quantile_table(runs, "change", "bit")
    draw_quantiles(axes, table["bit"], table, SERIES_STYLES[0], "runs that changed anything")

A logarithmic axis cannot show 0, and no axis can show a number that is not finite. Both are counted in columns of their
own (``draw_shares`` shows them), and never left out silently.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from experiments.figures.drawing.style import SeriesStyle, percent_axis

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BARS = "marker: median; thick bar: 25 to 75 %; thin bar: 5 to 95 %"
"""The meaning of the bars, for captions."""

_NAMES = tuple(f"q{round(100 * level):02d}" for level in LEVELS)
_SHARES = {
    "unchanged": SeriesStyle("#E4E4E4", "", "", ""),
    "changed": SeriesStyle("#56B4E9", "", "", "//"),
    "nonfinite": SeriesStyle("#000000", "", "", ""),
}
_SHARE_NAMES = {"unchanged": "exactly 0", "changed": "changed, finite", "nonfinite": "NaN or infinite"}


def quantile_table(table: pd.DataFrame, column: str, by: str | Sequence[str], *, nonzero: bool = True) -> pd.DataFrame:
    """Return the quantiles of a column by group.

    Args:
        table: every row counts; a missing number counts as not finite.
        column: the numbers.
        by: columns that make groups, which are sorted.
        nonzero: take the quantiles over numbers that are not 0, as for a logarithmic axis.

    Returns:
        The columns of ``by``, ``q05 q25 q50 q75 q95 largest`` (NaN for a group without these numbers), ``n``, and the
        shares ``unchanged`` (exactly 0), ``changed`` (finite) and ``nonfinite``, which sum to 1.
    """
    names = [by] if isinstance(by, str) else list(by)
    values = table[column].to_numpy(np.float64, na_value=np.nan)
    finite, zero = np.isfinite(values), values == 0
    marks = table[names].assign(
        unchanged=zero, changed=finite & ~zero, nonfinite=~finite,
        value=np.where(finite & ~(zero & nonzero), values, np.nan),
    )  # fmt: skip
    groups = marks.groupby(names, observed=True, sort=True)
    found = groups[["unchanged", "changed", "nonfinite"]].mean()
    found.insert(0, "n", groups.size())
    quantiles = groups["value"].quantile(list(LEVELS)).unstack()
    quantiles.columns = list(_NAMES)
    return quantiles.assign(largest=groups["value"].max()).join(found).reset_index()


def draw_quantiles(
    axes: Axes, places: Sequence[float] | np.ndarray, table: pd.DataFrame, style: SeriesStyle, line: bool = False
) -> None:
    """Draw the quantiles of each row of a table at its place on the x axis."""
    x = np.asarray(places, float)
    axes.vlines(x, table["q05"], table["q95"], color=style.colour, linewidth=1.0)
    axes.vlines(x, table["q25"], table["q75"], color=style.colour, linewidth=3.6, alpha=0.55)
    axes.plot(
        x, table["q50"], color=style.colour, marker=style.marker, markersize=4, markeredgecolor="black",
        markeredgewidth=0.5, linestyle=style.line if line else "none", linewidth=1.0, gid="medians",
    )  # fmt: skip


def draw_shares(axes: Axes, places: Sequence[float] | np.ndarray, table: pd.DataFrame) -> list[Artist]:
    """Draw the shares of 0, changed and non-finite numbers as stacked bars; return the entries of a legend."""
    x, base = np.asarray(places, float), np.zeros(len(table))
    for name, style in _SHARES.items():
        height = table[name].to_numpy(float)
        axes.bar(
            x, height, bottom=base, width=0.8, facecolor=style.colour, hatch=style.hatch, edgecolor="#606060",
            linewidth=0.4, label=_SHARE_NAMES[name],
        )  # fmt: skip
        base = base + height
    percent_axis(axes.yaxis)
    axes.set_yticks([0.0, 0.5, 1.0])
    return [
        Patch(facecolor=style.colour, hatch=style.hatch, edgecolor="#606060", linewidth=0.4, label=_SHARE_NAMES[name])
        for name, style in _SHARES.items()
    ]
