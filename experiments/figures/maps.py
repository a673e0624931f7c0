"""Heat maps of harm and of detection: location against bit, layer against head, type of fault against depth.

location_bit_map(runs); layer_head_map(runs); fault_depth_map(runs)
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis import critical_rate, detection_rate
from experiments.figures.drawing.no_data import need_one_setting, need_rows
from experiments.figures.drawing.population import population, propagated, short_name
from experiments.figures.drawing.rate_map import RateMap, cell_size, draw_map
from experiments.figures.drawing.style import new_figure, styled
from experiments.figures.drawing.tensor_format import by_tensor_dtype, mark_fields

_MOST_MODELS = 6
_CELLS = (
    " Cells hold the rate in percent and n where both fit; hatched: no such fault. A cell of few faults says little. "
)


def _population_words(runs: pd.DataFrame) -> str:
    """Return the n of a caption and, if harm is not drawn, the reason."""
    harm = "" if _harm_is_known(runs) else " No run was propagated to the output, so harm is not known."
    return f"{_CELLS}{population(runs)}.{harm}"


def _maps(runs: pd.DataFrame, row: str, column: str, harm: bool) -> list[RateMap]:
    """Return the map of harm (if known) and the map of detection, with the same rows and columns."""
    need_one_setting(runs)
    by = [row, column]
    found = RateMap.of(detection_rate(runs, by), row, column, title="detected")
    if not harm:
        return [found]
    return [
        RateMap.of(critical_rate(runs, by), row, column, title="harmful (critical or not finite)", like=found),
        found,
    ]


def _harm_is_known(runs: pd.DataFrame) -> bool:
    return not propagated(runs).empty


@styled
def location_bit_map(runs: pd.DataFrame) -> Figure:
    """Draw the rates of harm and of detection by location and bit; each dtype of tensors has its own maps.

    Raises:
        NoDataError: no fault has exactly one bit.
    """
    harm = _harm_is_known(runs)
    shown = [
        (dtype, rate_map) for dtype, part in by_tensor_dtype(runs) for rate_map in _maps(part, "location", "bit", harm)
    ]
    rows = [len(rate_map.rates) for _, rate_map in shown]
    bits = max(len(rate_map.rates.columns) for _, rate_map in shown)
    cell = cell_size(max(rows), bits, 8.3, 0.32)
    figure = new_figure(1.5 + max(3.0, bits * cell[0]), 0.3 + sum(0.75 + cell[1] * count for count in rows))
    columns = figure.subplots(len(shown), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (dtype, rate_map) in zip(columns, shown, strict=True):
        draw_map(figure, axes, rate_map, cell, f"{dtype}, ", room=16.0)
        mark_fields(axes, dtype, list(rate_map.rates.columns))
        axes.set(xlabel="bit (0: least significant)", ylabel="location")
    return figure


def location_bit_map_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    other = int(runs["bit"].isna().sum())
    left_out = f" {other:,} runs of several bits or none are not drawn." if other else ""
    return f"Rates of harm and of detection by location and flipped bit.{_population_words(runs)}{left_out}"


@styled
def layer_head_map(runs: pd.DataFrame) -> Figure:
    """Draw the rates of harm and of detection by layer and head, one row of maps for each model.

    Raises:
        NoDataError: no fault has a head.
    """
    known = runs[runs["layer"].notna() & runs["index_head"].notna()]
    need_rows(known, f"none of the {len(runs):,} runs hit an element of one head")
    models = list(known["model"].astype(str).value_counts().index[:_MOST_MODELS])
    whole = known.assign(layer=known["layer"].astype(int), index_head=known["index_head"].astype(int))
    harm = _harm_is_known(known)
    found = [_maps(whole[whole["model"].astype(str) == model], "layer", "index_head", harm) for model in models]
    prefixes = [f"{short_name(model)}: " if len(models) > 1 else "" for model in models]
    return _pairs(found, prefixes, "head", "attention layer")


def _pairs(found: list[list[RateMap]], prefixes: list[str], xlabel: str, ylabel: str) -> Figure:
    """Draw harm on the left and detection on the right, a row of axes for each pair."""
    rows = max(len(rate_map.rates) for pair in found for rate_map in pair)
    columns = max(len(rate_map.rates.columns) for pair in found for rate_map in pair)
    cell = cell_size(rows, columns, 4.0, 0.5)
    wide = len(found[0])
    figure = new_figure(0.4 + wide * (1.2 + max(2.4, cell[0] * columns)), len(found) * (0.9 + max(0.6, cell[1] * rows)))
    grid = figure.subplots(len(found), wide, squeeze=False)
    for line, pair, prefix in zip(grid, found, prefixes, strict=True):
        for axes, rate_map in zip(line, pair, strict=True):
            draw_map(figure, axes, rate_map, cell, prefix)
            axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def layer_head_map_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    models = runs["model"].nunique()
    more = f" {models - _MOST_MODELS} further models are not drawn." if models > _MOST_MODELS else ""
    headless = int(runs["index_head"].isna().sum())
    left_out = f" {headless:,} runs that hit no single head are not drawn." if headless else ""
    return (
        "Rates of harm and of detection by the (first) layer and the head that faults hit; for faults in k and v the "
        f"head is that of keys and values.{_population_words(runs)}{left_out}{more}"
    )


@styled
def fault_depth_map(runs: pd.DataFrame) -> Figure:
    """Draw the rates of harm and of detection by type of fault and by the third of the layers that it hit.

    The type is the location and, if the campaign has several kinds of fault, the kind.

    Raises:
        NoDataError: no run has a depth.
    """
    known = runs[runs["layer_depth"].notna()]
    need_rows(known, f"none of the {len(runs):,} runs says how deep its layer is")
    kinds = known["kind"].astype(str)
    types = known["location"].astype(str) + ("" if kinds.nunique() < 2 else " " + kinds)
    typed = known.assign(fault_type=types, layer_depth=known["layer_depth"].astype(str))
    return _pairs(
        [_maps(typed, "fault_type", "layer_depth", _harm_is_known(typed))], [""], "third of the layers", "fault"
    )


def fault_depth_map_caption(runs: pd.DataFrame) -> str:
    """Return what the figure shows, and of how many faults."""
    return (
        "Rates of harm and of detection by location (and kind, where there are several) and by the third of the "
        f"model's attention layers that faults hit.{_population_words(runs)}"
    )
