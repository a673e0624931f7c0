"""Write a merged table of a campaign as Parquet: typed, compressed, and read column by column.

    export_parquet(Path("results/default/runs.csv"), ExperimentResult, Path("runs.parquet"))     # 768

The file is read and written in pieces, so its size does not matter. The types come from ``experiments.tables.schema``;
numbers keep every bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from experiments.errors import CheckRefusedError
from experiments.tables.column_types import arrow_schema, column_types
from experiments.tables.csv_file import replacing
from experiments.tables.schema import columns

ROWS_IN_GROUP = 1 << 16
"""The number of rows in a row group, the unit that readers skip or load."""

_BLOCK_BYTES = 1 << 23


def export_parquet(source: Path, row_type: type[Any], target: Path) -> int:
    """Write the CSV file ``source`` as the Parquet file ``target``, whole or not at all; return the number of rows.

    Raises:
        CheckRefusedError: the file is cut off, is no text or has other columns, or a cell does not have its column's
            type.
    """
    schema = arrow_schema(row_type)
    try:
        with replacing(target) as stream, pyarrow.parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
            rows = 0
            for group in _groups(_batches(source, row_type), schema):
                writer.write_table(group, row_group_size=ROWS_IN_GROUP)
                rows += group.num_rows
            return rows
    except UnicodeDecodeError as error:
        raise CheckRefusedError(f"{source}: holds bytes that are no UTF-8 text ({error}); merge again") from error
    except pyarrow.ArrowInvalid as error:
        raise CheckRefusedError(
            f"{source}: {' '.join(str(error).split())}; merge again, or see results/README.md for its columns"
        ) from error


def _groups(batches: Iterator[Any], schema: Any) -> Iterator[Any]:
    """Yield the rows of all batches in tables of ``ROWS_IN_GROUP`` rows, the last one smaller."""
    waiting, count = list[Any](), 0
    for batch in batches:
        waiting.append(batch)
        count += batch.num_rows
        if count >= ROWS_IN_GROUP:
            table = pyarrow.Table.from_batches(waiting, schema)
            whole = count - count % ROWS_IN_GROUP
            yield table.slice(0, whole)
            waiting, count = table.slice(whole).to_batches(), count - whole
    if count:
        yield pyarrow.Table.from_batches(waiting, schema)


def _batches(source: Path, row_type: type[Any]) -> Iterator[Any]:
    """Yield the rows of a CSV file in typed batches."""
    schema, types = arrow_schema(row_type), column_types(row_type)
    _check_header(source, row_type)
    convert = pyarrow.csv.ConvertOptions(
        column_types=schema, null_values=[""], true_values=["True"], false_values=["False"],
        strings_can_be_null=True, quoted_strings_can_be_null=True,
    )  # fmt: skip
    reading = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False)
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    with pyarrow.csv.open_csv(source, reading, parsing, convert) as reader:
        for batch in reader:
            columns_of_batch = [
                # The reader treats every empty cell as missing.
                pyarrow.compute.fill_null(column, "")
                if types[name].kind is str and not types[name].optional
                else column
                for name, column in zip(schema.names, batch.columns, strict=True)
            ]
            yield pyarrow.RecordBatch.from_arrays(columns_of_batch, schema=schema)


def _check_header(source: Path, row_type: type[Any]) -> None:
    with source.open("rb") as stream:
        if stream.readline().decode("utf-8").rstrip("\r\n") != ",".join(columns(row_type)):
            raise CheckRefusedError(f"{source}: its columns are not those of this version; merge again")
        # Without its last newline a number may have lost digits, and still be a number.
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            raise CheckRefusedError(f"{source}: its last line is cut off; merge again")
