"""A CSV file that one writer appends to, row by row, and that survives being killed at any moment.

    with CsvFile(path, columns) as file:     # a torn last line is cut off first
        file.append(cells)                   # on disk in one write when this returns

Public names: ``CsvFile``, ``read_rows``, ``write_rows``, ``write_text``.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from experiments.errors import CheckRefusedError

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a whole CSV file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return the complete rows of a file; a torn last line is left out.

    Raises:
        CheckRefusedError: another header, or a damaged row that is not the last: the file was not written by this
            version, or not by us.
    """
    if not path.is_file():
        return []
    text = _complete_text(path)
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[list[str]] = []
    for row in reader:
        if not rows and row != list(columns):
            raise CheckRefusedError(
                f"{path}: its columns are not those of this version; use another name or --overwrite"
            )
        if len(row) != len(columns):
            raise CheckRefusedError(
                f"{path}: line {reader.line_num} has {len(row)} cells, expected {len(columns)}; the file is damaged. "
                "Delete that line to have its run repeated"
            )
        rows.append(row)
    return rows[1:]


def _complete_text(path: Path) -> str:
    """Return the text up to the end of the last complete row: the last newline that is not inside a quoted cell."""
    content = path.read_bytes()
    end = start = 0
    quotes = 0
    while (newline := content.find(b"\n", start)) >= 0:
        quotes += content.count(b'"', start, newline)
        start = newline + 1
        if quotes % 2 == 0:
            end = start
    try:
        return content[:end].decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise CheckRefusedError(f"{path}: line {line} is no UTF-8 text; the file is damaged") from error


class CsvFile:
    """Appends rows to one file.

    Args:
        path: created with its header if it does not exist.
        columns: the header.
        keep: rows that stay, when the file is opened; the others (of runs that were not finished) are removed.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep: Iterable[Sequence[str]] | None = None) -> None:
        self.path = path
        present = read_rows(path, columns)
        kept = present if keep is None else [list(row) for row in keep]
        if not path.is_file() or path.stat().st_size != _size(columns, kept):
            if path.is_file() and kept == present:
                logger.warning("%s: its last line was torn and has been cut off", path)
            write_rows(path, columns, kept)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, *rows: Sequence[str]) -> None:
        """Append rows in a single write."""
        if not rows:
            return
        data = _encoded(rows)
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise OSError(f"{self.path}: wrote {written} of {len(data)} bytes; is the disk full?")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> CsvFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _encoded(rows: Iterable[Sequence[str]]) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode("utf-8")


def _size(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> int:
    return len(_encoded([columns, *rows]))
