"""All figures of a campaign: what each is called, what it needs, and how it is made.

    tables = load_tables("results/default")
    for name, entry in FIGURES.items():
        try:
            figure, caption = entry.make(tables)
        except NoDataError as reason:
            print(name, reason)

Public names: ``FIGURES``, ``FigureEntry``, ``load_tables``, ``write_figures``, ``Written``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from matplotlib.figure import Figure

from experiments.analysis import load_clean, load_propagation, load_runs
from experiments.figures import (
    bit_rates,
    change_by_bit,
    detectors,
    epsilon_interval,
    maps,
    margins,
    outcomes,
    overhead,
    propagation,
)
from experiments.figures.drawing.no_data import NoDataError, need_rows
from experiments.figures.drawing.saving import save

Tables = Mapping[str, pd.DataFrame]

_LOADERS: Mapping[str, Callable[..., pd.DataFrame]] = MappingProxyType(
    {"runs": load_runs, "clean": load_clean, "propagation": load_propagation}
)


@dataclass(frozen=True)
class FigureEntry:
    """One figure of the catalogue.

    Attributes:
        title: for a heading.
        draw: makes the figure from the tables that ``needs`` names, in that order; ``NoDataError`` says why it cannot.
        caption: says in words what it shows and of how many faults; takes the same tables.
        needs: ``runs``, ``clean``, ``propagation``.
        takes: further tables that it makes itself where nobody did before, as keywords.
    """

    title: str
    draw: Callable[..., Figure]
    caption: Callable[..., str]
    needs: tuple[str, ...] = ("runs",)
    takes: tuple[str, ...] = ()

    def make(self, tables: Tables) -> tuple[Figure, str]:
        """Return the figure and its caption.

        Raises:
            NoDataError: the data are not in this campaign.
        """
        need_rows(tables["runs"], "this campaign has no finished run")
        arguments = [tables[name] for name in self.needs]
        made = {name: tables[name] for name in self.takes if name in tables}
        return self.draw(*arguments, **made), self.caption(*arguments, **made)


FIGURES: Mapping[str, FigureEntry] = MappingProxyType(
    {
        "outcomes_by_location": FigureEntry(
            "Outcomes by location", outcomes.outcomes_by_location, outcomes.outcomes_by_location_caption
        ),
        "rates_by_bit": FigureEntry(
            "Detection and harm by bit", bit_rates.rates_by_bit, bit_rates.rates_by_bit_caption
        ),
        "location_bit_map": FigureEntry(
            "Harm and detection by location and bit", maps.location_bit_map, maps.location_bit_map_caption
        ),
        "layer_head_map": FigureEntry(
            "Harm and detection by layer and head", maps.layer_head_map, maps.layer_head_map_caption
        ),
        "fault_depth_map": FigureEntry(
            "Harm and detection by type of fault and depth", maps.fault_depth_map, maps.fault_depth_map_caption
        ),
        "detector_recall": FigureEntry(
            "Detectors compared",
            detectors.detector_recall,
            detectors.detector_recall_caption,
            ("runs", "clean"),
            ("compared",),
        ),
        "loss_change_by_bit": FigureEntry(
            "Change of the loss by bit", change_by_bit.loss_change_by_bit, change_by_bit.loss_change_by_bit_caption
        ),
        "local_change_by_bit": FigureEntry(
            "Change of the attention output by bit",
            change_by_bit.local_change_by_bit,
            change_by_bit.local_change_by_bit_caption,
        ),
        "epsilon_bounds": FigureEntry(
            "Epsilon and its bounds", epsilon_interval.epsilon_bounds, epsilon_interval.epsilon_bounds_caption
        ),
        "margin_distribution": FigureEntry(
            "Distance of epsilon from its bounds", margins.margin_distribution, margins.margin_distribution_caption
        ),
        "propagation_by_outcome": FigureEntry(
            "Propagation through depth, by outcome",
            propagation.propagation_by_outcome,
            propagation.propagation_by_outcome_caption,
            ("runs", "propagation"),
        ),
        "propagation_by_location": FigureEntry(
            "Propagation through depth, by location",
            propagation.propagation_by_location,
            propagation.propagation_by_location_caption,
            ("runs", "propagation"),
        ),
        "overhead_breakdown": FigureEntry(
            "Where the time goes", overhead.overhead_breakdown, overhead.overhead_breakdown_caption
        ),
    }
)
"""By name, in the order in which a report shows them; the name is also that of the files."""


@dataclass(frozen=True)
class Written:
    """What became of one figure: its files and caption, or the reason why there is none."""

    name: str
    title: str
    files: tuple[Path, ...] = ()
    caption: str = ""
    reason: str = ""


def load_tables(path: str | Path | Sequence[str | Path]) -> dict[str, pd.DataFrame]:
    """Return the tables that figures are made of, from one campaign or several."""
    return {name: load(path) for name, load in _LOADERS.items()}


def write_figures(tables: Tables, out: Path) -> Iterator[Written]:
    """Write every figure for which there are data below ``out``, one after the other."""
    for name, entry in FIGURES.items():
        try:
            figure, caption = entry.make(tables)
        except NoDataError as reason:
            yield Written(name, entry.title, reason=str(reason))
            continue
        yield Written(name, entry.title, save(figure, out / name), caption)
