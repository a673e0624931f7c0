"""Where the time of a run goes: the injected pass, the bounds, the decision and the correction.

overhead_breakdown(runs)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis import overhead
from experiments.figures.drawing.no_data import need_columns
from experiments.figures.drawing.population import ordered, population, short_name
from experiments.figures.drawing.style import SERIES_STYLES, legend_above, new_figure, stacked_bars, styled

_PARTS = {
    "injection": SERIES_STYLES[0],
    "bounds": SERIES_STYLES[1],
    "detection": SERIES_STYLES[4],
    "correction": SERIES_STYLES[3],
}
_ALL = "all runs"


@styled
def overhead_breakdown(runs: pd.DataFrame) -> Figure:
    """Draw the mean milliseconds of each part of a run, over all runs and by location (or model, if several).

    The overhead, (bounds + detection) / injection, is printed at the right with its interval.

    Raises:
        NoDataError: the campaign has no timings.
    """
    need_columns(runs, ("injection_seconds",), "timing")
    table = _table(runs)
    groups = list(dict.fromkeys(table["group"]))[::-1]
    figure = new_figure(7.2, 1.0 + 0.36 * len(groups))
    axes = figure.subplots()
    base, bars = np.zeros(len(groups)), []
    for part, style in _PARTS.items():
        rows = table[table["part"] == part].set_index("group").loc[groups]
        if not rows["n"].any():
            continue
        milliseconds = 1e3 * rows["mean"].fillna(0.0).to_numpy(float)
        bars.append(stacked_bars(axes, milliseconds, base, style, part))
        base = base + milliseconds
    shares = table[table["part"] == "overhead"].set_index("group").loc[groups]
    for place, row in enumerate(shares.itertuples(index=False)):
        text = f"{_percent(row.mean)} ({_percent(row.low)} to {_percent(row.high)})"
        axes.text(base[place] + 0.012 * base.max(), place, text, va="center", fontsize=8)
    counts = table[table["part"] == "injection"].set_index("group")["n"]
    axes.set_yticks(range(len(groups)), [f"{group} (n = {counts[group]:,})" for group in groups])
    axes.set(xlabel="mean time of a run (milliseconds)", xlim=(0.0, 1.35 * base.max() or 1.0))
    axes.tick_params(axis="y", length=0)
    legend_above(figure, bars)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if np.isfinite(share) else "-"


def _table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return ``overhead`` of all runs and of each group, with a column ``group``; all runs come first."""
    every = overhead(runs).assign(group=_ALL)
    models = runs["model"].map(short_name).astype(str) + " " + runs["dtype"].astype(str)
    named = runs.assign(group=models if models.nunique() > 1 else runs["location"].astype(str))
    if named["group"].nunique() < 2:
        return every
    parts = overhead(named, "group")
    order = {name: place for place, name in enumerate(ordered(list(parts["group"])))}
    return pd.concat([every, parts.sort_values("group", key=lambda names: names.map(order), kind="stable")])


def overhead_breakdown_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many runs."""
    counts = runs["execution"].astype(str).value_counts() if "execution" in runs.columns else {}
    executed = ", ".join(f"{count:,} by {name}" for name, count in counts.items())
    return (
        "Mean time of the parts of a run; at the right the overhead of detection, (bounds + detection) / injection, "
        f"with its 95 % interval. All runs count, repeated faults too. {population(runs)}; executed: {executed}."
    )
