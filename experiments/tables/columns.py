"""Declare columns, and make, name and write rows from their declarations.

A row type is a frozen dataclass. Its fields are the columns of a file, in order, each declared once by ``column``: the
meaning, the unit, and where the value comes from. Name and type are those of the field.

>>> from types import SimpleNamespace
>>> @dataclasses.dataclass(frozen=True, kw_only=True)
... class FaultRow:
...     layer: int | None = column("first injected layer", "fault.layer")
>>> columns(FaultRow), cells(row_of(FaultRow, SimpleNamespace(fault=SimpleNamespace(layer=3))))
(['layer'], ['3'])
>>> cells(row_of(FaultRow, SimpleNamespace(fault=None)))
['']
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

Row = TypeVar("Row")

_WIDER: dict[type[Any], type[Any]] = {}


def column(
    meaning: str,
    source: str = "",
    *,
    unit: str = "",
    timing: bool = False,
    reproducible: bool = True,
    repeats: bool = True,
    report: bool = False,
) -> Any:
    """Declare a column of a row type.

    Args:
        meaning: its meaning, in one line.
        source: where ``row_of`` finds the value: an attribute of the facts of a row, or a path of attributes joined
            by dots. If an attribute on the path is ``None``, so is the value. Default: the name of the column.
        unit: the unit of its numbers.
        timing: whether it measures the execution.
        reproducible: whether it is the same in every execution.
        repeats: whether many rows have the same value; texts that do are categories in analysis.
        report: whether it also stands in the report's table of the worst runs.
    """
    metadata = {
        "meaning": meaning,
        "source": source,
        "unit": unit,
        "timing": timing,
        "reproducible": reproducible and not timing,
        "repeats": repeats,
        "report": report,
    }
    return dataclasses.field(default=None, metadata=metadata)


def declared(row_type: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    """Return the declarations of the columns of a row type, in order."""
    return dataclasses.fields(in_use(row_type))


def columns(row_type: type[Any]) -> list[str]:
    """Return the column names of a row type, in order."""
    return [field.name for field in declared(row_type)]


def row_of(row_type: type[Row], facts: object) -> Row:
    """Return the row of these facts; the declaration of each column says where its value is.

    Raises:
        AttributeError: the facts have no such attribute.
    """
    wider: Any = in_use(row_type)
    # Many columns share the way to their last attribute; it is walked once.
    owners: dict[str, Any] = {"": facts}
    values = {}
    for name, way, last in _paths(wider):
        if way not in owners:
            owners[way] = _at(facts, way)
        owner = owners[way]
        values[name] = None if owner is None else getattr(owner, last)
    return cast(Row, wider(**values))


@functools.cache
def _paths(row_type: type[Any]) -> tuple[tuple[str, str, str], ...]:
    """Return by column the way to the last attribute of its source, and that attribute."""
    sources = {field.name: field.metadata["source"] or field.name for field in dataclasses.fields(row_type)}
    return tuple((name, source.rpartition(".")[0], source.rpartition(".")[2]) for name, source in sources.items())


def _at(facts: Any, way: str) -> Any:
    for name in way.split("."):
        if facts is None:
            return None
        facts = getattr(facts, name)
    return facts


def cell(value: Any) -> str:
    """Return the text of one cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        # NumPy's floats are floats, but their repr differs.
        return repr(float(value))
    text = str(value)
    return re.sub(r"\s*[\r\n]+\s*", " ", text) if "\n" in text or "\r" in text else text


def cells(row: Any) -> list[str]:
    """Return the cells of a row in the order of ``columns``."""
    # A dataclass sets its fields in their order.
    return [cell(value) for value in vars(row).values()]


def in_use(row_type: type[Any]) -> type[Any]:
    """Return the row type in use for another: the wider type in a block of ``widened``, otherwise itself."""
    return _WIDER.get(row_type, row_type)


@contextmanager
def widened(row_type: type[Any], wider: type[Any]) -> Iterator[None]:
    """Use a subclass with more columns for a row type in all tables, until the block ends.

    Raises:
        ValueError: ``wider`` is not a subclass of ``row_type``.
    """
    if not issubclass(wider, row_type):
        raise ValueError(f"{wider.__name__}: allowed only a subclass of {row_type.__name__}")
    _WIDER[row_type] = wider
    try:
        yield
    finally:
        del _WIDER[row_type]
