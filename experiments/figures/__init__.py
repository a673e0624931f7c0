"""Figures of campaigns: tables in, ``matplotlib.figure.Figure`` out, never pyplot's state.

    from experiments.analysis import load_runs
    from experiments.figures import rates_by_bit, save

    save(rates_by_bit(load_runs("results/default")), "out/rates_by_bit")     # .svg and .png

    python -m experiments.figures results/default                            # all of them, with their captions

Numbers come from ``experiments.analysis``; only quantiles and histograms are taken here, so that a million runs become
as few marks as a thousand. Every figure has a caption with its n, and says why it is not drawn where its data are
missing (``NoDataError``). Values that are NaN or infinite are drawn as what they are.
"""

from typing import TYPE_CHECKING, Any

from experiments.figures.catalogue import FIGURES, FigureEntry, Written, load_tables, write_figures
from experiments.figures.drawing.no_data import NoDataError
from experiments.registry import loaded

if TYPE_CHECKING:
    from experiments.figures.bit_rates import rates_by_bit
    from experiments.figures.change_by_bit import local_change_by_bit, loss_change_by_bit
    from experiments.figures.detectors import detector_recall
    from experiments.figures.drawing.saving import save, svg_text
    from experiments.figures.epsilon_interval import epsilon_bounds
    from experiments.figures.maps import fault_depth_map, layer_head_map, location_bit_map
    from experiments.figures.margins import margin_distribution
    from experiments.figures.outcomes import outcomes_by_location
    from experiments.figures.overhead import overhead_breakdown
    from experiments.figures.propagation import propagation_by_location, propagation_by_outcome

__all__ = [
    "FIGURES",
    "FigureEntry",
    "NoDataError",
    "Written",
    "detector_recall",
    "epsilon_bounds",
    "fault_depth_map",
    "layer_head_map",
    "load_tables",
    "local_change_by_bit",
    "location_bit_map",
    "loss_change_by_bit",
    "margin_distribution",
    "outcomes_by_location",
    "overhead_breakdown",
    "propagation_by_location",
    "propagation_by_outcome",
    "rates_by_bit",
    "save",
    "svg_text",
    "write_figures",
]


def __getattr__(name: str) -> Any:
    """Import a figure, or what saves it, when it is asked for: drawing is slow to load."""
    if name in FIGURES:
        return FIGURES[name].draw
    if name in ("save", "svg_text"):
        return loaded(f"experiments.figures.drawing.saving:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
