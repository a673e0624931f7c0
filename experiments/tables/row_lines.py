r"""Read the rows of a CSV file as bytes, one after the other, without parsing them.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     path = Path(folder) / "rows.csv"
...     _ = path.write_bytes(b"run_id,bit\n686d24c4f44e4f15,30\n0af1b6e2c4d5a798,3\n5c")     # the last row is torn
...     [(offset, first_cell(line), cells_of(line)[1]) for offset, line in row_lines(path, ["run_id", "bit"])]
[(11, '686d24c4f44e4f15', '30'), (31, '0af1b6e2c4d5a798', '3')]

Almost no cell is quoted, and the number of cells in a line without quotes is the number of its commas plus one. Such
lines are checked and passed on as they are. A million rows of 65 cells are read in seconds, with one row in memory.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from experiments.errors import CheckRefusedError

ELSEWHERE = -1
"""The offset of a row that the file has in another form than the one we write."""

_BUFFER_BYTES = 1 << 20


def encoded(rows: Iterable[Sequence[str]]) -> bytes:
    """Return rows as the bytes of a CSV file, each with its newline."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode("utf-8")


def cells_of(line: bytes) -> list[str]:
    """Return the cells of a row from ``row_lines``."""
    text = line.decode("utf-8")
    if '"' not in text:
        return text[:-1].split(",")
    return next(csv.reader(io.StringIO(text, newline="")))


def first_cell(line: bytes) -> str:
    """Return the first cell of a row from ``row_lines``."""
    return cells_of(line)[0] if line.startswith(b'"') else line[: line.index(b",")].decode("utf-8")


def row_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """Yield the complete rows of a file, each with the offset of its first byte, without a torn last line.

    A row in another form than ours (needless quotes, other line ends) is yielded in our form, with the offset
    ``ELSEWHERE``. A file that does not exist has no rows.

    Raises:
        CheckRefusedError: the header is different, or a row before the last is damaged: another version or another
            program wrote the file.
    """
    if not path.is_file():
        return
    header, commas = encoded([columns]), len(columns) - 1
    with path.open("rb", buffering=_BUFFER_BYTES) as stream:
        offset = number = 0
        while line := stream.readline():
            plain = b'"' not in line and b"\r" not in line and line.count(b",") == commas and line.isascii()
            if not (plain and line.endswith(b"\n")):
                line = _whole_record(stream, line)
            if not line:
                return
            if not (plain and number) and not _is_ours(line, columns if number else None, header):
                rest = line + stream.read()
                yield from ((ELSEWHERE, encoded([row])) for row in _careful_rows(path, rest, columns, number))
                return
            if number:
                yield offset, line
            number += 1 if plain else line.count(b"\n")
            offset += len(line)


def _whole_record(stream: BinaryIO, line: bytes) -> bytes:
    """Return a line and the lines after it up to the next newline outside quotes; nothing if no such newline comes."""
    if line.count(b'"') % 2:
        lines, quotes = [line], 1
        while quotes % 2 and lines[-1]:
            lines.append(stream.readline())
            quotes += lines[-1].count(b'"')
        line = b"" if quotes % 2 else b"".join(lines)
    return line if line.endswith(b"\n") else b""


_OUR_CELL = rb'(?:[^",\r\n]*+|"[^",\r\n]*+(?:,|""|\n)(?:[^"\r]|"")*+")'
"""A cell as we write it: in quotes only if it contains a comma, a quote or a line end."""


@functools.cache
def _our_row(cells: int) -> re.Pattern[bytes]:
    return re.compile(rb"(?:%b,){%d}%b\n" % (_OUR_CELL, cells - 1, _OUR_CELL))


def _is_ours(record: bytes, columns: Sequence[str] | None, header: bytes) -> bool:
    """Return whether a record is one row in our form; without ``columns``, whether it is our header."""
    if columns is None:
        return record == header
    try:
        record.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return _our_row(len(columns)).fullmatch(record) is not None


def _careful_rows(path: Path, content: bytes, columns: Sequence[str], lines_before: int) -> Iterator[list[str]]:
    """Yield the rows of (the rest of) a file with rows in another form, or raise an error that says what is wrong."""
    reader = csv.reader(io.StringIO(_complete_text(path, content, lines_before), newline=""))
    header_read = lines_before > 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise CheckRefusedError(
                f"{path}: line {lines_before + reader.line_num}: {error}; the file is damaged"
            ) from error
        if row is None:
            return
        if not header_read and row != list(columns):
            raise CheckRefusedError(
                f"{path}: its columns are not those of this version; use another name or --overwrite"
            )
        if len(row) != len(columns):
            raise CheckRefusedError(
                f"{path}: line {lines_before + reader.line_num} has {len(row)} cells, expected {len(columns)}; the "
                "file is damaged. Delete that line to have its run repeated"
            )
        if header_read:
            yield row
        header_read = True


def _complete_text(path: Path, content: bytes, lines_before: int) -> str:
    """Return the text up to the end of the last complete row: the last newline that is not inside a quoted cell."""
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
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        raise CheckRefusedError(f"{path}: line {line} is no UTF-8 text; the file is damaged") from error
