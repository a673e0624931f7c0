"""The shares of the four outcomes, by the tensor that was hit.

outcomes_by_location(runs)
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis import outcome_rates
from experiments.figures.drawing.no_data import need_rows
from experiments.figures.drawing.population import ordered, population, propagated
from experiments.figures.drawing.style import (
    OUTCOME_STYLES,
    legend_above,
    new_figure,
    percent_axis,
    stacked_bars,
    styled,
)
from experiments.tables.schema import OUTCOMES


@styled
def outcomes_by_location(runs: pd.DataFrame) -> Figure:
    """Draw the share of each outcome among propagated faults, a bar for each location.

    Raises:
        NoDataError: no run was propagated.
    """
    need_rows(
        propagated(runs), "no run of this campaign was propagated to the output of the model, so there are no outcomes"
    )
    rates = outcome_rates(runs, "location")
    locations = ordered(list(rates["location"]))[::-1]
    figure = new_figure(7.2, 0.9 + 0.36 * len(locations))
    axes = figure.subplots()
    base = np.zeros(len(locations))
    bars = []
    for outcome in OUTCOMES:
        part = rates[rates["outcome"] == outcome].set_index("location").loc[locations]
        share, style = part["rate"].to_numpy(float), OUTCOME_STYLES[outcome]
        bars.append(stacked_bars(axes, share, base, style, outcome))
        base = base + share
    counts = rates.drop_duplicates("location").set_index("location")["n"]
    axes.set_yticks(range(len(locations)), [f"{name} (n = {counts[name]:,})" for name in locations])
    axes.set_xlabel("share of propagated faults")
    percent_axis(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    legend_above(figure, bars)
    return figure


def outcomes_by_location_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return (
        "Outcomes by location. Masked: the output is bitwise that without the fault; critical: a most likely token or "
        "the loss changes; nonfinite: NaN or infinity in output or loss; benign: anything else. "
        f"{population(runs)}."
    )
