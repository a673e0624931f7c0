"""Draw every figure of the catalogue for which a campaign has data.

drawn, left_out = draw_gallery(inputs, summarize(inputs))
left_out                          # [("Propagation through depth", "this campaign has no propagation.csv"), ...]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup

from experiments.figures import FIGURES, FigureEntry, NoDataError
from experiments.report.drawings import figure_markup
from experiments.report.facts.followed import followed
from experiments.report.facts.inputs import ReportInputs
from experiments.report.facts.summary import Summary


@dataclass(frozen=True)
class Drawing:
    """A figure in the page."""

    name: str
    title: str
    caption: str
    markup: Markup


def draw_gallery(inputs: ReportInputs, summary: Summary) -> tuple[list[Drawing], list[tuple[str, str]]]:
    """Return the drawings of the chosen runs, and (title, reason) of each figure without data."""
    propagation, step = followed(inputs.folder, summary.chosen)
    tables = {
        "runs": _slim(summary.chosen),
        "clean": summary.clean,
        "propagation": propagation,
        "compared": summary.compared,
    }
    drawn: list[Drawing] = []
    left_out: list[tuple[str, str]] = []
    for name, entry in FIGURES.items():
        try:
            note = f" Of every {step}th run of the table." if step > 1 and "propagation" in entry.needs else ""
            drawn.append(_drawing(name, entry, tables, note))
        except NoDataError as reason:
            left_out.append((entry.title, str(reason)))
    return drawn, left_out


def _slim(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with faults as numbers: every figure drops duplicates, which is slow with texts."""
    numbers = {"run_id": np.arange(len(runs)), "fault_id": pd.factorize(runs["fault_id"])[0]}
    return runs.drop(columns="bits_after").assign(**numbers)


def _drawing(name: str, entry: FigureEntry, tables: dict[str, pd.DataFrame], note: str) -> Drawing:
    figure, caption = entry.make(tables)
    return Drawing(name, entry.title, caption + note, figure_markup(figure, name, entry.title))
