"""Campaigns of several processes, and of several tries; most in this process, some in forked ones."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from campaign_disturbance import FORK, forked, rows_on_disk, run_that, same_tables
from lock_holders import write_dead_holder, write_holder
from micro_campaign import MicroPlace, files_below, kill, micro_gpt2, start, table

from experiments.campaign import folder as campaign_folder
from experiments.command_line import main
from experiments.engine import contexts
from experiments.errors import MissingResourceError
from experiments.tables.csv_file import CsvFile, read_rows
from experiments.tables.schema import (
    ExperimentResult,
    columns,
)

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
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, append = FORK.Event(), CsvFile.append

    def append_after_the_refusal(self: CsvFile, *rows: Sequence[str]) -> None:
        assert refused.wait(60), "both are at work"
        append(self, *rows)

    with monkeypatch.context() as patched:
        patched.setattr(CsvFile, "append", append_after_the_refusal)
        workers = [forked(place.arguments(tmp_path)) for _ in range(2)]
    while all(worker.is_alive() for worker in workers):
        time.sleep(0.01)
    refused.set()
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
    assert "task 9 was started again: --overwrite is ignored" in capsys.readouterr().err
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
    from experiments.launchers import local as local_launcher

    shutil.copytree(whole, tmp_path / "micro")
    monkeypatch.setattr(local_launcher.subprocess, "Popen", lambda *_, **__: pytest.fail("started a worker"))
    wrong = [*place.arguments(tmp_path), "--fault.layers", "99", "--launcher", "local", "--workers", "2", "--overwrite"]
    assert main(wrong) == 2
    assert "fault.layers: got 99, allowed 0..1" in capsys.readouterr().err
    same_tables(tmp_path / "micro", whole)


def test_a_worker_that_a_signal_ended_is_a_failure_of_the_campaign(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.launchers import local as local_launcher

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
