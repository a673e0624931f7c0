"""The style of every figure: fonts, sizes, and colours that also work for colour-blind readers and in grey.

    @styled
    def my_figure(runs: pd.DataFrame) -> Figure:
        figure = new_figure(6.0, 3.5)                  # inches; object-oriented, no pyplot state

The colours are those of Okabe and Ito ("Color Universal Design", 2008). No series depends on its colour alone: each
also has its own marker, line style and hatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

P = ParamSpec("P")

HEAT_COLOURS = "cividis"
"""Colour map of heat maps: perceptually uniform, and monotone in grey."""

STYLE: Mapping[str, Any] = MappingProxyType(
    {
        "font.size": 9.0,
        "axes.titlesize": 9.0,
        "axes.labelsize": 9.0,
        "legend.fontsize": 8.0,
        "xtick.labelsize": 8.0,
        "ytick.labelsize": 8.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#D8D8D8",
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "path",  # the same picture where our font is not installed
        "svg.hashsalt": "experiments.figures",  # identifiers inside the file are the same every time
    }
)


@dataclass(frozen=True)
class SeriesStyle:
    """The look of one series: colour, marker, line style and, for areas, hatch."""

    colour: str
    marker: str
    line: str
    hatch: str


OUTCOME_STYLES: Mapping[str, SeriesStyle] = MappingProxyType(
    {
        "masked": SeriesStyle("#D0D0D0", "o", ":", ""),
        "benign": SeriesStyle("#56B4E9", "s", "-", "\\\\"),
        "critical": SeriesStyle("#D55E00", "^", "--", "///"),
        "nonfinite": SeriesStyle("#000000", "X", "-.", ""),
    }
)
"""The style of each outcome; in grey they also go from light to dark."""

SERIES_STYLES = (
    SeriesStyle("#0072B2", "o", "-", ""),
    SeriesStyle("#E69F00", "s", "--", "///"),
    SeriesStyle("#000000", "^", "-.", "--"),
    SeriesStyle("#CC79A7", "D", ":", "xxx"),
    SeriesStyle("#009E73", "v", (0, (5, 1, 1, 1, 1, 1)), "\\\\\\"),  # type: ignore[arg-type]
    SeriesStyle("#D55E00", "P", (0, (8, 2)), "+++"),  # type: ignore[arg-type]
)
"""For series without a meaning of their own, in this order."""


def style_context() -> AbstractContextManager[None]:
    """Return a context in which matplotlib's settings are ``STYLE``; the old settings return at its end."""
    settings: Any = dict(STYLE)
    return matplotlib.rc_context(settings)


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Return the function so that it draws in ``STYLE``; matplotlib's own settings stay unchanged."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style_context():
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; only the caller holds it."""
    return Figure(figsize=(width, height), layout="constrained")


def percent_axis(axis: Any, top: float = 1.0) -> None:
    """Label an axis of shares in percent, from 0 to a little above ``top``."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0 if top > 0.08 else 1))
    axis.axes.set(**{f"{axis.axis_name}lim": (-0.02 * top, 1.04 * top)})


def legend_above(figure: Figure, handles: Sequence[Any], columns: int = 4) -> None:
    """Put one legend above all axes: there it covers no data."""
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns, handlelength=2.6)


def stacked_bars(axes: Any, widths: np.ndarray, base: np.ndarray, style: SeriesStyle, label: str) -> Any:
    """Draw one part of horizontal bars, as wide as ``widths`` (n,) from ``base`` (n,) on; return its artists."""
    return axes.barh(
        range(len(widths)),
        widths,
        left=base,
        height=0.7,
        facecolor=style.colour,
        hatch=style.hatch,
        edgecolor="#404040",
        linewidth=0.5,
        label=label,
    )


def error_bars(rates: pd.DataFrame, rate: str = "rate", low: str = "low", high: str = "high") -> np.ndarray:
    """Return the distances (2, n) from a rate down to the lower and up to the upper limit of its interval."""
    middle = rates[rate].to_numpy(float)
    below = middle - rates[low].to_numpy(float)
    above = rates[high].to_numpy(float) - middle
    return np.maximum(np.stack([below, above]), 0.0)
