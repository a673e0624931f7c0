"""The tables of the page, made from the tables of the summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from experiments.report.facts.cells import (
    DASH,
    NOTHING,
    Cell,
    Column,
    Table,
    count_cell,
    is_missing,
    number_cell,
    rate_cell,
    text_cell,
)
from experiments.report.facts.grouping import MEASURES
from experiments.report.facts.head_ranking import KEY_VALUE_HEADS
from experiments.report.facts.inputs import ReportInputs
from experiments.report.facts.stopped import CellEnds
from experiments.report.facts.summary import MOST_POINTS, Summary

MOST_ROWS = 300
"""The largest number of rows of a table in the page; the JSON block and ``summary.csv`` have all rows."""

_MEANINGS = {
    "detected": "faults that at least one proved detector saw",
    "masked": "the output is bitwise equal",
    "benign": "the output differs, no most likely token and no loss to speak of",
    "critical": "a most likely token or the loss changed",
    "nonfinite": "NaN or Inf in the output or the loss",
    "harmful": "critical or nonfinite",
    "harmful_detected": "harmful faults that at least one proved detector saw",
}
_HEADINGS = {"harmful_detected": "detected of harmful"}

_WORST_HEADINGS = {
    "run_id": "run",
    "index_head": "head",
    "index_row": "row",
    "index_col": "column",
    "detectors": "proved detectors that saw it",
}
_UNSHOWN = ("bits_before", "bits_after", "violation_detected")

_KINDS = {"proved": "proved", "unproved": "no theorem", "oracle": "oracle", "suite": "suite"}


def page_tables(inputs: ReportInputs, summary: Summary) -> dict[str, Table]:
    """Return the tables of the page by name."""
    tables = [
        _points(summary),
        _rates(
            "outcomes", "What the faults did and who saw them, by location and bit field", summary.outcomes,
            _pooled_note(summary.ends),
        ),
        _rates(
            "cells", "Every cell of the grid", summary.cells,
            _pooled_note(summary.ends) if summary.by_location else _cells_note(summary.ends),
        ),
        _detectors(summary.detectors, inputs),
        *_rankings(summary.ranking),
        _worst(summary.worst),
        _seconds(summary.seconds),
        _plain("execution", "Who computed the runs", summary.execution, {"runs"}),
        _plain("failures", "Runs that raised", inputs.failures),
    ]  # fmt: skip
    if inputs.stops is not None:
        tables.append(_plain("stops", "Cells of the grid that ended early", inputs.stops))
    return {table.name: table for table in tables}


def _pooled_note(ends: CellEnds | None) -> str:
    if ends is None:
        return ""
    return "Cells count by their numbers of runs, which differ; no interval here is adjusted for stopping early."


def _cells_note(ends: CellEnds | None) -> str:
    if ends is None:
        return ""
    return (
        f"The cells of stops.csv have their numbers in the column {ends.rate}: of all runs up to the last look, equal "
        "faults included, with limits of the confidence sequence, which allow for stopping early. The intervals of the "
        "other columns are not adjusted for it."
    )


def _rates(name: str, caption: str, table: pd.DataFrame, note: str = "") -> Table:
    labels = list(table.columns[: list(table.columns).index("runs")])
    columns = [
        *(Column(label.replace("_", " ")) for label in labels),
        Column("runs", True, "runs, faults that were drawn twice included"),
        *(Column(_HEADINGS.get(measure, measure), True, _MEANINGS[measure]) for measure in MEASURES),
    ]

    def rows() -> Iterator[tuple[Cell, ...]]:
        for row in table.head(MOST_ROWS).to_dict("records"):
            cells = [_label(row[label]) for label in labels]
            yield (*cells, count_cell(row["runs"]), *(_measure(row, measure) for measure in MEASURES))

    return Table(name, caption, tuple(columns), tuple(rows()), " ".join(filter(None, [note, _cut(table)])))


def _measure(row: Mapping[Any, Any], measure: str) -> Cell:
    return rate_cell(row[measure], *(row[f"{measure}_{part}"] for part in ("n", "rate", "low", "high")))


def _label(value: Any) -> Cell:
    """Return a cell of a swept value; numbers are sorted as numbers."""
    cell = text_cell(value)
    try:
        return Cell(cell.text, float(value))
    except (TypeError, ValueError):
        return cell


def _points(summary: Summary) -> Table:
    table = _rates("points", "All faults together", summary.points, _pooled_note(summary.ends))
    columns = (*table.columns, Column("false positives", True, "rows of fault-free passes in violation"))
    rows = (
        (*cells, Cell(f"{row['false_positives']:,}", float(row["false_positives"]), f"of {row['clean_rows']:,} rows"))
        for cells, row in zip(table.rows, summary.points.head(MOST_ROWS).to_dict("records"), strict=True)
    )
    return Table(table.name, table.caption, columns, tuple(rows), table.note)


def _detectors(table: pd.DataFrame, inputs: ReportInputs) -> Table:
    labels = list(table.columns[: list(table.columns).index("detector")])
    columns = (
        *(Column(label) for label in labels),
        Column("detector"),
        Column("kind", meaning="proved: a theorem rules out its false positives; oracle: reads the fault-free pass"),
        Column("detected", True, "distinct faults it saw"),
        Column("of harmful", True, "critical or nonfinite faults it saw"),
        Column("of effective", True, "faults that changed a bit pattern, and that it saw"),
        Column("only it", True, "harmful faults that no other detector saw, oracles apart"),
        Column("union", True, "share of the harmful faults seen by any detector down to this row, oracles apart"),
        Column("false positives", True, "rows of fault-free passes in violation, of those it checked"),
    )
    rows = tuple(
        (*(text_cell(row[label]) for label in labels), *_detector_cells(row)) for row in table.to_dict("records")
    )
    several = len(table[labels].drop_duplicates()) if labels else 1
    note = f"The first {MOST_POINTS} points of {', '.join(labels)}." if several == MOST_POINTS else ""
    return Table("detectors", "The same faults under every detector", columns, rows, note)


def _detector_cells(row: Mapping[Any, Any]) -> Iterator[Cell]:
    yield text_cell(row["detector"])
    yield text_cell(_KINDS.get(row["kind"], row["kind"]))
    yield _share_cell(row, "detected", row["seen"], row["n"])
    yield _share_cell(row, "recall_critical", row["seen_harmful"], row["harmful_n"])
    yield _share_cell(row, "recall_effective", row["seen_effective"], row["effective_n"])
    yield count_cell(row["exclusive"])
    yield Cell(NOTHING) if is_missing(row["union"]) else Cell(f"{100 * row['union']:.1f} %", row["union"])
    false = count_cell(row["false_positives"])
    yield Cell(false.text, false.key, "" if false.key is None else f"of {count_cell(row['clean_rows']).text} rows")


def _share_cell(row: Mapping[Any, Any], measure: str, seen: Any, n: Any) -> Cell:
    share, low, high = row[measure], row[f"{measure}_low"], row[f"{measure}_high"]
    return Cell(NOTHING) if is_missing(share) else rate_cell(seen, n, share, low, high)


def _rankings(table: pd.DataFrame) -> Iterator[Table]:
    parts = [table[table["heads"] == heads] for heads in table["heads"].drop_duplicates()] or [table]
    for name, part in zip(("ranking", "ranking_of_keys"), parts, strict=False):
        yield _ranking(name, part)


def _ranking(name: str, table: pd.DataFrame) -> Table:
    models = ["model"] if "model" in table.columns else []
    keys = " (faults in k and v)" if (table["heads"] == KEY_VALUE_HEADS).any() else ""
    heads = f", {table['heads'].iloc[0]}{keys}" if len(table) else ""
    columns = (
        *map(Column, models), Column("layer", True), Column("head", True),
        Column("harmful", True, "critical or nonfinite faults"),
        Column("p", True, "of no difference from the rest"), Column("p adjusted", True, "by Holm, over all cells"),
        Column("evidence"),
    )  # fmt: skip
    rows = tuple(
        (
            *(text_cell(row[model]) for model in models), count_cell(row["layer"]), count_cell(row["index_head"]),
            rate_cell(row["successes"], row["n"], row["rate"], row["low"], row["high"]),
            number_cell(row["p_value"]), number_cell(row["p_adjusted"]), Cell("yes" if row["evidence"] else "no"),
        )
        for row in table.head(MOST_ROWS).to_dict("records")
    )  # fmt: skip
    return Table(name, f"Layers and heads by harm{heads}", columns, rows, _cut(table))


def _worst(table: pd.DataFrame) -> Table:
    whole = {"layer", "index_head", "index_row", "index_col"}
    sizes = {"value_before", "value_after", "loss_diff", "relative_change", "local_change"}
    shown = [name for name in table.columns if name not in _UNSHOWN and not table[name].isna().all()]
    columns = tuple(Column(_WORST_HEADINGS.get(name, name.replace("_", " ")), name in whole | sizes) for name in shown)

    def cell(name: str, row: Mapping[Any, Any]) -> Cell:
        value = row[name]
        if name == "value_after" and value != value and isinstance(row["bits_after"], str):
            # The table does not distinguish NaN from a missing value; but a value with a bit pattern exists.
            return Cell("nan")
        if name in sizes:
            return number_cell(value)
        if name in whole:
            return count_cell(value)
        if name == "detectors":
            return Cell(value.replace(";", ", ") if isinstance(value, str) and value else "none")
        return text_cell(value)

    rows = tuple(tuple(cell(name, row) for name in shown) for row in table.to_dict("records"))
    return Table("worst", "The worst runs of distinct faults", columns, rows)


def _seconds(table: pd.DataFrame) -> Table:
    columns = (
        Column("part"),
        Column("runs", True),
        Column("mean", True),
        Column("95 % interval of the mean"),
        Column("median", True),
    )
    rows = tuple(
        (
            text_cell("overhead: (bounds + detection) / injection" if row["part"] == "overhead" else row["part"]),
            count_cell(row["n"]), *_time_cells(row),
        )
        for row in table.to_dict("records")
        if row["n"]
    )  # fmt: skip
    return Table("seconds", "Time of a run by part", columns, rows)


def _time_cells(row: Mapping[Any, Any]) -> tuple[Cell, Cell, Cell]:
    scale, unit = (100.0, "%") if row["part"] == "overhead" else (1e3, "ms")
    mean, low, high, median = (
        NOTHING if is_missing(row[name]) else f"{scale * row[name]:.3g}" for name in ("mean", "low", "high", "median")
    )
    return (
        Cell(f"{mean} {unit}", row["mean"]),
        Cell(f"{low}{DASH}{high} {unit}"),
        Cell(f"{median} {unit}", row["median"]),
    )


def _plain(name: str, caption: str, table: pd.DataFrame, numeric: Iterable[str] = ()) -> Table:
    columns = tuple(Column(str(column).replace("_", " "), column in numeric) for column in table.columns)
    rows = tuple(
        tuple(
            number_cell(value, 4) if column in numeric and not isinstance(value, int) else
            count_cell(value) if column in numeric else text_cell(value)
            for column, value in row.items()
        )
        for row in table.head(MOST_ROWS).to_dict("records")
    )  # fmt: skip
    return Table(name, caption, columns, rows, _cut(table))


def _cut(table: pd.DataFrame) -> str:
    return f"The first {MOST_ROWS} of {len(table):,} rows." if len(table) > MOST_ROWS else ""
