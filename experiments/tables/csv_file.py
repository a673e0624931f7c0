"""A CSV file to which one writer appends rows, and which stays valid if the writer is killed at any moment.

>>> import tempfile
>>> folder = tempfile.TemporaryDirectory()
>>> path = Path(folder.name) / "rows.csv"
>>> for row in (["1", "a"], ["2", "b, c"]):
...     with CsvFile(path, ["run_id", "text"]) as file:     # a torn last line is cut off first
...         file.append(row)                                # passed to the system in one write
>>> read_rows(path, ["run_id", "text"])
[['1', 'a'], ['2', 'b, c']]
>>> folder.cleanup()

A killed process loses no row that it appended. To survive a loss of power, files are synced to disk when they are
closed or put in place, but not after each row. A loss of power then costs the last rows, and their runs are done again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import uuid
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from experiments.tables.row_lines import ELSEWHERE, cells_of, encoded, first_cell, row_lines

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears whole under its name when the block ends, and not at all if the block raises.

    Args:
        path: the file; its folder is made if it does not exist.
        sync: sync it to disk first, so that no loss of power leaves an empty file under the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a file so that it appears whole or not at all."""
    with replacing(path, sync=sync) as stream:
        stream.write(text.encode("utf-8"))


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a whole CSV file so that it appears whole or not at all."""
    with replacing(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        text.detach()


def write_lines(path: Path, columns: Sequence[str], lines: Iterable[bytes]) -> None:
    """Write a whole CSV file, as ``write_rows`` does, from bytes that are one or several rows with their newlines."""
    with replacing(path) as stream:
        stream.write(encoded([columns]))
        stream.writelines(lines)


def read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return the complete rows of a file, without a torn last line.

    Raises:
        CheckRefusedError: the header is different, or a row before the last is damaged: another version or another
            program wrote the file.
    """
    return [cells_of(line) for _, line in row_lines(path, columns)]


def read_keys(path: Path, columns: Sequence[str]) -> Iterator[str]:
    """Yield the first cell of each complete row; raises like ``read_rows``."""
    return (first_cell(line) for _, line in row_lines(path, columns))


class CsvFile:
    """Appends rows to one file.

    Args:
        path: created with its header if it does not exist.
        columns: the header.
        keep: when the file is opened, only rows whose first cell is in here stay; the others (of unfinished runs) are
            removed. By default all rows stay.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep: Container[str] | None = None) -> None:
        self.path = path
        end, ours, dropped = len(encoded([columns])), True, False
        for offset, line in row_lines(path, columns):
            ours = ours and offset != ELSEWHERE
            dropped = dropped or (keep is not None and first_cell(line) not in keep)
            end += len(line)
        present = path.is_file()
        if not present or dropped or not ours or path.stat().st_size != end:
            if present and not dropped:
                logger.warning("%s: its last line was torn and has been cut off", path)
            lines = (line for _, line in row_lines(path, columns) if keep is None or first_cell(line) in keep)
            write_lines(path, columns, lines)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, *rows: Sequence[str]) -> None:
        """Append rows in a single write."""
        if not rows:
            return
        data = encoded(rows)
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise OSError(f"{self.path}: wrote {written} of {len(data)} bytes; is the disk full?")

    def close(self) -> None:
        """Sync the file to disk and close it."""
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> CsvFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
