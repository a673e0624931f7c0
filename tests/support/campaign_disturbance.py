"""What disturbs campaigns of tests, and how two of them are compared.

with run_that(monkeypatch, disturb) as begun:      # disturb(number, planned) before each run
    main(arguments)
same_tables(output / "micro", whole)

assert killed(arguments, output / "micro", rows=5)         # a campaign of a process of its own
main(arguments)
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from micro_campaign import numbers

from experiments.command_line import main
from experiments.config import ExperimentConfig
from experiments.engine.pairs import PairedRunner
from experiments.tables.csv_file import CsvFile, read_rows
from experiments.tables.schema import ExperimentResult, columns

FORK = multiprocessing.get_context("fork")


def forked(arguments: Sequence[str]) -> BaseProcess:
    process = FORK.Process(target=lambda: os._exit(main(list(arguments))))
    process.start()
    return process


def killed(arguments: Sequence[str], folder: Path, rows: float, pause: float = 0.0) -> bool:
    """Kill a campaign ``pause`` seconds after so many rows are on disk; return False if it ended before.

    It runs on during the pause, but waits to be killed a few rows later: a test that is given no time by the machine is
    not too late.
    """
    append = CsvFile.append

    def campaign() -> None:
        def append_and_wait(self: CsvFile, *lines: Sequence[str]) -> None:
            append(self, *lines)
            if rows_on_disk(folder) >= rows + 3:
                time.sleep(600)

        CsvFile.append = append_and_wait  # type: ignore[method-assign]
        os._exit(main(list(arguments)))

    process = FORK.Process(target=campaign)
    process.start()
    while process.is_alive() and rows_on_disk(folder) < rows:
        time.sleep(0.001)
    time.sleep(pause)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def same_tables(one: Path, other: Path) -> None:
    assert numbers(one / "runs.csv") == numbers(other / "runs.csv")
    for name in ("detections.csv", "propagation.csv", "clean.csv", "failures.csv", "plan.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name


def rows_on_disk(folder: Path) -> int:
    return sum(len(read_rows(path, columns(ExperimentResult))) for path in folder.glob("shards/[0-9]*[0-9].csv"))


@contextmanager
def run_that(monkeypatch: pytest.MonkeyPatch, disturb: Callable[[int, Any], None]) -> Iterator[list[str]]:
    """Call ``disturb(number, planned)`` before each run; yield the ids of the runs that were begun."""
    begun: list[str] = []
    real = PairedRunner.run

    def run(self: PairedRunner, planned: Any, config: ExperimentConfig) -> Any:
        begun.append(planned.run_id)
        disturb(len(begun), planned)
        return real(self, planned, config)

    def run_many(self: PairedRunner, runs: Sequence[Any]) -> Iterator[Any]:
        # One after the other, whichever engine the campaign would take.
        for planned, config in runs:
            try:
                record = self.run(planned, config)
            except ArithmeticError as error:
                record = error
            yield planned, record

    monkeypatch.setattr(PairedRunner, "run", run)
    monkeypatch.setattr(PairedRunner, "run_many", run_many)
    try:
        yield begun
    finally:
        monkeypatch.undo()
