"""The types of the columns of a result file, from the annotations of its row type.

>>> from experiments.tables.schema import DetectionRow, ExperimentResult
>>> column_types(ExperimentResult)["bit"]
ColumnType(kind=<class 'int'>, optional=True)
>>> arrow_schema(DetectionRow).field("run_id").type             # the same for pyarrow
DataType(string)

Text that always exists may be empty (``detectors``); every other empty cell is a missing value.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any

from experiments.tables.columns import in_use

KINDS = (str, bool, int, float)


@dataclass(frozen=True)
class ColumnType:
    """The type of a column's values, and whether a run may have none."""

    kind: type[Any]
    optional: bool


def column_types(row_type: type[Any]) -> dict[str, ColumnType]:
    """Return the type of every column of a row type, in order.

    >>> from experiments.tables.schema import ExperimentResult
    >>> column_types(ExperimentResult)["detectors"].optional, column_types(ExperimentResult)["outcome"].optional
    (False, True)

    Raises:
        TypeError: a column's type is none of ``KINDS``, alone or with ``None``.
    """
    found = {}
    for name, hint in typing.get_type_hints(in_use(row_type)).items():
        parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        kinds = [part for part in parts if part is not type(None)]
        if len(kinds) != 1 or kinds[0] not in KINDS:
            raise TypeError(f"{row_type.__name__}.{name}: got {hint}, allowed str, bool, int or float, or None beside")
        found[name] = ColumnType(kinds[0], type(None) in parts)
    return found


def arrow_schema(row_type: type[Any]) -> Any:
    """Return the ``pyarrow.Schema`` of a row type: ``string``, ``bool``, ``int64`` and ``double``.

    Text that always exists cannot be null. Any other value can be, because an earlier version may have written the file
    without it.
    """
    import pyarrow

    kinds = {str: pyarrow.string(), bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    return pyarrow.schema(
        pyarrow.field(name, kinds[column.kind], nullable=column.optional or column.kind is not str)
        for name, column in column_types(row_type).items()
    )
