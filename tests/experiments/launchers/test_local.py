"""``--launcher local``: what workers are told, what the parent shows, and how all of it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from campaign_disturbance import rows_on_disk
from fake_slurm import FakeSlurm
from micro_campaign import ROOT, MicroPlace, files_below, numbers, start
from slow_detector import SlowDetector

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.submission import Submission, check_over
from experiments.command_line import main
from experiments.config import ExperimentConfig, load_config
from experiments.errors import CheckRefusedError
from experiments.launchers import local as local_launcher
from experiments.launchers.registry import Order
from experiments.machine.stop_request import StopRequest
from experiments.plan.plan import make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import ExperimentResult, cells, columns


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
    slow = SlowDetector.make(place.root)
    slow.takes(0.1)
    chosen = "--num_runs=15", "--run.engine=plain", slow.option
    arguments = [*place.arguments(tmp_path, *chosen), "--workers", "2"]
    process = start(arguments)
    while rows_on_disk(tmp_path / "micro") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, complained = process.communicate(timeout=60)
    slow.takes(0)
    assert process.returncode == 130
    assert "the same command continues where it stopped" in complained
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.rglob("*.lock"))
    assert 5 <= rows_on_disk(tmp_path / "micro") < 180
    again = start(arguments)
    again.communicate()
    assert again.returncode == 0
    # Not in this process, which may know another detector of that name.
    whole = start(place.arguments(tmp_path / "whole", *chosen))
    whole.communicate()
    assert whole.returncode == 0
    assert numbers(tmp_path / "micro/runs.csv") == numbers(tmp_path / "whole/micro/runs.csv")


def test_the_parent_waits_for_workers_that_finish_their_pass() -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(0))); "
    worker = subprocess.Popen([sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert worker.stdout is not None
    worker.stdout.readline()
    local_launcher._end([worker], StopRequest())
    worker.stdout.close()
    assert worker.returncode == 0


SIGNALLED = """
import signal, sys, time
def note(number, frame):
    global left
    print(number, flush=True)
    left -= 1
left = int(sys.argv[1])
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
print("ready", flush=True)
while left:
    time.sleep(0.01)
"""


def signalled(signals: int) -> subprocess.Popen[str]:
    """Start a process that ends after so many signals and prints each."""
    command = [sys.executable, "-c", SIGNALLED, str(signals)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    return worker


def test_workers_get_the_signal_that_the_parent_got() -> None:
    worker = signalled(1)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        local_launcher._end([worker], stop)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0, "the alarm of the parent would end the wait"
    assert worker.communicate()[0].split() == [str(int(signal.SIGUSR1))]
    assert worker.returncode == 0


def test_a_signal_that_comes_during_the_wait_is_passed_on_too() -> None:
    worker = signalled(2)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        local_launcher._end([worker], stop)
        timer.join()
        assert signal.getsignal(signal.SIGTERM) == stop._note
    assert worker.communicate()[0].split() == [str(int(signal.SIGUSR1)), str(int(signal.SIGTERM))]
    assert worker.returncode == 0


def test_workers_that_do_not_end_in_time_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_launcher, "PATIENCE_SECONDS", 0.1)
    worker = signalled(99)
    with StopRequest(grace=0.2) as stop:
        signal.raise_signal(signal.SIGUSR1)
        local_launcher._end([worker], stop)
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL


def test_only_shards_with_something_left_are_started(place: MicroPlace, tmp_path: Path, workers: list[Worker]) -> None:
    arguments = [*place.arguments(tmp_path), "--launcher", "local", "--workers"]
    assert main([*arguments, "1000"]) == 0
    assert len(workers) == 24, "no more than there are runs"
    plan = make_plan(load_config(place.arguments(tmp_path)))
    rows = [cells(ExperimentResult(run_id=run.run_id)) for run in shard_of(plan, Shard(2, 3))]
    write_rows(tmp_path / "micro/shards/0001.csv", columns(ExperimentResult), rows)
    workers.clear()
    config = load_config(place.arguments(tmp_path))
    CampaignFolder(tmp_path / "micro").begin(config, plan)
    assert local_launcher.launch(Order(config, [], 3, quiet=True), StopRequest()) == 0
    assert [worker.command[-2] for worker in workers] == ["1/3", "3/3"]


def test_workers_are_told_how_much_grace_there_is(place: MicroPlace, tmp_path: Path, workers: list[Worker]) -> None:
    assert main([*place.arguments(tmp_path), "--workers", "2", "--grace", "33", "--quiet"]) == 0
    for worker in workers:
        assert worker.command[-5:-3] == ["--grace", "33"]
        assert worker.env[local_launcher.OF_LAUNCHER] == str(os.getpid())


@pytest.mark.parametrize("more", [["--workers", "2"], ["--shard", "1/2"], []], ids=str)
def test_nothing_is_begun_beside_a_live_array_job(
    place: MicroPlace, tmp_path: Path, more: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    slurm = FakeSlurm.alone(tmp_path / "bin", monkeypatch)
    Submission("812", "813", 2, [1, 2], 0.0).write(CampaignFolder(tmp_path / "out/micro"))
    before = files_below(tmp_path / "out")
    arguments = [*place.arguments(tmp_path / "out"), *more]
    for says, status, words in (
        ("812_1 RUNNING\n812_2 PENDING\n", 0, "2 tasks of job 812 are waiting or running"),
        ("", 1, "squeue does not say whether job 812 is over; wait until it answers, or delete "),
    ):
        slurm.program("squeue", says, status=status)
        assert main(arguments) == 1
        assert words in capsys.readouterr().err
        assert main([*arguments, "--overwrite"]) == 1
    assert files_below(tmp_path / "out") == before


def test_a_task_of_the_array_and_a_machine_without_slurm_go_on(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm.alone(tmp_path / "bin", monkeypatch)
    folder = CampaignFolder(tmp_path / "micro")
    Submission("812", "813", 2, [1, 2], 0.0).write(folder)
    check_over(folder)
    slurm.program("squeue", "812_1 RUNNING\n")
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    with pytest.raises(CheckRefusedError, match="1 tasks of job 812"):
        check_over(folder)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "812")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    check_over(folder)


@pytest.mark.parametrize("count", ["0", "100001", "99999999999999999999", "9" * 5000, "-1", "1.5", "two"])
def test_numbers_of_workers_that_are_none(
    place: MicroPlace, tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*place.arguments(tmp_path / "out"), f"--workers={count}"]) == 2
    assert "allowed a whole number from 1 to 100,000" in capsys.readouterr().err
    assert main([*place.arguments(tmp_path / "out"), f"--grace={count}"]) == 2
    assert "--grace: got" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_in_a_job_of_slurm_the_parent_alone_asks_to_be_begun_again(place: MicroPlace, tmp_path: Path) -> None:
    programs = FakeSlurm(tmp_path / "bin")
    programs.folder.mkdir()
    programs.program("scontrol", "JobState=RUNNING\n")
    slow = SlowDetector.make(place.root)
    slow.takes(0.1)
    arguments = [*place.arguments(tmp_path, "--num_runs=15", "--run.engine=plain", slow.option), "--workers", "2"]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "big", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **slurm, "PATH": f"{programs.folder}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "run_sweep.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while rows_on_disk(tmp_path / "micro") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    while not [call for call in programs.calls("scontrol") if call == "requeue 7"]:
        assert process.poll() is None
        time.sleep(0.01)
    assert not list(tmp_path.rglob("*.lock")), "workers have ended"
    # As Slurm does, which ends what it will begin again.
    process.send_signal(signal.SIGTERM)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "SIGUSR1: task 7 asked Slurm to start it again" in complained
    assert [call for call in programs.calls("scontrol") if "requeue" in call] == ["requeue 7"]
