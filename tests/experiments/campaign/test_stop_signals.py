"""Campaigns that are asked to stop: the pass in hand is finished, nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from campaign_disturbance import rows_on_disk, same_tables
from lock_holders import write_elsewhere
from micro_campaign import ROOT, MicroPlace, numbers, table

from experiments.campaign import lock as writer_lock
from experiments.campaign import worker as campaign
from experiments.command_line import main
from experiments.engine import batch_runs, contexts
from experiments.engine.fast.engine import FastEngine
from experiments.engine.pairs import PairedRunner


@pytest.fixture
def before_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Return ``at(number, what)``: do something once, in the middle of the plain run of that number."""

    def at(number: int, what: Callable[[], object]) -> None:
        real, begun = PairedRunner.run, [0]

        def run(self: PairedRunner, *arguments: Any) -> Any:
            begun[0] += 1
            if begun[0] == number:
                what()
            return real(self, *arguments)

        monkeypatch.setattr(PairedRunner, "run", run)

    return at


def session(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "micro/shards/0001.session.json").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_run_in_hand_is_finished_and_the_rest_done_next_time(
    whole: Path,
    place: MicroPlace,
    tmp_path: Path,
    before_run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    before_run(5, lambda: signal.raise_signal(number))
    arguments = place.arguments(tmp_path, "--run.engine=plain")
    assert main(arguments) == 130
    assert "the same command continues where it stopped" in capsys.readouterr().err
    assert rows_on_disk(tmp_path / "micro") == 5
    assert not list(tmp_path.rglob("*.lock"))
    left = session(tmp_path)
    assert (left["ended"], left["done"], left["before"], left["planned"]) == ("stopped", 5, 0, 24)
    assert not (tmp_path / "micro/runs.csv").exists()
    assert main(place.arguments(tmp_path)) == 0
    left = session(tmp_path)
    assert (left["ended"], left["done"], left["before"]) == ("done", 19, 5)
    same_tables(tmp_path / "micro", whole)


def test_a_run_that_takes_longer_than_the_grace_time_is_given_up_and_done_again(
    whole: Path, place: MicroPlace, tmp_path: Path, before_run: Callable[..., None]
) -> None:
    def stuck() -> None:
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(600)

    before_run(5, stuck)
    assert main([*place.arguments(tmp_path, "--run.engine=plain"), "--grace", "1"]) == 130
    assert rows_on_disk(tmp_path / "micro") == 4
    assert session(tmp_path)["reason"] == "SIGUSR1: the pass in hand was given up"
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_request_in_the_last_run_changes_nothing(
    whole: Path, place: MicroPlace, tmp_path: Path, before_run: Callable[..., None]
) -> None:
    before_run(24, lambda: signal.raise_signal(signal.SIGUSR1))
    assert main(place.arguments(tmp_path, "--run.engine=plain")) == 0
    assert session(tmp_path)["ended"] == "done"
    same_tables(tmp_path / "micro", whole)


def test_a_request_before_the_first_run_is_heard(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PairedRunner.prepare

    def prepare(self: PairedRunner, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return real(self, *arguments)

    monkeypatch.setattr(PairedRunner, "prepare", prepare)
    assert main(place.arguments(tmp_path)) == 130
    assert rows_on_disk(tmp_path / "micro") == 0


def test_the_fast_engine_finishes_its_pass_and_begins_no_other(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        *("--run.engine=fast", "--data.seq_len=16", "--num_runs=4", "--detect.detectors=[lite]"),
        *("--data.num_samples=2",),
    ]
    assert main(place.arguments(tmp_path / "a", *arguments)) == 0
    monkeypatch.setattr(batch_runs, "LEAST_TOGETHER", 8)
    monkeypatch.setattr(batch_runs, "TOKENS_TOGETHER", 8)
    real, passes = FastEngine.run, [0]

    def run(self: FastEngine, faults: Any, *more: Any) -> Any:
        passes[0] += len(faults) == 8
        if passes[0] == 2:
            signal.raise_signal(signal.SIGUSR1)
        return real(self, faults, *more)

    monkeypatch.setattr(FastEngine, "run", run)
    assert main(place.arguments(tmp_path / "b", *arguments)) == 130
    assert rows_on_disk(tmp_path / "b/micro") == 16
    assert passes[0] == 2
    monkeypatch.undo()
    assert main(place.arguments(tmp_path / "b", *arguments)) == 0
    assert numbers(tmp_path / "a/micro/runs.csv") == numbers(tmp_path / "b/micro/runs.csv")


def test_a_worker_whose_shard_was_taken_over_stops_writing(
    place: MicroPlace,
    tmp_path: Path,
    before_run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock = tmp_path / "micro/shards/0001.lock"
    monkeypatch.setattr(writer_lock, "CHECK_SECONDS", 0.0)
    before_run(5, lambda: write_elsewhere(lock, restarts=1))
    assert main(place.arguments(tmp_path, "--run.engine=plain")) == 1
    assert "taken over by process" in capsys.readouterr().err
    assert rows_on_disk(tmp_path / "micro") == 4
    assert lock.exists(), "it is another's"
    assert session(tmp_path)["ended"] is None, "so is the session"


def test_what_a_former_life_on_another_node_still_appends_is_not_counted(
    whole: Path, place: MicroPlace, tmp_path: Path, before_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_run(9, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(place.arguments(tmp_path, "--run.engine=plain")) == 130
    monkeypatch.undo()
    for key, value in {"JOB_ID": "9", "ARRAY_JOB_ID": "812", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    write_elsewhere(tmp_path / "micro/shards/0001.lock")
    kept = [path.open("ab") for path in (tmp_path / "micro").rglob("0001*.*") if path.suffix in (".csv", ".jsonl")]
    assert len(kept) == 6
    assert main([*place.arguments(tmp_path), "--shard", "1/1"]) == 0
    for stream in kept:
        stream.write(b"garbage,of,a,process,that,is,cut,off\n")
        stream.close()
    assert main(["merge", str(tmp_path / "micro")]) == 0
    same_tables(tmp_path / "micro", whole)


def test_what_a_former_life_writes_while_its_successor_loads_is_done_once(
    whole: Path, place: MicroPlace, tmp_path: Path, before_run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_run(9, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(place.arguments(tmp_path, "--run.engine=plain")) == 130
    monkeypatch.undo()
    for key, value in {"JOB_ID": "9", "RESTART_COUNT": "1", "CLUSTER_NAME": "big"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    shards = tmp_path / "micro/shards"
    write_elsewhere(shards / "0001.lock", job="9")
    names = [f"0001.{kind}csv" for kind in ("detections.", "propagation.", "")]
    kept = {name: (shards / name).open("a") for name in names}
    done = {row["run_id"] for row in table(shards / "0001.csv")}
    late = [line.split(",")[0] for line in (whole / "shards/0001.csv").read_text().splitlines()[1:]][9:12]
    assert not done & set(late)
    real, written = contexts.load_model, []

    def load_model(*arguments: Any) -> Any:
        for name, stream in kept.items():
            lines = (whole / "shards" / name).read_text().splitlines(keepends=True)
            written.append([line for line in lines if line.split(",")[0] in late])
            stream.writelines(written[-1])
            stream.close()
        return real(*arguments)

    monkeypatch.setattr(contexts, "load_model", load_model)
    assert main([*place.arguments(tmp_path), "--shard", "1/1"]) == 0
    assert [bool(lines) for lines in written] == [True] * 3
    assert len(table(shards / "0001.csv")) == 24
    same_tables(tmp_path / "micro", whole)


def test_a_request_before_the_model_is_loaded_saves_loading_it(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = campaign.make_plan

    def make_plan(config: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return real(config)

    monkeypatch.setattr(campaign, "make_plan", make_plan)
    monkeypatch.setattr(contexts, "load_model", lambda *_: pytest.fail("loaded a model for nothing"))
    assert main(place.arguments(tmp_path)) == 130
    monkeypatch.undo()
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


LIGHT = """
import signal, sys
import experiments.command_line
from experiments.machine.stop_request import StopRequest
with StopRequest():
    print(*sorted({"torch", "numpy", "transformers", "pandas", "scipy"} & set(sys.modules)))
"""


def test_nothing_heavy_is_imported_before_signals_are_heard() -> None:
    found = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


# A torch that asks its process to stop, tells who listens, and is not to be waited for.
IMPORTED = """
import os, signal
print([signal.getsignal(number) is not signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGUSR1)], flush=True)
os.kill(os.getpid(), signal.SIGUSR1)
signal.setitimer(signal.ITIMER_REAL, 0.05)
signal.pause()
"""


def test_a_signal_while_torch_is_imported_asks_slurm_to_begin_again(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(IMPORTED)
    slurm = tmp_path / "bin" / "scontrol"
    slurm.parent.mkdir()
    slurm.write_text(f"#!/bin/sh\necho $@ >>{tmp_path}/calls\necho JobState=RUNNING\nkill $PPID\n")
    slurm.chmod(0o755)
    found = subprocess.run(
        [sys.executable, str(ROOT / "run_sweep.py"), "--output_dir", str(tmp_path / "results")],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": f"{slurm.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split("\n")[0] == "[True, True]"
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 7"
    assert "SIGUSR1: task 7 asked Slurm to start it again" in found.stderr
    assert found.returncode == 130


@pytest.fixture(autouse=True)
def _no_alarm_is_left() -> Iterator[None]:
    yield
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
