"""The table of figures of a campaign: what each is called, what it needs, and where it is made.

    tables = load_tables("results/default")
    for name, entry in FIGURES.items():
        try:
            figure, caption = entry.make(tables)
        except NoDataError as reason:
            print(name, reason)

A figure is a row here and two functions of one file: ``<name>`` draws it, ``<name>_caption`` says in words what it
shows and of how many faults. The report, ``python -m experiments.figures`` and ``--list figures`` read the table.
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
        title: for a heading.
        where: ``module:name`` of the function that draws it from the tables that ``needs`` names, in that order;
            ``NoDataError`` says why it cannot. ``name_caption`` beside it takes the same tables.
        needs: ``runs``, ``clean``, ``propagation``.
        takes: further tables that it makes itself where nobody did before, as keywords.
    """

    title: str
    where: str
    needs: tuple[str, ...] = ("runs",)
    takes: tuple[str, ...] = ()

    @property
    def draw(self) -> Callable[..., Figure]:
        """The function that makes the figure."""
        function: Callable[..., Figure] = loaded(self.where)
        return function

    @property
    def caption(self) -> Callable[..., str]:
        """The function that makes its caption."""
        function: Callable[..., str] = loaded(f"{self.where}_caption")
        return function

    def make(self, tables: Tables) -> tuple[Figure, str]:
        """Return the figure and its caption.

        Raises:
            NoDataError: the data are not in this campaign.
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
    return {name: loaded(load)(path) for name, load in _LOADERS.items()}


def write_figures(tables: Tables, out: Path) -> Iterator[Written]:
    """Write every figure for which there are data below ``out``, one after the other."""
    from experiments.figures.drawing.saving import save

    for name, entry in FIGURES.items():
        try:
            figure, caption = entry.make(tables)
        except NoDataError as reason:
            yield Written(name, entry.title, reason=str(reason))
            continue
        yield Written(name, entry.title, save(figure, out / name), caption)
