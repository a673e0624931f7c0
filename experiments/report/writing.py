"""Make the report of a campaign and write its two files."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.campaign.folder import CampaignFolder
from experiments.report.embedded import plain_value
from experiments.report.facts.inputs import read_inputs
from experiments.report.facts.summary import summarize
from experiments.report.page import render_page
from experiments.tables.csv_file import write_text
from experiments.tables.schema import cell


@dataclass(frozen=True)
class Written:
    """The two files, and the verdict at the top of the page."""

    page: Path
    table: Path
    verdict: str


def write_report(folder: CampaignFolder) -> Written:
    """Write ``report.html`` and ``summary.csv`` into a campaign's folder, after both have been made.

    Raises:
        UsageError, CheckRefusedError, MissingResourceError: see ``experiments.report.facts.inputs.read_inputs``.
    """
    inputs = read_inputs(folder)
    summary = summarize(inputs)
    page, table = render_page(inputs, summary), csv_text(summary.cells)
    written = Written(folder.file("report.html"), folder.file("summary.csv"), " ".join(summary.verdict))
    write_text(written.table, table)
    write_text(written.page, page)
    return written


def csv_text(table: pd.DataFrame) -> str:
    """Return a table as CSV with the same form of cells as in the other result files."""
    stream = io.StringIO(newline="")
    rows = [[cell(plain_value(value)) for value in row] for row in table.astype(object).to_numpy().tolist()]
    pd.DataFrame(rows, columns=list(table.columns)).to_csv(stream, index=False, lineterminator="\n")
    return stream.getvalue()
