"""How much a fault in each bit changes: the loss of the model, or the output of its attention layer.

loss_change_by_bit(runs); local_change_by_bit(runs)          # the second for campaigns with run.scope = site
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis import distinct_faults
from experiments.figures.drawing.no_data import need_columns, need_rows
from experiments.figures.drawing.population import population, propagated
from experiments.figures.drawing.quantiles import BARS, draw_quantiles, draw_shares, quantile_table
from experiments.figures.drawing.style import SERIES_STYLES, legend_above, new_figure, styled
from experiments.figures.drawing.tensor_format import by_tensor_dtype, mark_fields

_LOSS = "|change of the loss| (nats)"
_LOCAL = "relative L2 change of the layer's output"


@styled
def loss_change_by_bit(runs: pd.DataFrame) -> Figure:
    """Draw the absolute change of the loss (nats, logarithmic) against the bit.

    Raises:
        NoDataError: no fault of one bit was propagated to a loss.
    """
    return _figure(_loss_changes(runs), _LOSS)


def _loss_changes(runs: pd.DataFrame) -> pd.DataFrame:
    known = propagated(runs)
    need_rows(known, "no run of this campaign was propagated to the output of the model, so no loss is known")
    need_columns(known, ("baseline_loss",), "loss")
    measured = known[known["baseline_loss"].notna()]
    return measured.assign(change=measured["loss_diff"].abs())


def loss_change_by_bit_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return _caption("Absolute change of the loss by flipped bit", _loss_changes(runs), runs)


@styled
def local_change_by_bit(runs: pd.DataFrame) -> Figure:
    """Draw the relative change of the attention layer's output (logarithmic) against the bit.

    Raises:
        NoDataError: no run with scope site has a fault of one bit.
    """
    return _figure(_local_changes(runs), _LOCAL)


def _local_changes(runs: pd.DataFrame) -> pd.DataFrame:
    faults = distinct_faults(runs)
    site = faults[faults["scope"] == "site"]
    need_rows(
        site, "every run was propagated to the output (run.scope = full), so the change of the layer is not measured"
    )
    return site.assign(change=site["local_change"])


def local_change_by_bit_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    what = "L2 change of the output of the attention layer that was hit, relative to its length, by flipped bit"
    return _caption(what, _local_changes(runs), runs)


def _figure(changes: pd.DataFrame, label: str) -> Figure:
    parts = list(by_tensor_dtype(changes))
    figure = new_figure(7.2, 0.7 + 3.6 * len(parts))
    grid = figure.subplots(2 * len(parts), 1, squeeze=False, height_ratios=[3.0, 1.0] * len(parts))[:, 0]
    entries = []
    for upper, lower, (dtype, part) in zip(grid[::2], grid[1::2], parts, strict=True):
        table = quantile_table(part, "change", "bit")
        draw_quantiles(upper, table["bit"], table, SERIES_STYLES[0])
        upper.plot(table["bit"], table["largest"], linestyle="none", marker="_", color="black", markersize=6)
        mark_fields(upper, dtype)
        upper.set(yscale="log" if table["changed"].any() else "linear", ylabel=label)
        upper.tick_params(labelbottom=False)
        upper.grid(axis="y")
        entries = draw_shares(lower, table["bit"], table)
        lower.set(xlabel=f"bit of {dtype} (0: least significant)", ylabel="share", xlim=upper.get_xlim())
        lower.set_xticks(upper.get_xticks())
    figure.align_ylabels()
    legend_above(figure, entries)
    return figure


def _caption(what: str, changes: pd.DataFrame, runs: pd.DataFrame) -> str:
    single = changes[changes["bit"].notna()]
    return (
        f"{what}: {BARS}; dash: largest. Drawn above are the changes that are finite and not 0; the bars below show "
        f"how many are neither. {len(single):,} faults of one bit are drawn; {population(runs)}."
    )
