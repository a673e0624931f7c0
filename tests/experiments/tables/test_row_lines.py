"""Reading rows as bytes, against a reading that takes whole files apart with the csv module."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experiments.errors import CheckRefusedError
from experiments.tables.csv_file import read_keys, read_rows
from experiments.tables.row_lines import ELSEWHERE, cells_of, encoded, first_cell, row_lines

COLUMNS = ["run_id", "value", "note"]
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
CELL = st.text(st.sampled_from('ab,"\n\r é€\0'), max_size=4)
ROWS = st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5)
DAMAGE = st.lists(
    st.sampled_from([*(bytes([byte]) for byte in b'ab,"\n\r'), b"\n", b"a,b,c\n", b'"', b"\xff", b"\xc3\xa9"]),
    max_size=20,
)


def naively(content: bytes) -> list[list[str]] | None:
    """Return the complete rows as a reader of the whole file finds them; nothing if it refuses the file."""
    end = start = quotes = 0
    while (newline := content.find(b"\n", start)) >= 0:
        quotes += content.count(b'"', start, newline)
        start = newline + 1
        end = end if quotes % 2 else start
    try:
        rows = list(csv.reader(io.StringIO(content[:end].decode(), newline="")))
    except UnicodeDecodeError:
        return None
    if rows and (rows[0] != COLUMNS or any(len(row) != len(COLUMNS) for row in rows)):
        return None
    return rows[1:]


def check_like_naively(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    expected = naively(content)
    if expected is None:
        with pytest.raises(CheckRefusedError, match="0007"):
            list(row_lines(path, COLUMNS))
        return
    found = list(row_lines(path, COLUMNS))
    assert [line for _, line in found] == [encoded([row]) for row in expected]
    assert read_rows(path, COLUMNS) == expected
    assert list(read_keys(path, COLUMNS)) == [row[0] for row in expected]
    for offset, line in found:
        assert offset == ELSEWHERE or content[offset : offset + len(line)] == line


@IN_ONE_FOLDER
@given(rows=ROWS, cut=st.integers(0, 30))
def test_files_of_ours_torn_anywhere_read_as_by_a_whole_reader(tmp_path: Path, rows: list[list[str]], cut: int) -> None:
    content = encoded([COLUMNS, *rows])
    check_like_naively(tmp_path / "0007.csv", content[: max(0, len(content) - cut)])


@IN_ONE_FOLDER
@given(rows=ROWS, damage=DAMAGE, more=ROWS)
@example(rows=[["a", "b", "c"]], damage=[b'a"b,c,d\n'], more=[["a", "b", "c"]])
@example(rows=[], damage=[b'a,"b"c,d\n'], more=[["a", "b", "c"]])
@example(rows=[], damage=[b'a"b,"c\nd,e",f\n'], more=[])
@example(rows=[], damage=[b'a"b,"c,d\n'], more=[["a", "b", "c"]])
@example(rows=[["a", "b", "c"]], damage=[b"\n"], more=[["a", "b", "c"]])
@example(rows=[["a", "b", "c"]], damage=[b"a,b,c\r\n"], more=[["a", "b", "c"]])
def test_damaged_files_are_read_or_refused_as_by_a_whole_reader(
    tmp_path: Path, rows: list[list[str]], damage: list[bytes], more: list[list[str]]
) -> None:
    content = encoded([COLUMNS, *rows]) + b"".join(damage) + encoded(more)
    check_like_naively(tmp_path / "0007.csv", content)


def test_rows_of_ours_stand_where_they_are_said_to(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.csv", [["1", "a", ""], ["2", "x,y", "é"], ["3", 'q"', "\n"], ["4", "", ""]]
    path.write_bytes(encoded([COLUMNS, *rows]))
    offsets = [offset for offset, _ in row_lines(path, COLUMNS)]
    assert offsets == [len(encoded([COLUMNS, *rows[:count]])) for count in range(4)]


def test_rows_that_another_program_wrote_come_as_we_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'run_id,value,note\n1,a,b\n"2","c",""\n3,d,e\n')
    assert list(row_lines(path, COLUMNS)) == [(18, b"1,a,b\n"), (ELSEWHERE, b"2,c,\n"), (ELSEWHERE, b"3,d,e\n")]
    path.write_bytes(b"run_id,value,note\r\n1,a,b\r\n")
    assert list(row_lines(path, COLUMNS)) == [(ELSEWHERE, b"1,a,b\n")]


def test_a_cell_that_is_too_long_to_be_one_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "0007.csv"
    path.write_bytes(b'run_id,value,note\n1,"' + b"x" * 200_000 + b'",c\n')
    with pytest.raises(CheckRefusedError, match=r"0007\.csv: line 2: field larger .* damaged"):
        read_rows(path, COLUMNS)


def test_reading_does_not_begin_before_it_is_asked_for_rows(tmp_path: Path) -> None:
    # Rows are taken one by one: what stands behind them is not looked at.
    path = tmp_path / "a.csv"
    path.write_bytes(encoded([COLUMNS, ["1", "a", "b"]]) + b"damaged\n")
    lines = row_lines(path, COLUMNS)
    assert next(lines) == (18, b"1,a,b\n")
    with pytest.raises(CheckRefusedError, match="line 3 has 1 cells"):
        next(lines)


@given(row=st.lists(CELL.filter(lambda cell: "\r" not in cell), min_size=2, max_size=4))
def test_cells_come_back(row: list[str]) -> None:
    line = encoded([row])
    assert cells_of(line) == row
    assert first_cell(line) == row[0]
