"""``--launcher local``: what workers are told, what the parent shows, and how all of it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from micro_campaign import MicroPlace, numbers, start
from test_campaign import rows_on_disk

from experiments.command_line import main
from experiments.commands import local_launcher
from experiments.config import ExperimentConfig


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> MicroPlace:
    return MicroPlace.make(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(key)


class Worker:
    """Stands for a process that ends at once."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: object) -> None:
        self.command, self.env, self.stderr = command, env, None

    def poll(self) -> int:
        return 0

    wait = poll


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Return the workers that are started, which do nothing."""
    made: list[Worker] = []

    def popen(command: list[str], **keywords: object) -> Worker:
        made.append(Worker(command, **keywords))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(local_launcher.subprocess, "Popen", popen)
    return made


def test_every_worker_has_its_shard_and_its_threads(
    place: MicroPlace, tmp_path: Path, workers: list[Worker], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*place.arguments(tmp_path, "--run.threads=2"), "--launcher", "local", "--workers", "3"]
    assert main(arguments) == 0
    assert [worker.command[-3:] for worker in workers] == [["--shard", f"{n}/3", "--quiet"] for n in (1, 2, 3)]
    assert {worker.env["OMP_NUM_THREADS"] for worker in workers} == {"2"}
    cores = len(os.sched_getaffinity(0))
    warned = f"3 workers x 2 threads on {cores} cores" in capsys.readouterr().err
    assert warned == (cores < 6)


def test_each_process_sees_one_gpu(
    place: MicroPlace, tmp_path: Path, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert main([*place.arguments(tmp_path, "--model.device=auto"), "--workers", "3"]) == 0
    assert [worker.env["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["0", "1", "0"]


def test_gpus_that_were_chosen_are_shared_and_others_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    config = ExperimentConfig()
    assert local_launcher._gpus(config) == ["5", "7"]
    assert local_launcher._gpus(config.with_field("model.device", "cpu")) == []
    assert local_launcher._gpus(config.with_field("model.device", "cuda:1")) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_launcher._gpus(config) == []


def test_a_refusal_of_all_workers_is_told_once(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = place.arguments(tmp_path, "--fault.layer_pattern=nowhere")
    assert main([*wrong, "--launcher", "local", "--workers", "2"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "nowhere" in line]
    assert len(lines) == 1
    assert lines[0].startswith("worker ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_interrupts_the_parent_stops_all_and_loses_nothing(
    place: MicroPlace, tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [*place.arguments(tmp_path, "--num_runs=15", "--run.engine=plain"), "--workers", "2"]
    process = start(arguments)
    while rows_on_disk(tmp_path / "micro") < 5:
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on where it stopped" in complained
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.rglob("*.lock"))
    assert 5 <= rows_on_disk(tmp_path / "micro") < 180
    again = start(arguments)
    again.communicate()
    assert again.returncode == 0
    assert main(place.arguments(tmp_path / "whole", "--num_runs=15", "--run.engine=plain")) == 0
    assert numbers(tmp_path / "micro/runs.csv") == numbers(tmp_path / "whole/micro/runs.csv")


def test_the_parent_waits_for_workers_that_finish_their_pass() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(0))); "
    worker = subprocess.Popen([sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert worker.stdout is not None
    worker.stdout.readline()
    local_launcher._end([worker])
    worker.stdout.close()
    assert worker.returncode == 0
