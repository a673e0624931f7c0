"""Read the tables of campaigns, typed by the schema in ``experiments.tables.schema``.

    runs = load_runs("results/default")                      # or its runs.csv, or a list of either
    runs = load_runs(["results/a", "results/b"], columns=["bit", "outcome"])

Repeated text becomes a category, integers ``Int64``, truth values ``boolean``, other numbers float64. An empty cell
means a missing value, or the empty text in a column that every row has (``detectors``). The column ``campaign`` has the
folder's name. Swept fields without a column of their own are added from ``plan.csv`` under the name of their axis, such
as ``detect.tolerance``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as arrow_csv

from experiments.analysis.axes import axis_columns, typed_axis
from experiments.analysis.cell_checks import check_cells
from experiments.errors import MissingResourceError, UsageError, nearest
from experiments.tables import schema as result
from experiments.tables.column_types import column_types
from experiments.tables.columns import declared
from experiments.tables.schema import CleanRow, DetectionRow, ExperimentResult, PropagationRow

Paths = str | Path | Sequence[str | Path]


def load_runs(path: Paths, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the runs of one or several campaigns.

    Args:
        path: a campaign's folder, its ``runs.csv``, or a list of either.
        columns: the columns to read, for speed; default: all. ``campaign`` and the swept fields without a column are
            always added.

    Raises:
        MissingResourceError: a file does not exist.
        UsageError: a file is empty, truncated or damaged, a column is missing, two files have different schemas, or no
            run can have written some cell; see ``experiments.analysis.cell_checks``.
    """
    names = None if columns is None else list(dict.fromkeys([*columns, "run_id"]))
    files = _files(path, "runs.csv")
    _check_headers(files, ExperimentResult, names)
    frame = _frame([_with_axes(_read(file, campaign, ExperimentResult, names), file) for campaign, file in files])
    known = {*result.columns(ExperimentResult), "campaign"}
    for axis in [name for name in frame.columns if name not in known]:
        frame[axis] = typed_axis(frame[axis])
    return frame if columns is None or "run_id" in columns else frame.drop(columns="run_id")


def load_clean(path: Paths, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the detectors' verdicts on the fault-free passes; arguments and errors as in ``load_runs``."""
    return _load(path, "clean.csv", CleanRow, columns)


def load_detections(path: Paths, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return each detector's verdict on each layer of each run; arguments and errors as in ``load_runs``."""
    return _load(path, "detections.csv", DetectionRow, columns)


def load_propagation(path: Paths, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return how much each block's output moved in each run; a campaign that did not measure this has no rows."""
    return _load(path, "propagation.csv", PropagationRow, columns, optional=True)


def check_table(file: Path, row_type: type[Any]) -> None:
    """Raise ``UsageError`` or ``MissingResourceError`` unless a file is a whole table with the columns of its rows."""
    _check_headers([("", file)], row_type, None)


def _load(
    path: Paths, name: str, row_type: type[Any], columns: Sequence[str] | None, optional: bool = False
) -> pd.DataFrame:
    files = [(campaign, file) for campaign, file in _files(path, name) if not optional or file.is_file()]
    _check_headers(files, row_type, columns)
    tables = [_read(file, campaign, row_type, columns) for campaign, file in files]
    return _frame(tables or [_empty(row_type, columns)], row_type)


def _files(path: Paths, name: str) -> list[tuple[str, Path]]:
    """Return the requested files, each with the name of its campaign."""
    given = [Path(path)] if isinstance(path, (str, Path)) else [Path(one) for one in path]
    if not given:
        raise UsageError("got an empty list of campaigns, allowed one or more folders")
    files = []
    for one in given:
        if not one.exists():
            raise MissingResourceError(f"{one}: no such campaign or file")
        # The user may name a campaign by its main table, even to load another of its tables.
        files.append(one / name if one.is_dir() else one.with_name(name) if one.name == "runs.csv" else one)
    resolved = [file.resolve() for file in files]
    repeated = [str(file) for file, place in zip(files, resolved, strict=True) if resolved.count(place) > 1]
    if repeated:
        raise UsageError(f"{repeated[0]}: given twice; its runs would count double")
    folders = [place.parent.name for place in resolved]
    return [
        (folder if folders.count(folder) == 1 else str(place.parent), file)
        for folder, place, file in zip(folders, resolved, files, strict=True)
    ]


def _check_headers(files: list[tuple[str, Path]], row_type: type[Any], wanted: Sequence[str] | None) -> None:
    """Raise unless every file is whole, all have the same columns, and these include the requested ones."""
    schema = result.columns(row_type)
    for name in wanted or ():
        if name not in schema:
            raise UsageError(f"columns: got {name!r}, allowed {', '.join(schema)}{nearest(name, schema)}")
    headers = {file: _header(file) for _, file in files}
    for file, header in headers.items():
        first, expected = next(iter(headers.items()))
        if wanted is None and header != expected:
            raise UsageError(
                f"two schemas: only {first} has {_only(expected, header)}, only {file} has {_only(header, expected)}; "
                "load them apart, or the columns that both have with columns=[...]"
            )
        for name in schema if wanted is None else wanted:
            if name not in header:
                raise UsageError(
                    f"{file}: column {name!r} is missing{nearest(name, header)}; the file is from another version: "
                    "say with columns=[...] which of its columns to read"
                )


def _only(names: list[str], others: list[str]) -> str:
    return ", ".join(name for name in names if name not in others) or "none or another order"


def _header(file: Path) -> list[str]:
    """Return the columns of a file; raise unless it is there, not empty, and its last line is complete."""
    if not file.is_file():
        raise MissingResourceError(f"{file}: not there; run_sweep.py merge {file.parent} makes it from the shards")
    with file.open("rb") as stream:
        line = stream.readline()
        if not line.strip():
            raise UsageError(f"{file}: is empty, expected a line of column names")
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            raise UsageError(f"{file}: its last line is cut off; run_sweep.py merge {file.parent} makes it again")
    return next(csv.reader([line.decode("utf-8", errors="replace").rstrip("\r\n")]))


def _read(file: Path, campaign: str, row_type: type[Any], wanted: Sequence[str] | None) -> pa.Table:
    options = arrow_csv.ConvertOptions(
        column_types=_arrow_types(row_type), include_columns=list(wanted or ()), null_values=[""],
        true_values=["True"], false_values=["False"], strings_can_be_null=False,
    )  # fmt: skip
    try:
        table = arrow_csv.read_csv(file, convert_options=options)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise UsageError(f"{file}: is damaged: {str(error).splitlines()[0]}") from error
    check_cells(table, file, row_type)
    label = pa.DictionaryArray.from_arrays(np.zeros(len(table), np.int32), pa.array([campaign]))
    return table.append_column("campaign", label)


def _arrow_types(row_type: type[Any]) -> dict[str, pa.DataType]:
    plain = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    repeated = pa.dictionary(pa.int32(), pa.string())
    return {
        name: plain.get(column.kind, pa.string() if name in _unrepeated(row_type) else repeated)
        for name, column in column_types(row_type).items()
    }


def _unrepeated(row_type: type[Any]) -> frozenset[str]:
    """Return the columns of text with about as many values as rows: no categories."""
    return frozenset(field.name for field in declared(row_type) if not field.metadata["repeats"])


def _with_axes(table: pa.Table, file: Path) -> pa.Table:
    for axis, texts in axis_columns(file.with_name("plan.csv"), table["run_id"]).items():
        table = table.append_column(axis, texts)
    return table


def _empty(row_type: type[Any], wanted: Sequence[str] | None) -> pa.Table:
    types = {**_arrow_types(row_type), "campaign": pa.dictionary(pa.int32(), pa.string())}
    names = list(types) if wanted is None else [*wanted, "campaign"]
    return pa.table({name: pa.array([], types[name]) for name in names})


def _frame(tables: list[pa.Table], row_type: type[Any] = ExperimentResult) -> pd.DataFrame:
    """Return the concatenated tables as one frame. It empties the list, so memory never holds everything twice."""
    table = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    tables.clear()
    texts = {name for name, column in column_types(row_type).items() if column.optional and column.kind is str}
    unrepeated = _unrepeated(row_type)
    for place, name in enumerate(table.column_names):
        if name in texts and name in unrepeated:
            table = table.set_column(place, name, pc.if_else(pc.equal(table[name], ""), None, table[name]))
    mapper = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}.get
    series = {}
    for name in table.column_names:
        column = table[name].to_pandas(types_mapper=mapper)
        # pyarrow passes a single chunk on without a copy, and the result would be read-only.
        series[name] = column.copy() if table[name].num_chunks == 1 else column
        table = table.drop_columns([name])
    frame = pd.DataFrame(series, copy=False)
    for name in texts.difference(unrepeated).intersection(frame.columns):
        frame[name] = frame[name].cat.remove_categories([text for text in frame[name].cat.categories if not text])
    return frame
