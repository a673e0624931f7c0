"""Campaigns in which runs fail or come back in another order than they were handed over."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from campaign_disturbance import rows_on_disk, run_that, same_tables
from micro_campaign import MicroPlace, files_below, table

from experiments.campaign import worker as campaign
from experiments.command_line import main
from experiments.config import load_config
from experiments.engine import contexts
from experiments.engine.pairs import PairedRunner
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.plan.plan import make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.tables.csv_file import read_rows
from experiments.tables.schema import (
    ExperimentResult,
    columns,
)

# --------------------------------------------------------------------------------------------- failures


def test_a_run_that_raises_stops_no_other_and_is_tried_again(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [row["run_id"] for row in table(whole / "plan.csv")]
    bad = {planned[3], planned[20]}

    def explode(number: int, run: Any) -> None:
        if run.run_id in bad:
            raise ZeroDivisionError('on two\nlines, with "quotes"')

    folder = tmp_path / "micro"
    with run_that(monkeypatch, explode):
        assert main(place.arguments(tmp_path)) == 1
    assert "2 runs failed" in capsys.readouterr().out
    assert {row["run_id"] for row in table(folder / "runs.csv")} == set(planned) - bad
    failures = table(folder / "failures.csv")
    assert [row["run_id"] for row in failures] == [planned[3], planned[20]]
    for row in failures:
        assert row["exception"] == 'ZeroDivisionError: on two lines, with "quotes"'
        assert row["traceback"] == "logs/0001.txt"
    logged = (folder / "logs/0001.txt").read_text()
    assert [f"run {run_id}: " in logged for run_id in planned] == [run_id in bad for run_id in planned]
    assert logged.count("Traceback") == 1
    assert "in explode" in logged
    with run_that(monkeypatch, explode) as begun:
        assert main(place.arguments(tmp_path)) == 1
    assert set(begun) == bad
    assert len(table(folder / "failures.csv")) == 2
    assert main(["status", str(folder)]) == 1
    assert "22 of 24 runs done, 2 failed, 0 missing" in capsys.readouterr().out
    assert main(place.arguments(tmp_path)) == 0
    same_tables(folder, whole)


def test_a_shard_with_a_failure_says_so(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(number: int, run: Any) -> None:
        if number == 2:
            raise ArithmeticError("once")

    with run_that(monkeypatch, explode):
        assert main([*place.arguments(tmp_path), "--shard", "1/3"]) == 1
    assert "shard 1/3: 7 done, 1 failed" in capsys.readouterr().out


def test_a_campaign_of_which_every_run_fails(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(number: int, run: Any) -> None:
        raise ArithmeticError("always")

    with run_that(monkeypatch, explode):
        assert main(place.arguments(tmp_path)) == 1
    assert "24 runs failed" in capsys.readouterr().out
    assert table(tmp_path / "micro" / "runs.csv") == []
    failures = table(tmp_path / "micro" / "failures.csv")
    assert len(failures) == 24
    assert files_below(tmp_path / "micro/logs") == ["0001.txt"]
    logged = (tmp_path / "micro/logs/0001.txt").read_text()
    # One traceback, which every run is said to have.
    assert logged.count("in explode") == 1
    for row in failures:
        assert re.search(rf"^run {row['run_id']}: (Traceback|as run [0-9a-f]{{16}}$)", logged, re.MULTILINE)


# --------------------------------------------------------------------------------------------- handed over together


@contextmanager
def executed_by(
    monkeypatch: pytest.MonkeyPatch, execute: Callable[[PairedRunner, list[Any]], Iterator[Any]]
) -> Iterator[list[list[Any]]]:
    """Let ``execute(pairs, runs)`` stand for ``run_many``; yield the windows that were handed over."""
    windows: list[list[Any]] = []

    def run_many(self: PairedRunner, runs: Sequence[Any]) -> Iterator[Any]:
        windows.append(list(runs))
        return execute(self, windows[-1])

    monkeypatch.setattr(PairedRunner, "run_many", run_many)
    try:
        yield windows
    finally:
        monkeypatch.undo()


def test_rows_do_not_depend_on_the_order_in_which_runs_come_back(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shuffled(pairs: PairedRunner, runs: list[Any]) -> Iterator[Any]:
        order = random.Random(3).sample(runs, len(runs))
        yield from [(run, pairs.run(run, config)) for run, config in order]

    with executed_by(monkeypatch, shuffled) as windows:
        assert main(place.arguments(tmp_path)) == 0
    assert [len(runs) for runs in windows] == [24]
    shard = [row[0] for row in read_rows(tmp_path / "micro/shards/0001.csv", columns(ExperimentResult))]
    assert shard != [row["run_id"] for row in table(tmp_path / "micro/plan.csv")]
    same_tables(tmp_path / "micro", whole)


def test_runs_of_one_context_are_handed_over_in_windows(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(pairs: PairedRunner, runs: list[Any]) -> Iterator[Any]:
        return ((run, ValueError("not today")) for run, _ in runs)

    monkeypatch.setattr(campaign, "WINDOW", 5)
    arguments = place.arguments(tmp_path, "--fault.location=q", "--num_runs=4", bits="3,30")
    with executed_by(monkeypatch, nothing) as windows:
        assert main([*arguments, "--sweep.model.dtype", "float32,bfloat16"]) == 1
    # Each dtype has 8 runs, which the plan does not keep together.
    assert [len(runs) for runs in windows] == [5, 3, 5, 3]
    assert [{config.model.dtype for _, config in runs} for runs in windows] == [{"float32"}] * 2 + [{"bfloat16"}] * 2
    plan = make_plan(load_config(["--config", str(tmp_path / "micro/config.yaml")]))
    assert [run for runs in windows for run, _ in runs] == shard_of(plan, Shard())
    assert all(config == plan.config_of(run) for runs in windows for run, config in runs)
    for runs in windows:
        # Runs of one point of the grid share one object.
        assert len({id(config) for _, config in runs}) == len({run.values for run, _ in runs})


@pytest.mark.parametrize("end", ["raises", "stops"])
def test_runs_that_were_handed_over_and_never_came_back_have_failed(
    whole: Path,
    place: MicroPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str,
) -> None:
    def few(pairs: PairedRunner, runs: list[Any]) -> Iterator[Any]:
        for run, config in runs[-7:]:
            yield run, pairs.run(run, config)
        if end == "raises":
            raise ZeroDivisionError("all of them")

    with executed_by(monkeypatch, few):
        assert main(place.arguments(tmp_path)) == 1
    assert "17 runs failed" in capsys.readouterr().out
    handed_over = [run.run_id for run in shard_of(make_plan(load_config(place.arguments(tmp_path))), Shard())]
    assert {row["run_id"] for row in table(tmp_path / "micro/runs.csv")} == set(handed_over[-7:])
    expected = "ZeroDivisionError: all of them" if end == "raises" else "RuntimeError: 17 of 24 runs were handed over"
    failures = table(tmp_path / "micro/failures.csv")
    assert len(failures) == 17
    assert all(row["exception"].startswith(expected) for row in failures)
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


@pytest.mark.parametrize("error", [CheckRefusedError, UsageError, MissingResourceError])
def test_a_refusal_ends_the_campaign_and_keeps_what_came_back(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refusing(pairs: PairedRunner, runs: list[Any]) -> Iterator[Any]:
        for run, config in runs[3:7]:
            yield run, pairs.run(run, config)
        raise error("no more")

    with executed_by(monkeypatch, refusing):
        assert main(place.arguments(tmp_path)) == error.exit_status
    assert rows_on_disk(tmp_path / "micro") == 4
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_context_that_cannot_be_opened_is_a_failure_of_its_runs(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = contexts.make_batches

    def make_batches(data: Any, *more: Any) -> Any:
        if data.seq_len == 10:
            raise ArithmeticError("ten")
        return real(data, *more)

    monkeypatch.setattr(contexts, "make_batches", make_batches)
    arguments = place.arguments(tmp_path, "--fault.location=q", "--num_runs=1")
    assert main([*arguments, "--sweep.data.seq_len", "8,10,12"]) == 1
    assert len(table(tmp_path / "micro/runs.csv")) == 4
    assert {row["exception"] for row in table(tmp_path / "micro/failures.csv")} == {"ArithmeticError: ten"}


def test_a_full_disk_is_told_on_one_line_and_nothing_is_lost(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, left = os.write, [4000]

    def short(descriptor: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.endswith("0001.csv"):
            return real(descriptor, data)
        written = real(descriptor, data[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", short)
    status = main(place.arguments(tmp_path))
    monkeypatch.undo()
    assert status in (1, 3)
    assert "is the disk full?" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.lock"))
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)
