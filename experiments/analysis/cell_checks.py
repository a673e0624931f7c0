"""Refuse cells that no run can have written; the error names the file, the column and the line.

check_cells(table, Path("results/default/runs.csv"), ExperimentResult)
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from experiments.errors import UsageError, nearest
from experiments.tables.column_types import column_types
from experiments.tables.schema import OUTCOMES
from fault_injection.locations import LOCATION_TABLE

VOCABULARIES = MappingProxyType(
    {"outcome": lambda: OUTCOMES, "scope": lambda: ("full", "site"), "location": LOCATION_TABLE.names}
)
"""The texts that each column may hold."""

NEEDED_TEXTS = ("run_id", "model", "fault_id")
"""Text columns that identify rows and may not be empty; other columns that always exist, like ``detectors``, may be."""


def check_cells(table: pa.Table, file: Path, row_type: type[Any]) -> None:
    """Raise ``UsageError`` for a cell that may not be empty, an unknown word, or a wrong weight.

    Args:
        table: the table from the file; the columns that it has are checked.
        file: the file, for the message.
        row_type: the type of the rows.
    """
    types = column_types(row_type)
    for name in table.column_names:
        column, kind = table[name], types[name]
        if not kind.optional and (kind.kind is not str or name in NEEDED_TEXTS or name in VOCABULARIES):
            empty = pc.equal(pc.cast(column, pa.string()), "") if kind.kind is str else pc.is_null(column)
            _refuse(empty, name, file, "got an empty cell, allowed a value in every row")
        if name in VOCABULARIES:
            _check_words(column, name, file)
        if name == "sampling_weight":
            wrong = pc.or_(pc.invert(pc.is_finite(column)), pc.less(column, 0.0))
            _refuse(wrong, name, file, "got {}, allowed numbers from 0 on, or an empty cell in every row", column)


def _check_words(column: pa.ChunkedArray, name: str, file: Path) -> None:
    allowed = VOCABULARIES[name]()
    for word in pc.unique(column).to_pylist():
        if word and word not in allowed:
            said = f"got {word!r}, allowed {', '.join(allowed)}{nearest(word, allowed)}"
            _refuse(pc.equal(column, word), name, file, said)


def _refuse(wrong: pa.ChunkedArray, name: str, file: Path, said: str, column: pa.ChunkedArray | None = None) -> None:
    """Raise for the first row in which ``wrong`` is true; the header is line 1."""
    place = pc.index(pc.fill_null(wrong, False), True).as_py()
    if place >= 0:
        value = "" if column is None else column[place].as_py()
        raise UsageError(f"{file}: column {name!r}, line {place + 2}: {said.format(value)}")
