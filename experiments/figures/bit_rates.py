"""How often faults in each bit are detected, and how often they do harm.

rates_by_bit(load_runs("results/default"))
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from experiments.analysis import critical_rate, detection_rate
from experiments.figures.drawing.no_data import need_one_setting
from experiments.figures.drawing.population import population, propagated
from experiments.figures.drawing.style import (
    OUTCOME_STYLES,
    SERIES_STYLES,
    error_bars,
    legend_above,
    new_figure,
    percent_axis,
    styled,
)
from experiments.figures.drawing.tensor_format import by_tensor_dtype, mark_fields

_DETECTED, _HARMFUL = SERIES_STYLES[0], OUTCOME_STYLES["critical"]


@styled
def rates_by_bit(runs: pd.DataFrame) -> Figure:
    """Draw the shares of detected and of harmful faults, with their intervals, against the bit.

    Each dtype of tensors has its own axes.

    Raises:
        NoDataError: no fault has exactly one bit.
    """
    need_one_setting(runs)
    parts = list(by_tensor_dtype(runs))
    figure = new_figure(7.2, 0.8 + 2.6 * len(parts))
    handles: list[ErrorbarContainer] = []
    for axes, (dtype, part) in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts, strict=True):
        mark_fields(axes, dtype)
        handles = [_draw(axes, detection_rate(part, "bit"), "detected", -0.16)]
        if len(propagated(part)):
            handles.append(_draw(axes, critical_rate(part, "bit"), "harmful (critical or not finite)", 0.16))
        percent_axis(axes.yaxis)
        axes.grid(axis="y")
        axes.set(xlabel=f"bit of {dtype} (0: least significant)", ylabel="share of faults")
    legend_above(figure, handles)
    return figure


def _draw(axes: Axes, rates: pd.DataFrame, name: str, shift: float) -> ErrorbarContainer:
    style = _DETECTED if name == "detected" else _HARMFUL
    return axes.errorbar(
        rates["bit"].to_numpy(float) + shift, rates["rate"], yerr=error_bars(rates), label=name, color=style.colour,
        fmt=style.marker, markersize=4.5, markerfacecolor=style.colour if name == "detected" else "white",
        linewidth=1.0, capsize=1.5,
    )  # fmt: skip


def rates_by_bit_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    single = int(runs["bit"].notna().sum())
    other = "" if single == len(runs) else f" {len(runs) - single:,} runs of several bits or none are not drawn."
    site = "" if len(propagated(runs)) else " No run was propagated to the output, so harm is not known."
    return (
        "Share of faults that a proved detector saw, and share that did harm (a critical or non-finite outcome), by "
        f"flipped bit, with 95 % intervals; bands mark the fields of the number. {population(runs)}.{other}{site}"
    )
