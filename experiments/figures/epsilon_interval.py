"""Epsilon and its bounds: the values by layer, and the position of epsilon between its bounds.

epsilon_bounds(runs)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.analysis import distinct_faults
from experiments.figures.drawing.no_data import need_columns
from experiments.figures.drawing.population import population
from experiments.figures.drawing.quantiles import BARS, draw_quantiles, quantile_table
from experiments.figures.drawing.style import SERIES_STYLES, legend_above, new_figure, percent_axis, styled

_COLUMNS = ("epsilon_lower", "epsilon", "epsilon_upper")
_NAMES = {"epsilon_lower": "lower bound", "epsilon": "epsilon", "epsilon_upper": "upper bound"}
_STYLES = dict(zip(_COLUMNS, (SERIES_STYLES[4], SERIES_STYLES[2], SERIES_STYLES[1]), strict=True))
_BINS = 20


@styled
def epsilon_bounds(runs: pd.DataFrame) -> Figure:
    """Draw epsilon and its bounds by injected layer, and the place of epsilon between its bounds.

    Raises:
        NoDataError: no run has epsilon with its bounds.
    """
    need_columns(runs, _COLUMNS, "epsilon with its bounds")
    faults = distinct_faults(runs)
    figure = new_figure(9.0, 3.4)
    left, right = figure.subplots(1, 2)
    _draw_layers(left, faults)
    _draw_places(right, faults)
    styles = [(_NAMES[name], _STYLES[name]) for name in _COLUMNS]
    legend_above(
        figure,
        [Line2D([], [], color=style.colour, marker=style.marker, linewidth=3, label=name) for name, style in styles],
    )
    return figure


def _draw_layers(axes: Axes, faults: pd.DataFrame) -> None:
    tables = {name: quantile_table(faults, name, "layer", nonzero=False) for name in _COLUMNS}
    layers = tables["epsilon"]["layer"].to_numpy(float)
    places = np.arange(len(layers))
    for shift, (name, table) in zip((-0.22, 0.0, 0.22), tables.items(), strict=True):
        draw_quantiles(axes, places + shift, table, _STYLES[name])
    drawn = np.concatenate([table[["q05", "q50", "q95"]].to_numpy(float).ravel() for table in tables.values()])
    typical = float(np.nanmedian(np.abs(drawn), keepdims=False)) if np.isfinite(drawn).any() else 1.0
    if typical > 0 and np.nanmax(np.abs(drawn), initial=0.0) > 50 * typical:
        axes.set_yscale("symlog", linthresh=typical)
    step = max(1, -(-len(layers) // 16))
    axes.set_xticks(places[::step], [f"{layer:.0f}" for layer in layers[::step]])
    axes.set(xlabel="injected attention layer", ylabel="epsilon (units of q·k)", xlim=(-0.6, len(layers) - 0.4))
    axes.grid(axis="y")


def _draw_places(axes: Axes, faults: pd.DataFrame) -> None:
    shares = place_shares(faults)
    inside = shares.iloc[1:-2].to_numpy(float)
    centres = (np.arange(_BINS) + 0.5) / _BINS
    axes.bar(centres, inside, width=1 / _BINS, facecolor=_STYLES["epsilon"].colour, alpha=0.55, edgecolor="white")
    apart = {"below": -0.22, "above": 1.22, "not finite": 1.42}
    for name, place in apart.items():
        axes.bar(place, shares[name], width=0.1, facecolor="#D55E00", hatch="///", edgecolor="black", linewidth=0.6)
        axes.annotate(
            f"{100 * shares[name]:.1f} %", (place, shares[name]), xytext=(0, 2), textcoords="offset points",
            ha="center", fontsize=7,
        )  # fmt: skip
    axes.set_xticks([apart["below"], 0.0, 1.0, apart["above"], apart["not finite"]],
                    ["below", "lower\nbound", "upper\nbound", "above", "not\nfinite"])  # fmt: skip
    axes.set(xlabel="place of epsilon between its bounds", ylabel="share of faults")
    percent_axis(axes.yaxis, float(shares.max()) * 1.08)
    axes.grid(axis="y")


def place_shares(faults: pd.DataFrame) -> pd.Series:
    """Return the share of faults below the lower bound, in each twentieth between the bounds, above, and not finite.

    Missing numbers count as not finite: a row of attention with a NaN has no epsilon.
    """
    lower, epsilon, upper = (faults[name].to_numpy(np.float64, na_value=np.nan) for name in _COLUMNS)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        width = upper - lower
        place = np.where(width > 0, (epsilon - lower) / width, 0.5)
    finite = np.isfinite(lower) & np.isfinite(epsilon) & np.isfinite(upper)
    below, above = finite & (epsilon < lower), finite & (epsilon > upper)
    within = np.clip(place[finite & ~below & ~above], 0.0, 1.0)
    counts = np.histogram(within, bins=_BINS, range=(0.0, 1.0))[0]
    names = ["below", *(f"{i / _BINS:g}" for i in range(_BINS)), "above", "not finite"]
    return pd.Series([below.sum(), *counts, above.sum(), (~finite).sum()], names) / len(faults)


def epsilon_bounds_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return (
        "Epsilon (s@w) of the row of attention that comes closest to its bounds, or leaves them farthest, in the first "
        f"injected layer; bounds include their tolerance. Left: by layer, {BARS}. Right: where epsilon lies between "
        f"its bounds; outside, and not finite, in bars of their own. {population(runs)}."
    )
