from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.errors import CheckRefusedError
from experiments.tables import row_places
from experiments.tables.csv_file import write_rows
from experiments.tables.row_lines import ELSEWHERE, row_lines
from experiments.tables.row_places import RowPlaces

COLUMNS = ["run_id", "value"]


def noted(*paths: Path) -> RowPlaces:
    """Note the rows of files in which a run's id is its number."""
    places = RowPlaces()
    for path in paths:
        places.begin_file(path)
        for offset, line in row_lines(path, COLUMNS):
            places.add(int(line.split(b",")[0]), offset, line)
    return places


@pytest.mark.parametrize("block", [1, 10, 1 << 20])
def test_rows_come_by_run_and_those_of_one_run_as_they_were_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(row_places, "BLOCK_BYTES", block)
    write_rows(tmp_path / "a", COLUMNS, [["5", "a"], ["2", "b"], ["2", "c"], ["5", "d"]])
    write_rows(tmp_path / "b", COLUMNS, [["3", "e"], ["0", "f"], ["2", "g"]])
    blocks = list(noted(tmp_path / "a", tmp_path / "b").in_order())
    assert b"".join(blocks) == b"0,f\n2,b\n2,c\n2,g\n3,e\n5,a\n5,d\n"
    assert len(blocks) > 1 if block < 1 << 20 else len(blocks) == 1


def test_no_rows_are_nothing() -> None:
    assert list(RowPlaces().in_order()) == []


def test_neighbours_of_one_run_are_one_stretch_and_are_read_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", COLUMNS, [["1", "a"], ["1", "b"], ["2", "c"], ["1", "d"]])
    places = RowPlaces()
    places.begin_file(tmp_path / "a")
    stretches = [
        places.add(int(line.split(b",")[0]), offset, line) for offset, line in row_lines(tmp_path / "a", COLUMNS)
    ]
    assert stretches == [0, 0, 1, 2]
    assert [places.rows(stretch) for stretch in (0, 1, 2)] == [b"1,a\n1,b\n", b"2,c\n", b"1,d\n"]


def test_rows_that_are_written_otherwise_in_their_file_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'run_id,value\n4,a\n"1","b"\n')
    found = list(row_lines(tmp_path / "a", COLUMNS))
    assert [offset for offset, _ in found] == [13, ELSEWHERE]
    assert b"".join(noted(tmp_path / "a").in_order()) == b"1,b\n4,a\n"


def test_a_file_that_was_replaced_meanwhile_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "0003.csv"
    write_rows(path, COLUMNS, [["1", "a"], ["2", "b"]])
    places = noted(path)
    before = path.stat().st_ino
    write_rows(path, COLUMNS, [["2", "b"]])
    assert path.stat().st_ino != before
    with pytest.raises(CheckRefusedError, match=r"0003\.csv: was replaced while it was read"):
        list(places.in_order())


def test_a_file_that_has_grown_meanwhile_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "0003.csv"
    write_rows(path, COLUMNS, [["2", "a"], ["1", "b"]])
    places = noted(path)
    with path.open("ab") as stream:
        stream.write(b"0,c\n")
        os.fsync(stream.fileno())
    assert b"".join(places.in_order()) == b"1,b\n2,a\n"
