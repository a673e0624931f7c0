"""The table of figures of a campaign: the title of each, the tables it needs, and the function that draws it.

    tables = load_tables("results/default")
    for name, entry in FIGURES.items():
        try:
            figure, caption = entry.make(tables)
        except NoDataError as reason:
            print(name, reason)

A figure is a row here and two functions of one file: ``<name>`` draws it, and ``<name>_caption`` describes it in words
with its number of faults. The report, ``python -m experiments.figures`` and ``--list figures`` read the table.
pandas and matplotlib are imported when a figure is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figures.drawing.no_data import NoDataError, need_rows
from experiments.registry import Registry, loaded

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    Tables = Mapping[str, pd.DataFrame]

_LOADERS = {
    "runs": "experiments.analysis:load_runs",
    "clean": "experiments.analysis:load_clean",
    "propagation": "experiments.analysis:load_propagation",
}


@dataclass(frozen=True)
class FigureEntry:
    """One figure of the catalogue.

    Attributes:
        title: its heading.
        where: ``module:name`` of the function that draws it from the tables in ``needs``, in that order; it raises
            ``NoDataError`` if it cannot. ``name_caption`` in the same module takes the same tables.
        needs: some of ``runs``, ``clean``, ``propagation``.
        takes: further tables, as keywords; the function makes them itself if the caller does not have them.
    """

    title: str
    where: str
    needs: tuple[str, ...] = ("runs",)
    takes: tuple[str, ...] = ()

    @property
    def draw(self) -> Callable[..., Figure]:
        """Return the function that draws the figure."""
        function: Callable[..., Figure] = loaded(self.where)
        return function

    @property
    def caption(self) -> Callable[..., str]:
        """Return the function that makes its caption."""
        function: Callable[..., str] = loaded(f"{self.where}_caption")
        return function

    def make(self, tables: Tables) -> tuple[Figure, str]:
        """Return the figure and its caption.

        Raises:
            NoDataError: this campaign does not have the data.
        """
        need_rows(tables["runs"], "this campaign has no finished run")
        arguments = [tables[name] for name in self.needs]
        made = {name: tables[name] for name in self.takes if name in tables}
        return self.draw(*arguments, **made), self.caption(*arguments, **made)


def _figure(title: str, where: str, needs: tuple[str, ...] = ("runs",), takes: tuple[str, ...] = ()) -> FigureEntry:
    return FigureEntry(title, f"experiments.figures.{where}", needs, takes)


FIGURES: Registry[FigureEntry] = Registry(
    "figure",
    {
        "outcomes_by_location": _figure("Outcomes by location", "outcomes:outcomes_by_location"),
        "rates_by_bit": _figure("Detection and harm by bit", "bit_rates:rates_by_bit"),
        "location_bit_map": _figure("Harm and detection by location and bit", "maps:location_bit_map"),
        "layer_head_map": _figure("Harm and detection by layer and head", "maps:layer_head_map"),
        "fault_depth_map": _figure("Harm and detection by type of fault and depth", "maps:fault_depth_map"),
        "detector_recall": _figure("Detectors compared", "detectors:detector_recall", ("runs", "clean"), ("compared",)),
        "loss_change_by_bit": _figure("Change of the loss by bit", "change_by_bit:loss_change_by_bit"),
        "local_change_by_bit": _figure("Change of the attention output by bit", "change_by_bit:local_change_by_bit"),
        "epsilon_bounds": _figure("Epsilon and its bounds", "epsilon_interval:epsilon_bounds"),
        "margin_distribution": _figure("Distance of epsilon from its bounds", "margins:margin_distribution"),
        "propagation_by_outcome": _figure(
            "Propagation through depth, by outcome", "propagation:propagation_by_outcome", ("runs", "propagation")
        ),
        "propagation_by_location": _figure(
            "Propagation through depth, by location", "propagation:propagation_by_location", ("runs", "propagation")
        ),
        "overhead_breakdown": _figure("Where the time goes", "overhead:overhead_breakdown"),
    },
)
"""The figures by name, in the order of the report; files have the same names."""


@dataclass(frozen=True)
class Written:
    """The result for one figure: its files and caption, or the reason why it was not drawn."""

    name: str
    title: str
    files: tuple[Path, ...] = ()
    caption: str = ""
    reason: str = ""


def load_tables(path: str | Path | Sequence[str | Path]) -> dict[str, pd.DataFrame]:
    """Return the tables of one or several campaigns that figures need."""
    return {name: loaded(load)(path) for name, load in _LOADERS.items()}


def write_figures(tables: Tables, out: Path) -> Iterator[Written]:
    """Write every figure that has data to the folder ``out``, one after the other; yield the result of each."""
    from experiments.figures.drawing.saving import save

    for name, entry in FIGURES.items():
        try:
            figure, caption = entry.make(tables)
        except NoDataError as reason:
            yield Written(name, entry.title, reason=str(reason))
            continue
        yield Written(name, entry.title, save(figure, out / name), caption)
