"""The effect of a stopping rule (``stop.margin``) on the tables of a campaign.

    ends = cell_ends(inputs)                    # None for a campaign without a stopping rule
    ends.unneeded                               # planned runs that no cell needs any more
    with_ends(grid, ends)                       # the cells, with the limits that allow for stopping

An ordinary interval is valid for a number of runs chosen beforehand. If a cell ends when its interval is narrow, the
interval misses the true rate more often; the limits of ``stops.csv`` do not (``experiments.plan.stopping``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from experiments.errors import CheckRefusedError
from experiments.report.facts.grouping import MEASURES, Groups
from experiments.report.facts.inputs import ReportInputs
from experiments.tables.schema import StopRow, columns

NOT_ADJUSTED = "not adjusted for stopping"

Key = tuple[str, ...]


@dataclass(frozen=True)
class CellEnds:
    """How the cells of a campaign with a stopping rule ended.

    Attributes:
        rate: the rate that the rule checks, one of ``experiments.report.facts.grouping.MEASURES``.
        margin: a cell ends when half the width of its interval is at most this.
        rows: the rows of ``stops.csv`` by the values of the axes, with numbers as numbers; empty without that file.
        unneeded: planned runs without a row in cells that ended.
        fewest, most: runs of a cell.
    """

    rate: str
    margin: float
    rows: Mapping[Key, Mapping[str, Any]]
    unneeded: int
    fewest: int
    most: int


def cell_ends(inputs: ReportInputs) -> CellEnds | None:
    """Return how the cells ended; ``None`` for a campaign without a stopping rule.

    Raises:
        CheckRefusedError: a damaged ``stops.csv``.
    """
    margin = inputs.settings.get("stop.margin")
    if margin is None:
        return None
    rows = {} if inputs.stops is None else _rows(inputs, inputs.stops)
    groups = Groups.by(inputs.plan)
    planned = groups.codes.value_counts().reindex(groups.labels.index, fill_value=0)
    done = groups.codes.iloc[inputs.places].value_counts().reindex(groups.labels.index, fill_value=0)
    stopped = [rows.get(key, {}).get("stopped", False) for key in _keys(groups.labels)]
    return CellEnds(
        rate=str(inputs.settings.get("stop.rate", "harmful")),
        margin=float(margin),
        rows=rows,
        unneeded=int((planned - done)[stopped].sum()),
        fewest=int(done.min()),
        most=int(done.max()),
    )


def with_ends(cells: pd.DataFrame, ends: CellEnds | None, axes: list[str]) -> pd.DataFrame:
    """Return the cells of the grid with the numbers of ``stops.csv`` for the rate of the stopping rule.

    Count, n, rate and limits of that rate are replaced together: the rule counts every run, and so do its limits. The
    methods of all other intervals say that they are not adjusted.

    Args:
        cells: the result of ``wide_rates`` for the cells of the grid.
        ends: how they ended; ``None`` changes nothing.
        axes: the columns that make the cells.
    """
    if ends is None:
        return cells
    table = not_adjusted(cells, ends)
    rows = [ends.rows.get(key) for key in _keys(cells[axes])]
    known = [row is not None and row["looks"] > 0 for row in rows]
    if not any(known):
        return table
    found = pd.DataFrame([row for row, is_known in zip(rows, known, strict=True) if is_known], index=table.index[known])
    parts = {"": "successes", "_n": "runs", "_rate": "estimate", "_low": "low", "_high": "high", "_method": "method"}
    for part, name in parts.items():
        column = f"{ends.rate}{part}"
        table[column] = found[name].reindex(table.index).where(known, table[column]).astype(table[column].dtype)
    return table


def not_adjusted(table: pd.DataFrame, ends: CellEnds | None) -> pd.DataFrame:
    """Return a table of ``wide_rates``; with a stopping rule, its methods say that the limits are not adjusted."""
    if ends is None:
        return table
    methods = [f"{measure}_method" for measure in MEASURES]
    said = {name: table[name].astype(object).map(lambda text: f"{text}, {NOT_ADJUSTED}", "ignore") for name in methods}
    return table.assign(**said)


def _rows(inputs: ReportInputs, stops: pd.DataFrame) -> dict[Key, dict[str, Any]]:
    path, axes, expected = inputs.folder.file("stops.csv"), list(inputs.axes), columns(StopRow)
    missing = [name for name in (*axes, *expected) if name not in stops.columns]
    if missing:
        raise CheckRefusedError(f"{path}: column {missing[0]!r} is missing; run_sweep.py merge makes the file again")
    numbers = ["runs", "successes", "estimate", "low", "high", "looks"]
    try:
        typed = stops[expected].assign(**{name: pd.to_numeric(stops[name].replace("", None)) for name in numbers})
    except (ValueError, TypeError) as error:
        raise CheckRefusedError(f"{path}: is damaged: {error}") from error
    typed["stopped"] = typed["stopped"] == "True"
    return dict(zip(_keys(stops[axes]), typed.to_dict("records"), strict=True))


def _keys(labels: pd.DataFrame) -> list[Key]:
    return [tuple(map(str, row)) for row in labels.to_numpy(object).tolist()]
