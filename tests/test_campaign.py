"""Whole campaigns on a micro model; most in this process, some in forked ones, which start without importing torch."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from micro_campaign import MicroPlace, files_below, kill, micro_gpt2, numbers, start, table
from test_writer_lock import write_dead_holder, write_holder

from experiments import campaign, campaign_folder, contexts
from experiments.command_line import main
from experiments.config import ExperimentConfig, load_config
from experiments.csv_file import CsvFile, read_rows
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.paired_run import PairedRunner
from experiments.plan import make_plan
from experiments.result import (
    UNREPEATABLE,
    CleanRow,
    DetectionRow,
    ExperimentResult,
    FailureRow,
    PropagationRow,
    columns,
)
from experiments.shards import Shard, shard_of

FORK = multiprocessing.get_context("fork")
TABLES = {
    "runs": ExperimentResult,
    "detections": DetectionRow,
    "propagation": PropagationRow,
    "clean": CleanRow,
    "failures": FailureRow,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> MicroPlace:
    return MicroPlace.make(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a campaign of 24 runs that was never disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert main(place.arguments(output)) == 0
    return output / "micro"


def forked(arguments: Sequence[str]) -> BaseProcess:
    process = FORK.Process(target=lambda: os._exit(main(list(arguments))))
    process.start()
    return process


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


# --------------------------------------------------------------------------------------------- what comes out


def test_the_files_of_a_campaign(whole: Path, place: MicroPlace) -> None:
    present = files_below(whole)
    for name in (
        "config.yaml", "provenance.json", "plan.csv", "shards/0001.csv", "runs.csv", "detections.csv", "failures.csv",
        "trace/0001.jsonl",
    ):  # fmt: skip
        assert name in present
    assert not [name for name in present if name.endswith((".lock", ".tmp")) or "/." in name or name.startswith(".")]
    for name, row_type in TABLES.items():
        assert (whole / f"{name}.csv").read_text().splitlines()[0] == ",".join(columns(row_type))


def test_every_planned_run_has_its_row(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    config = load_config(place.arguments(tmp_path))
    planned = [run.run_id for run in make_plan(config).runs]
    assert len(planned) == 24
    assert [row["run_id"] for row in table(whole / "plan.csv")] == planned
    rows = table(whole / "runs.csv")
    assert [row["run_id"] for row in rows] == planned
    for row in rows:
        assert (row["model"], row["dtype"], row["source"]) == (place.model, "float32", place.source)
        assert repr(float(row["loss_diff"])) == repr(float(row["injected_loss"]) - float(row["baseline_loss"]))
        assert row["outcome"] in ("masked", "benign", "critical", "nonfinite")
    assert table(whole / "failures.csv") == []
    detections = table(whole / "detections.csv")
    assert {row["run_id"] for row in detections} == set(planned)
    clean = table(whole / "clean.csv")
    assert sum(int(row["violations"]) for row in clean) == 0


def test_the_configuration_on_disk_is_that_of_the_campaign(whole: Path, place: MicroPlace) -> None:
    config = load_config(["--config", str(whole / "config.yaml")])
    assert [run.run_id for run in make_plan(config).runs] == [row["run_id"] for row in table(whole / "plan.csv")]
    assert config == load_config(place.arguments(whole.parent))


def test_where_the_numbers_come_from(whole: Path) -> None:
    facts = json.loads((whole / "provenance.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert "--name" in facts["arguments"]
    (context,) = facts["contexts"].values()
    assert (context["family"], context["attention_layers"]) == (
        "causal",
        ["transformer.h.0.attn", "transformer.h.1.attn"],
    )
    assert len(context["model_fingerprint"]) == len(context["data_fingerprint"]) == 32
    assert "bitwise equal" in context["equivalence_gate"]


def test_the_trace_has_one_line_for_every_injected_pass(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "trace" / "0001.jsonl").read_text().splitlines()]
    injected = [line for line in lines if line["op"] == "injected"]
    assert len(injected) == 24
    assert {line["run_id"] for line in injected} == {row["run_id"] for row in table(whole / "runs.csv")}


def test_the_closing_table(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(place.arguments(tmp_path)) == 0
    said = capsys.readouterr().out
    rows = table(tmp_path / "micro" / "runs.csv")
    assert f"24 runs, {len({row['fault_id'] for row in rows})} distinct faults" in said
    for location in ("q", "k", "v", "scores", "weights", "out"):
        assert f"\n{location} " in said
    detected = sum(row["violation_detected"] == "True" for row in rows)
    last = next(line for line in said.splitlines() if line.startswith("all"))
    counts = [
        sum(row["outcome"] == outcome for row in rows) for outcome in ("masked", "benign", "critical", "nonfinite")
    ]
    assert last.split()[1:6] == [str(24), *map(str, counts)]
    assert f"{100 * detected / 24:.1f} % (" in last
    harmful = [row for row in rows if row["outcome"] in ("critical", "nonfinite")]
    seen = sum(row["violation_detected"] == "True" for row in harmful)
    assert 0 < len(harmful) < 24
    assert last.split()[-3] == f"{seen}/{len(harmful)}"
    assert "false positives: 0 violations in" in said
    assert f"24 of 24 runs in {tmp_path / 'micro' / 'runs.csv'}" in said


def test_the_plan_is_on_disk_before_the_first_run(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def look(number: int, planned: Any) -> None:
        if number == 1:
            seen.append(files_below(tmp_path / "micro"))

    with run_that(monkeypatch, look):
        assert main(place.arguments(tmp_path)) == 0
    assert {"config.yaml", "plan.csv", "shards/0001.json", "shards/0001.lock"} < set(seen[0])


# --------------------------------------------------------------------------------------------- exactly once


def test_a_finished_campaign_does_nothing_and_says_so(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    contents = {name: (tmp_path / "micro" / name).read_bytes() for name in ("runs.csv", "shards/0001.csv", "plan.csv")}
    monkeypatch.setattr(contexts, "load_model", lambda *_: pytest.fail("loaded a model for nothing"))
    assert main(place.arguments(tmp_path)) == 0
    assert "24 of 24 runs" in capsys.readouterr().out
    for name, content in contents.items():
        assert (tmp_path / "micro" / name).read_bytes() == content
    assert files_below(tmp_path / "micro") == files_below(whole)


@pytest.mark.parametrize("last", [1, 2, 13, 24])
def test_an_interrupted_campaign_goes_on_and_ends_the_same(
    whole: Path,
    place: MicroPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: int,
) -> None:
    def interrupt(number: int, planned: Any) -> None:
        if number == last:
            raise KeyboardInterrupt

    with run_that(monkeypatch, interrupt):
        assert main(place.arguments(tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert rows_on_disk(tmp_path / "micro") == last - 1
    assert not list(tmp_path.rglob("*.lock"))
    with run_that(monkeypatch, lambda number, planned: None) as begun:
        assert main(place.arguments(tmp_path)) == 0
    assert len(begun) == 25 - last
    same_tables(tmp_path / "micro", whole)


@pytest.mark.parametrize("torn", [0.0, 0.5, 1.0], ids=["not", "half", "fully"])
@pytest.mark.parametrize("kind", ["csv", "detections.csv", "propagation.csv", "clean.csv"])
def test_a_crash_in_the_middle_of_any_write_is_made_good(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, torn: float
) -> None:
    """The bytes that were asked for are not, half, or fully on disk when the process ends."""
    calls, real = [0], CsvFile.append

    def append(self: CsvFile, *rows: Sequence[str]) -> None:
        calls[0] += self.path.name == f"0001.{kind}" and bool(rows)
        if calls[0] < 3 or self.path.name != f"0001.{kind}" or not rows:
            return real(self, *rows)
        size = self.path.stat().st_size
        real(self, *rows)
        os.truncate(self.path, size + int(torn * (self.path.stat().st_size - size)))
        raise KeyboardInterrupt

    monkeypatch.setattr(CsvFile, "append", append)
    assert main(place.arguments(tmp_path)) == 130
    monkeypatch.undo()
    assert calls[0] == 3
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def killed_and_restarted(place: MicroPlace, output: Path, moments: Sequence[float]) -> int:
    """Kill the campaign when about that share of its rows is on disk, again and again; return how often it was."""
    kills = 0
    for moment in moments:
        process = forked(place.arguments(output))
        while process.is_alive() and rows_on_disk(output / "micro") < moment * 24:
            time.sleep(0.001)
        time.sleep(random.Random(moment).uniform(0, 0.02))
        assert process.pid is not None
        kills += process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return kills


def test_a_campaign_that_was_killed_three_times_ends_the_same(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    assert killed_and_restarted(place, tmp_path, [0.04, 0.3, 0.7]) >= 2
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_campaign_that_was_killed_often_ends_the_same(
    whole: Path, place: MicroPlace, tmp_path: Path, seed: int
) -> None:
    random_moments = random.Random(seed)
    moments = [0.0, *sorted(random_moments.uniform(0, 1.0) for _ in range(12))]
    assert killed_and_restarted(place, tmp_path, moments) >= 3
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


@pytest.mark.parametrize("seed", range(4))
def test_torn_tails_are_repaired_and_the_campaign_ends_the_same(
    whole: Path, place: MicroPlace, tmp_path: Path, seed: int
) -> None:
    """The detections of a run are on disk before its own row, so a kill leaves them complete or ahead."""
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    os.truncate(path, random.Random(seed).randint(0, path.stat().st_size))
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_half_written_row_of_garbage_is_cut_off(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_row_that_was_deleted_by_hand_is_done_again(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], *lines[6:]]))
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_damaged_row_in_the_middle_is_refused(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], lines[5][:30] + "\n", *lines[6:]]))
    for command in (place.arguments(tmp_path), ["merge", str(tmp_path / "micro")], ["status", str(tmp_path / "micro")]):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "0001.csv: line 6 has" in line


# --------------------------------------------------------------------------------------------- shards and workers


def test_shards_in_any_order_make_the_whole(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in ("1/3", "3/3"):
        assert main([*place.arguments(tmp_path), "--shard", shard]) == 0
        assert f"shard {shard}: 8 done, 0 failed" in capsys.readouterr().out
    folder = str(tmp_path / "micro")
    assert main(["merge", folder]) == 1
    assert "8 runs are not done yet" in capsys.readouterr().out
    assert main([*place.arguments(tmp_path), "--shard", "2/3"]) == 0
    assert main(["merge", folder]) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_slurm_array_makes_the_whole(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in (5, 4):
        for key, value in (("ID", task), ("COUNT", 2), ("MIN", 4), ("MAX", 5), ("STEP", 1)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", str(value))
        assert main(place.arguments(tmp_path)) == 0
    assert [path.name for path in sorted((tmp_path / "micro" / "shards").glob("000?.csv"))] == ["0001.csv", "0002.csv"]
    assert main(["merge", str(tmp_path / "micro")]) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_campaign_begun_in_shards_is_finished_without_them(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    assert main([*place.arguments(tmp_path), "--shard", "2/3"]) == 0
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_shards_at_the_same_time_make_the_whole(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    workers = [forked([*place.arguments(tmp_path), "--shard", f"{number}/3"]) for number in (1, 2, 3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert main(["merge", str(tmp_path / "micro")]) == 0
    same_tables(tmp_path / "micro", whole)


def test_more_shards_than_runs(place: MicroPlace, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path, "--num_runs=1", "--fault.location=q", bits="3")
    for number in (1, 2, 3):
        assert main([*arguments, "--shard", f"{number}/3"]) == 0
    assert main(["merge", str(tmp_path / "micro")]) == 0
    assert len(table(tmp_path / "micro" / "runs.csv")) == 1


def test_a_second_process_on_one_shard_is_refused(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_holder(tmp_path / "micro" / "shards" / "0001.lock")
    for arguments in ([], ["--shard", "1/3"], ["--overwrite"]):
        assert main([*place.arguments(tmp_path), *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"0001.lock: process {os.getpid()} on" in line
    assert files_below(tmp_path / "micro") == ["shards", "shards/0001.lock"]


def test_of_two_processes_that_start_together_one_does_all_and_one_is_refused(
    whole: Path, place: MicroPlace, tmp_path: Path
) -> None:
    workers = [forked(place.arguments(tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert sorted(worker.exitcode or 0 for worker in workers) == [0, 1]
    same_tables(tmp_path / "micro", whole)


def test_the_local_launcher_makes_the_whole(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*place.arguments(tmp_path), "--launcher", "local", "--workers", "2"]) == 0
    assert "24 of 24 runs in" in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "micro" / "shards").glob("000?.csv"))] == ["0001.csv", "0002.csv"]
    same_tables(tmp_path / "micro", whole)


@pytest.mark.slow
def test_the_command_as_a_process_of_its_own(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    process = start(place.arguments(tmp_path))
    while process.poll() is None and rows_on_disk(tmp_path / "micro") < 5:
        time.sleep(0.01)
    kill(process)
    said, complained = start(place.arguments(tmp_path)).communicate()
    assert "24 of 24 runs" in said
    assert "Traceback" not in complained
    same_tables(tmp_path / "micro", whole)


@pytest.mark.parametrize("shard", [None, "1/3", "3/3"])
def test_workers_that_divide_the_campaign_otherwise_are_refused_while_one_works(
    place: MicroPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shard: str | None,
) -> None:
    write_holder(tmp_path / "micro/shards/0002.lock", count=2)
    more = ["--shard", shard] if shard else []
    assert main([*place.arguments(tmp_path), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"0002.lock: process {os.getpid()} on" in line
    assert f"one of 2 shards of this campaign, this process one of {3 if shard else 1}: runs would be done" in line
    assert files_below(tmp_path / "micro") == ["shards", "shards/0002.lock"]
    assert main([*place.arguments(tmp_path), "--shard", "1/2"]) == 0


def test_a_second_task_that_arrives_while_the_first_begins_is_not_refused(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, statuses = campaign_folder.write_rows, []

    def write_rows(*arguments: Any) -> None:
        if not statuses:
            statuses.append(None)
            statuses.append(main([*place.arguments(tmp_path), "--shard", "2/2"]))
        real(*arguments)

    monkeypatch.setattr(campaign_folder, "write_rows", write_rows)
    assert main([*place.arguments(tmp_path), "--shard", "1/2"]) == 0
    assert statuses == [None, 0]
    assert main(["merge", str(tmp_path / "micro")]) == 0
    same_tables(tmp_path / "micro", whole)


# --------------------------------------------------------------------------------------------- sessions


def left_session(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "shards/0001.session.json").read_text()))


def test_a_worker_that_is_refused_while_it_loads_leaves_the_reason(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []

    def refusing(*_: Any) -> None:
        seen.append(left_session(tmp_path / "micro"))
        raise MissingResourceError("no weights today")

    monkeypatch.setattr(contexts, "load_model", refusing)
    assert main(place.arguments(tmp_path)) == 3
    assert not (tmp_path / "micro").exists(), "no campaign came of it"
    monkeypatch.undo()
    assert main([*place.arguments(tmp_path), "--shard", "2/2"]) == 0
    monkeypatch.setattr(contexts, "load_model", refusing)
    assert main([*place.arguments(tmp_path), "--shard", "1/2"]) == 3
    assert [(before["ended"], before["before"]) for before in seen] == [(None, 0), (None, 0)]
    left = left_session(tmp_path / "micro")
    assert (left["ended"], left["reason"], left["done"]) == ("refused", "no weights today", 0)
    capsys.readouterr()
    main(["status", str(tmp_path / "micro")])
    assert "shard 0001: 0 of 12 runs, refused: no weights today" in capsys.readouterr().out


def test_the_time_that_the_model_takes_to_load_is_no_part_of_the_rate(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loaded = contexts.load_model, []

    def load_model(*arguments: Any) -> Any:
        model = real(*arguments)
        loaded.append(time.time())
        return model

    monkeypatch.setattr(contexts, "load_model", load_model)
    assert main(place.arguments(tmp_path)) == 0
    assert left_session(tmp_path / "micro")["begun"] >= loaded[0]


# --------------------------------------------------------------------------------------------- another campaign


def test_a_changed_configuration_is_refused_with_the_key_and_overwrite_begins_anew(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    before = {name: (tmp_path / "micro" / name).read_bytes() for name in ("runs.csv", "config.yaml", "shards/0001.csv")}
    changed = [*place.arguments(tmp_path), "--seed", "5", "--detect.tolerance", "0.5"]
    assert main(changed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "detect.tolerance (0.0 -> 0.5), seed (0 -> 5)" in line
    for name, content in before.items():
        assert (tmp_path / "micro" / name).read_bytes() == content
    (tmp_path / "micro" / "report.html").write_text("of the old campaign")
    assert main([*changed, "--overwrite"]) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert len(rows) == 24
    assert {row["seed"] for row in rows} == {"5"}
    assert not {row["run_id"] for row in rows} & {row["run_id"] for row in table(whole / "runs.csv")}
    assert len(read_rows(tmp_path / "micro" / "shards" / "0001.csv", columns(ExperimentResult))) == 24
    assert main([*changed]) == 0


def test_shards_whose_configuration_is_lost_are_not_taken_for_a_finished_campaign(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As after a kill in the middle of --overwrite, which was asked for to use other detectors.
    shutil.copytree(whole / "shards", tmp_path / "micro" / "shards")
    status = main([*place.arguments(tmp_path), "--detect.detectors", "[finite]"])
    if status == 0:
        detections = table(tmp_path / "micro" / "detections.csv")
        assert {row["detector"] for row in detections} == {"finite"}
    else:
        assert status in (1, 2)
        assert str(tmp_path / "micro") in capsys.readouterr().err


def test_a_task_of_an_array_does_not_delete_what_the_others_did(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array = {"ARRAY_JOB_ID": "9", "ARRAY_TASK_ID": "1", "ARRAY_TASK_COUNT": "3", "ARRAY_TASK_MIN": "1"}
    for key, value in array.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    for more in ([], ["--shard", "2/3"]):
        assert main([*place.arguments(tmp_path), *more, "--overwrite"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--overwrite: got in one of 3 tasks of a Slurm array" in line
        assert f"Remove {tmp_path / 'micro'} and submit the array without it" in line
    assert not (tmp_path / "micro").exists()
    # An array of whole campaigns, a name for each task, may.
    assert main([*place.arguments(tmp_path), "--shard", "1/1", "--overwrite"]) == 0


def test_a_task_that_was_begun_again_does_not_overwrite_what_it_did(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(number: int, planned: Any) -> None:
        if number == 11:
            raise KeyboardInterrupt

    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert main([*place.arguments(tmp_path), "--seed", "5"]) == 0
    with monkeypatch.context() as patch, run_that(patch, interrupt):
        assert main([*place.arguments(tmp_path), "--overwrite"]) == 130
    assert rows_on_disk(tmp_path / "micro") == 10
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with monkeypatch.context() as patch, run_that(patch, lambda number, planned: None) as begun:
        assert main([*place.arguments(tmp_path), "--overwrite"]) == 0
    assert len(begun) == 14
    assert "task 9 was begun again: --overwrite is left out" in capsys.readouterr().err
    same_tables(tmp_path / "micro", whole)


def test_overwriting_a_campaign_of_more_shards_leaves_none_of_them(place: MicroPlace, tmp_path: Path) -> None:
    for number in (1, 2):
        assert main([*place.arguments(tmp_path), "--shard", f"{number}/2"]) == 0
    assert main([*place.arguments(tmp_path), "--overwrite", "--seed", "3"]) == 0
    assert not (tmp_path / "micro" / "shards" / "0002.csv").exists()
    assert {row["seed"] for row in table(tmp_path / "micro" / "runs.csv")} == {"3"}


def test_the_lock_of_a_killed_process_is_no_obstacle(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    for number, more in enumerate(([], ["--overwrite"])):
        output = tmp_path / str(number)
        write_dead_holder(output / "micro" / "shards" / "0001.lock")
        write_dead_holder(output / "micro" / "shards" / "0002.lock")
        assert main([*place.arguments(output), *more]) == 0
        same_tables(output / "micro", whole)


@pytest.mark.parametrize("wrong", [["--fault.layers", "99"], ["--fault.layer_pattern", "nowhere"]], ids=str)
def test_overwriting_is_refused_before_anything_is_removed(
    whole: Path, place: MicroPlace, tmp_path: Path, wrong: list[str]
) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    assert main([*place.arguments(tmp_path), *wrong, "--overwrite"]) == 2
    same_tables(tmp_path / "micro", whole)
    assert files_below(tmp_path / "micro") == files_below(whole)


def test_the_launcher_refuses_before_anything_is_removed_or_started(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.commands import local_launcher

    shutil.copytree(whole, tmp_path / "micro")
    monkeypatch.setattr(local_launcher.subprocess, "Popen", lambda *_, **__: pytest.fail("started a worker"))
    wrong = [*place.arguments(tmp_path), "--fault.layers", "99", "--launcher", "local", "--workers", "2", "--overwrite"]
    assert main(wrong) == 2
    assert "fault.layers: got 99, allowed 0..1" in capsys.readouterr().err
    same_tables(tmp_path / "micro", whole)


def test_a_worker_that_a_signal_ended_is_a_failure_of_the_campaign(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.commands import local_launcher

    class Killed:
        stderr = None

        def poll(self) -> int:
            return -9

        wait = poll

    monkeypatch.setattr(local_launcher.subprocess, "Popen", lambda *_, **__: Killed())
    assert main([*place.arguments(tmp_path), "--launcher", "local", "--workers", "2"]) == 1


@pytest.mark.parametrize("what", ["text", "weights"])
def test_other_data_or_weights_under_the_same_name_are_refused(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    mine = MicroPlace(Path(shutil.copytree(place.root, tmp_path / "mine")))

    def interrupt(number: int, planned: Any) -> None:
        if number == 5:
            raise KeyboardInterrupt

    with run_that(monkeypatch, interrupt):
        assert main(mine.arguments(tmp_path / "out")) == 130
    if what == "text":
        (mine.root / "text.txt").write_text((mine.root / "text.txt").read_text().replace("alike", "equal"))
    else:
        other = micro_gpt2()
        with torch.no_grad():
            other.transformer.h[0].attn.c_proj.bias += 1
        other.save_pretrained(mine.model)
    capsys.readouterr()
    assert main(mine.arguments(tmp_path / "out")) == 1
    assert f"the {'data' if what == 'text' else 'model'} fingerprint is" in capsys.readouterr().err
    assert rows_on_disk(tmp_path / "out" / "micro") == 4


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


# --------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_replayed_to_the_bit(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    assert main(place.arguments(tmp_path, f"--model.dtype={dtype}", bits="3,14")) == 0
    folder = tmp_path / "micro"
    ids = [row["run_id"] for row in table(folder / "runs.csv")]
    before = {name: (folder / name).read_bytes() for name in files_below(folder) if (folder / name).is_file()}
    capsys.readouterr()
    assert main(["replay", str(folder), *ids[::5]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted(ids[::5])
    assert all(": the same numbers (" in line for line in lines)
    assert {name: (folder / name).read_bytes() for name in files_below(folder) if (folder / name).is_file()} == before


@pytest.mark.parametrize(
    "column",
    ["loss_diff", "value_after", "bits_after", "outcome", "num_violations", "index_col", "kl_mean", "fault_id"],
)
def test_a_row_that_was_tampered_with_is_found_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "micro"))
    shard = folder / "shards" / "0001.csv"
    lines = shard.read_text().splitlines()
    names, victim = lines[0].split(","), lines[7].split(",")
    assert len(names) == len(victim)
    old = victim[names.index(column)]
    victim[names.index(column)] = "7.25"
    lines[7] = ",".join(victim)
    shard.write_text("\n".join(lines) + "\n")
    other = lines[9].split(",")[0]
    assert main(["replay", str(folder), victim[0], other]) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"{victim[0]}: {column} was 7.25, is {old or '(empty)'}" in said
    assert sum(line.startswith(other) and "the same numbers" in line for line in said) == 1
    assert len(said) == 2


def test_a_replay_on_other_data_is_found_out(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = MicroPlace(Path(shutil.copytree(place.root, tmp_path / "mine")))
    assert main(mine.arguments(tmp_path / "out", "--fault.location=q", "--num_runs=1", bits="3")) == 0
    (row,) = table(tmp_path / "out" / "micro" / "runs.csv")
    (mine.root / "text.txt").write_text((mine.root / "text.txt").read_text().upper())
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "out" / "micro"), row["run_id"]]) == 1
    said, complained = capsys.readouterr()
    assert "baseline_loss" in said or "fingerprint" in complained


def test_timings_and_engines_may_differ_in_a_replay(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "micro"))
    shard = folder / "shards" / "0001.csv"
    lines = shard.read_text().splitlines()
    names, row = lines[0].split(","), lines[3].split(",")
    for name in UNREPEATABLE:
        row[names.index(name)] = "1.0"
    lines[3] = ",".join(row)
    shard.write_text("\n".join(lines) + "\n")
    assert main(["replay", str(folder), row[0]]) == 0


@pytest.mark.parametrize("options", [["--engine", "plain"], ["--engine=auto"], []], ids=str)
def test_a_run_is_replayed_by_the_engine_that_is_asked_for(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    seen, real = [], PairedRunner.run_many

    def run_many(self: PairedRunner, runs: Sequence[Any]) -> Iterator[Any]:
        seen.append([(run.run_id, config.run.engine) for run, config in runs])
        return real(self, runs)

    monkeypatch.setattr(PairedRunner, "run_many", run_many)
    ids = [row["run_id"] for row in table(whole / "runs.csv")][::9]
    assert main(["replay", str(whole), *options, *ids]) == 0
    engine = options[-1].removeprefix("--engine=") if options else "auto"
    assert [sorted(runs) for runs in seen] == [sorted((run_id, engine) for run_id in ids)]
    assert capsys.readouterr().out.count("the same numbers") == len(ids)


def test_what_cannot_be_replayed(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*place.arguments(tmp_path), "--shard", "1/3"]) == 0
    folder, planned = tmp_path / "micro", [row["run_id"] for row in table(whole / "plan.csv")]
    done = {row[0] for row in read_rows(folder / "shards/0001.csv", columns(ExperimentResult))}
    capsys.readouterr()
    for arguments, status, message in (
        ([str(folder), next(run_id for run_id in planned if run_id not in done)], 2, "has no row yet"),
        ([str(folder), "0" * 16], 2, "is not in this plan of 24 runs"),
        ([str(folder)], 2, "needs a campaign folder and a run id"),
        ([], 2, "needs a campaign folder and a run id"),
        ([str(tmp_path), planned[0]], 3, "no campaign here"),
        ([str(folder), planned[0], "--engine", "fats"], 2, "--engine: got 'fats', allowed auto, plain, fast"),
        ([str(folder), planned[0], "--engine"], 2, "--engine: needs a value"),
    ):
        assert main(["replay", *arguments]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


# --------------------------------------------------------------------------------------------- wider campaigns


def test_a_campaign_over_two_dtypes_seeds_and_lists_of_bits(place: MicroPlace, tmp_path: Path) -> None:
    arguments = [
        *place.arguments(tmp_path, "--fault.location=weights", "--num_runs=1", bits="[3, [0, 14], sign]"),
        "--sweep.model.dtype", "float32,bfloat16", "--sweep.seed", "0,1",
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert sorted({(row["dtype"], row["seed"]) for row in rows}) == [
        ("bfloat16", "0"), ("bfloat16", "1"), ("float32", "0"), ("float32", "1"),
    ]  # fmt: skip
    assert len(rows) == 12
    assert len(json.loads((tmp_path / "micro" / "provenance.json").read_text())["contexts"]) == 4
    assert main(["replay", str(tmp_path / "micro"), *[row["run_id"] for row in rows[::4]]]) == 0


def test_the_clean_passes_of_every_model_are_counted(place: MicroPlace, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path, "--fault.location=q", "--data.num_samples=1", "--num_runs=1", bits="3")
    assert main([*arguments, "--sweep.model.dtype", "float32,bfloat16"]) == 0
    clean = table(tmp_path / "micro" / "clean.csv")
    # One input, two models: each of them has its own fault-free pass, and so its own false positives.
    assert len({row["baseline"] for row in clean}) == 2


def test_the_same_fault_in_two_models_is_two_experiments(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = micro_gpt2()
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight *= 1.5
    other.save_pretrained(tmp_path / "other")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "other")
    fixed = [
        "--fault.location=q", "--data.num_samples=1", "--num_runs=1", "--fault.layers=0", "--fault.index.batch=0",
        "--fault.index.head=0", "--fault.index.row=4", "--fault.index.col=2",
    ]  # fmt: skip
    arguments = [
        *place.arguments(tmp_path, *fixed, bits="28"),
        "--sweep.model.path",
        f"{place.model},{tmp_path / 'other'}",
    ]
    assert main(arguments) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert len({row["fault_id"] for row in rows}) == 2
    assert "2 runs, 2 distinct faults" in capsys.readouterr().out


def test_a_fault_that_is_drawn_twice_counts_once(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [
        "--fault.location=q", "--data.num_samples=1", "--num_runs=3", "--fault.layers=0", "--fault.index.batch=0",
        "--fault.index.head=0", "--fault.index.row=4", "--fault.index.col=2",
    ]  # fmt: skip
    assert main(place.arguments(tmp_path, *fixed, bits="28")) == 0
    assert "3 runs, 1 distinct faults" in capsys.readouterr().out


def test_a_campaign_over_kinds_without_bits(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = place.arguments(tmp_path, "--fault.bit=null", "--fault.location=weights")
    assert main([*arguments, "--sweep.fault.kind", "zero,random_value,bitflip,stuck_at_1"]) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert [row["kind"] for row in rows[::2]] == ["zero", "random_value", "bitflip", "stuck_at_1"]
    assert [row["bit_field"] == "" for row in rows] == [True] * 4 + [False] * 4
    assert "8 of 8 runs" in capsys.readouterr().out


def test_a_campaign_without_detectors(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(place.arguments(tmp_path, "--detect.detectors=[]", "--fault.location=q", "--num_runs=1")) == 0
    assert table(tmp_path / "micro" / "detections.csv") == []
    assert "2 of 2 runs" in capsys.readouterr().out


def test_a_campaign_on_a_bare_encoder(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    arguments = place.arguments(
        tmp_path, f"--model.path={tmp_path / 'bert'}", "--data.source=synthetic", "--num_runs=1"
    )
    assert main(arguments) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert {(row["baseline_loss"], row["loss_diff"], row["kl_mean"], row["top1_changed"]) for row in rows} == {
        ("", "", "", "")
    }
    assert "12 of 12 runs" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "micro"), rows[0]["run_id"]]) == 0


def test_every_shard_has_the_runs_that_the_plan_gives_it(place: MicroPlace, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path)
    assert main([*arguments, "--shard", "3/5"]) == 0
    plan = make_plan(load_config(arguments))
    rows = read_rows(tmp_path / "micro" / "shards" / "0003.csv", columns(ExperimentResult))
    assert [row[0] for row in rows] == [run.run_id for run in shard_of(plan, Shard(3, 5))]


@pytest.mark.slow
def test_the_default_campaign_in_shards_and_as_a_whole(tmp_path: Path) -> None:
    assert main(["--output_dir", str(tmp_path / "a"), "--num_runs", "1"]) == 0
    assert main(["--output_dir", str(tmp_path / "b"), "--num_runs", "1", "--launcher", "local", "--workers", "2"]) == 0
    same_tables(tmp_path / "a" / "default", tmp_path / "b" / "default")
    assert len(table(tmp_path / "a" / "default" / "runs.csv")) == 192
