from __future__ import annotations

import csv
import io
import os
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.errors import CheckRefusedError
from experiments.tables.csv_file import CsvFile, read_rows, write_lines, write_rows, write_text

COLUMNS = ["run_id", "value", "note"]
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=8)
AWKWARD = st.one_of(CELLS, st.sampled_from(["", '"', '""', ",", '",', "nan", "-0.0", "é€😀", "'", " x ", ";"]))
ROWS = st.lists(st.lists(AWKWARD, min_size=3, max_size=3), min_size=1, max_size=4)
MULTILINE = st.lists(
    st.lists(st.sampled_from(["", "a", "a\nb", "\n", '"\n"', "x,\ny", "é\n€"]), min_size=3, max_size=3),
    min_size=1,
    max_size=3,
)
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)


def encoded(rows: Sequence[Sequence[str]]) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue().encode()


def ends(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return after how many bytes the header and each row are complete."""
    return [len(encoded([COLUMNS, *rows[:count]])) for count in range(len(rows) + 1)]


def check_every_truncation(path: Path, rows: list[list[str]]) -> None:
    whole = encoded([COLUMNS, *rows])
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = rows[: max(0, sum(end <= size for end in ends(rows)) - 1)]
        assert read_rows(path, COLUMNS) == complete, f"read {size} of {len(whole)} bytes"
        CsvFile(path, COLUMNS).close()
        assert path.read_bytes() == encoded([COLUMNS, *complete]), f"reopened {size} of {len(whole)} bytes"


@IN_ONE_FOLDER
@given(rows=ROWS)
def test_truncation_at_any_byte_leaves_exactly_the_complete_rows(tmp_path: Path, rows: list[list[str]]) -> None:
    check_every_truncation(tmp_path / "shard.csv", rows)


@IN_ONE_FOLDER
@given(rows=MULTILINE)
def test_truncation_inside_a_cell_with_newlines_is_no_row(tmp_path: Path, rows: list[list[str]]) -> None:
    check_every_truncation(tmp_path / "shard.csv", rows)


@IN_ONE_FOLDER
@given(rows=ROWS, more=ROWS, cut=st.integers(0, 200))
def test_what_is_appended_after_a_tear_is_read_back(
    tmp_path: Path, rows: list[list[str]], more: list[list[str]], cut: int
) -> None:
    path = tmp_path / "shard.csv"
    path.unlink(missing_ok=True)
    with CsvFile(path, COLUMNS) as file:
        for row in rows:
            file.append(row)
    size = max(0, path.stat().st_size - cut)
    os.truncate(path, size)
    left = rows[: max(0, sum(end <= size for end in ends(rows)) - 1)]
    with CsvFile(path, COLUMNS) as file:
        file.append(*more)
    assert read_rows(path, COLUMNS) == [*left, *more]
    with path.open(encoding="utf-8", newline="") as stream:
        assert list(csv.reader(stream)) == [COLUMNS, *left, *more]


def test_reopening_an_intact_file_does_not_touch_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "shard.csv"
    with CsvFile(path, COLUMNS) as file:
        file.append(["1", "a", "b"])
    before = path.stat()
    CsvFile(path, COLUMNS).close()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not caplog.records


def test_a_cut_tail_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "shard.csv"
    path.write_bytes(encoded([COLUMNS, ["1", "a", "b"]]) + b"2,c")
    CsvFile(path, COLUMNS).close()
    assert [record.message for record in caplog.records] == [f"{path}: its last line was torn and has been cut off"]


def test_a_file_that_is_not_there_has_no_rows_and_is_made_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "0001.csv"
    assert read_rows(path, COLUMNS) == []
    CsvFile(path, COLUMNS).close()
    assert path.read_text() == "run_id,value,note\n"


@pytest.mark.parametrize(("line", "cells"), [("only", 1), ("a,b", 2), ("a,b,c,d", 4), ("", 0)])
def test_a_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path: Path, line: str, cells: int) -> None:
    path = tmp_path / "0007.csv"
    path.write_text(f"run_id,value,note\n1,a,b\n{line}\n3,e,f\n")
    with pytest.raises(CheckRefusedError, match=rf"0007\.csv: line 3 has {cells} cells, expected 3"):
        read_rows(path, COLUMNS)
    with pytest.raises(CheckRefusedError, match="line 3"):
        CsvFile(path, COLUMNS)
    assert path.read_text() == f"run_id,value,note\n1,a,b\n{line}\n3,e,f\n"


def test_the_number_of_a_damaged_line_is_that_of_the_file_also_after_a_cell_of_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "0007.csv"
    path.write_text('run_id,value,note\n1,"a\nb",c\ndamaged\n3,e,f\n')
    with pytest.raises(CheckRefusedError, match="line 4 has 1 cells"):
        read_rows(path, COLUMNS)


@pytest.mark.parametrize("damage", [b"\xff", b"\xc3(", b"\xf0\x9f\x98"])
def test_bytes_that_are_no_text_in_a_complete_line_are_refused(tmp_path: Path, damage: bytes) -> None:
    # Replacing them would change a result and keep the change.
    path = tmp_path / "0001.csv"
    content = b"run_id,value,note\n1,a" + damage + b",c\n3,e,f\n"
    path.write_bytes(content)
    with pytest.raises(CheckRefusedError, match="line 2"):
        CsvFile(path, COLUMNS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("header", ["run_id,value", "run_id,value,note,more", "value,run_id,note", "run_id,value,Note"])
def test_another_header_is_refused_and_the_file_is_left_alone(tmp_path: Path, header: str) -> None:
    path = tmp_path / "shard.csv"
    path.write_text(f"{header}\n1,2,3\n")
    for reading in (read_rows, CsvFile):
        with pytest.raises(CheckRefusedError, match="columns are not those of this version"):
            reading(path, COLUMNS)
    assert path.read_text() == f"{header}\n1,2,3\n"


def test_keep_removes_the_other_rows_for_good(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    rows = [["1", "a", ""], ["2", "b", ""], ["3", "c", ""]]
    write_rows(path, COLUMNS, rows)
    with CsvFile(path, COLUMNS, keep={"1", "3"}) as file:
        file.append(["4", "d", ""])
    assert read_rows(path, COLUMNS) == [rows[0], rows[2], ["4", "d", ""]]


def test_keep_nothing_leaves_the_header(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    write_rows(path, COLUMNS, [["1", "a", ""]])
    CsvFile(path, COLUMNS, keep=[]).close()
    assert path.read_text() == "run_id,value,note\n"


def test_append_is_one_write_however_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write
    with CsvFile(tmp_path / "shard.csv", COLUMNS) as file:
        monkeypatch.setattr(
            os, "write", lambda descriptor, data: (writes.append(bytes(data)), real(descriptor, data))[1]
        )
        file.append(["1", 'a"b', "c,d"], ["2", "", "é"])
        file.append()
        monkeypatch.undo()
    assert writes == [encoded([["1", 'a"b', "c,d"], ["2", "", "é"]])]


def test_append_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    with CsvFile(path, COLUMNS) as file:
        for number in range(3):
            file.append([str(number), "", ""])
            assert [row[0] for row in read_rows(path, COLUMNS)] == [str(n) for n in range(number + 1)]


def test_a_short_write_is_an_error_and_its_tail_is_cut_when_reopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "shard.csv", os.write
    with CsvFile(path, COLUMNS) as file:
        file.append(["1", "a", "b"])
        monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:4]))
        with pytest.raises(OSError, match="wrote 4 of 7 bytes"):
            file.append(["2", "cc", "d"])
        monkeypatch.undo()
    CsvFile(path, COLUMNS).close()
    assert read_rows(path, COLUMNS) == [["1", "a", "b"]]


def test_two_writers_that_append_never_overwrite_each_other(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    with CsvFile(path, COLUMNS) as first, CsvFile(path, COLUMNS) as second:
        first.append(["1", "", ""])
        second.append(["2", "", ""])
        first.append(["3", "", ""])
    assert [row[0] for row in read_rows(path, COLUMNS)] == ["1", "2", "3"]


@IN_ONE_FOLDER
@given(rows=MULTILINE)
def test_whole_files_read_back(tmp_path: Path, rows: list[list[str]]) -> None:
    write_rows(tmp_path / "table.csv", COLUMNS, rows)
    assert read_rows(tmp_path / "table.csv", COLUMNS) == rows


def test_an_iterator_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    write_rows(path, COLUMNS, [["old", "", ""]])

    def failing() -> Iterator[list[str]]:
        yield ["new", "", ""]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_rows(path, COLUMNS, failing())
    assert read_rows(path, COLUMNS) == [["old", "", ""]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs.csv"]


def test_two_writers_of_one_file_with_the_same_process_number_do_not_mix_their_rows(tmp_path: Path) -> None:
    # Processes of two containers often have the same number; shards of a campaign write its provenance together.
    path = tmp_path / "plan.csv"
    mine, others = [[str(n), "mine", ""] for n in range(4)], [[str(n), "others", ""] for n in range(9)]

    def slowly() -> Iterator[list[str]]:
        yield from mine[:2]
        write_rows(path, COLUMNS, others)
        yield from mine[2:]

    write_rows(path, COLUMNS, slowly())
    assert read_rows(path, COLUMNS) == mine
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.csv"]


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError("no replacement today")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no replacement today"):
        write_text(path, "new")
    with pytest.raises(OSError, match="no replacement today"):
        write_rows(path, COLUMNS, [])
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_writing_leaves_no_temporary_files_and_makes_folders(tmp_path: Path) -> None:
    write_text(tmp_path / "logs" / "a" / "x.txt", "é\n")
    write_rows(tmp_path / "tables" / "x.csv", COLUMNS, [])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "logs/a/x.txt",
        "tables/x.csv",
    ]
    assert (tmp_path / "logs" / "a" / "x.txt").read_bytes() == "é\n".encode()


def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list that takes the target and the size of every file that is forced to disk."""
    found: list[tuple[str, int]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_files_are_forced_to_disk_whole_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = synced(monkeypatch)
    write_text(tmp_path / "a.txt", "four")
    write_rows(tmp_path / "a.csv", COLUMNS, [["1", "2", "3"]])
    write_lines(tmp_path / "b.csv", COLUMNS, [b"1,2,3\n", b"4,5,6\n7,8,9\n"])
    assert [size for _, size in found] == [4, 18 + 6, 18 + 18]
    assert all(name.endswith(".tmp") for name, _ in found)
    assert (tmp_path / "b.csv").read_text() == "run_id,value,note\n1,2,3\n4,5,6\n7,8,9\n"
    write_text(tmp_path / "log.txt", "x", sync=False)
    assert len(found) == 3


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_a_shard_is_forced_to_disk_when_it_is_closed_and_not_for_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard.csv"
    CsvFile(path, COLUMNS).close()
    found = synced(monkeypatch)
    with CsvFile(path, COLUMNS) as file:
        for number in range(5):
            file.append([str(number), "a", "b"])
        assert found == []
    assert found == [("shard.csv", path.stat().st_size)]


def test_opening_keeps_no_rows_in_memory_but_those_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "shard.csv"
    write_rows(path, COLUMNS, [[str(n), "x" * 50, ""] for n in range(20_000)])
    tracemalloc.start()
    CsvFile(path, COLUMNS, keep={str(n) for n in range(10)}).close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row[0] for row in read_rows(path, COLUMNS)] == [str(n) for n in range(10)]
    # The reading buffer is 2**20 bytes; the rows would take more than five times as much.
    assert peak < 3 * 2**20
