"""Draw every figure of the catalogue for which a campaign has data.

drawn, left_out = draw_gallery(inputs, summarize(inputs))
left_out                          # [("Propagation through depth", "this campaign has no propagation.csv"), ...]

A figure is inline SVG. A figure of very many marks is a PNG as a data address if that is shorter. Identifiers inside an
SVG are prefixed with the figure's name, so that two figures in one page cannot use each other's clipping paths.
Identifiers without references are removed, and so is everything that points outside the page (document type,
namespaces, metadata), which HTML does not need.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.figures import FIGURES, FigureEntry, NoDataError, svg_text
from experiments.figures.drawing.style import style_context
from experiments.report.facts.followed import followed
from experiments.report.facts.inputs import ReportInputs
from experiments.report.facts.summary import Summary

CSS_DPI = 96  # pixels per inch in a browser
PNG_DPI = 144

LONG_SVG = 250_000
"""Longer markup is compared with a PNG. Shorter is not, because drawing a figure twice takes twice as long."""


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


def figure_markup(figure: Figure, name: str, title: str) -> Markup:
    """Return a figure as HTML.

    Args:
        figure: the figure, which stays unchanged.
        name: an identifier that no other figure of the page has.
        title: the text for screen readers.
    """
    svg = _svg(figure, name)
    png = _png(figure) if len(svg) > LONG_SVG else None
    if png is None or len(svg) <= len(png):
        return Markup('<div class="drawing" role="img" aria-label="{}">{}</div>').format(title, Markup(svg))
    width, height = (round(CSS_DPI * inches) for inches in figure.get_size_inches())
    image = Markup('<img class="drawing" alt="{}" width="{}" height="{}" src="data:image/png;base64,{}">')
    return image.format(title, width, height, png)


def _svg(figure: Figure, name: str) -> str:
    text = svg_text(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text, count=3)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = text.replace('xlink:href="#', f'xlink:href="#{name}-').replace("url(#", f"url(#{name}-")
    return text.replace(" xlink:href=", " href=").strip()


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    with style_context():
        figure.savefig(stream, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return base64.b64encode(stream.getvalue()).decode("ascii")
