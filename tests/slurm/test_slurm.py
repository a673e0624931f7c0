"""Campaigns on a real Slurm with everything that happens to jobs there; each ends with the rows of one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from cluster import Cluster, run, within
from lock_holders import write_holder
from micro_campaign import ROOT, MicroPlace, numbers, table
from slow_detector import SlowDetector

from experiments.campaign.lock import WriterLock
from experiments.command_line import main
from experiments.errors import CheckRefusedError
from experiments.tables.csv_file import read_rows
from experiments.tables.schema import ExperimentResult, columns

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=found) is None]
    why = f"{missing[0]} is not installed; tests/slurm/start.sh FOLDER installs Slurm (Debian, root)" if missing else ""
    if not why and os.getuid() != 0:
        why = "starting Slurm's daemons needs root"
    if why and os.environ.get("SLURM_TESTS_REQUIRED"):
        pytest.fail(why)
    if why:
        pytest.skip(why)
    cluster = Cluster.start(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster
    finally:
        cluster.stop()
        os.environ.pop("SLURM_CONF", None)


@pytest.fixture(autouse=True)
def _a_login_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM_") and key != "SLURM_CONF"]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Setting:
    """A micro campaign with the slow detector, its single-process result, and the cluster."""

    cluster: Cluster
    place: MicroPlace
    whole: Path

    def arguments(self, output: Path, *more: str) -> list[str]:
        return arguments(self.place, output, *more)

    @property
    def detector(self) -> SlowDetector:
        return SlowDetector(self.place.root)

    def submit(self, output: Path, workers: int, *more: str) -> str:
        """Submit a campaign and return the number of the array job."""
        command = [*self.arguments(output, *more), "--launcher", "slurm", "--workers", str(workers)]
        assert main(command) == 0
        return str(json.loads((output / "micro" / "submission.json").read_text())["job"])

    def merge_ended(self, output: Path) -> str:
        """Wait for the merge job; return what it printed."""
        job = json.loads((output / "micro" / "submission.json").read_text())["merge_job"]
        self.cluster.wait_for(job)
        return (output / "micro" / "logs" / f"slurm-{job}-merge.out").read_text()

    def rows(self, output: Path, shard: int) -> int:
        return len(read_rows(output / "micro" / "shards" / f"{shard:04d}.csv", columns(ExperimentResult)))

    def wait_rows(self, output: Path, shard: int, rows: int) -> None:
        within(120, lambda: self.rows(output, shard) >= rows, f"{rows} rows in shard {shard}")

    def same(self, output: Path) -> None:
        """Exactly the rows of one process, each once, in whatever shard."""
        assert numbers(output / "micro" / "runs.csv") == numbers(self.whole / "runs.csv")
        for name in ("detections.csv", "propagation.csv", "clean.csv", "failures.csv", "plan.csv"):
            assert (output / "micro" / name).read_text() == (self.whole / name).read_text(), name
        written = [
            row[0]
            for path in (output / "micro" / "shards").glob("*.csv")
            if re.fullmatch(r"\d+\.csv", path.name)
            for row in read_rows(path, columns(ExperimentResult))
        ]
        assert len(written) == len(set(written)) == len(table(self.whole / "runs.csv"))


def arguments(place: MicroPlace, output: Path, *more: str) -> list[str]:
    given = {argument.partition("=")[0] for argument in more}
    repeats = [] if "--num_runs" in given else ["--num_runs=5"]
    return place.arguments(output, SlowDetector(place.root).option, *repeats, *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> MicroPlace:
    made = MicroPlace.make(tmp_path_factory.mktemp("place"))
    SlowDetector.make(made.root)
    return made


@pytest.fixture(scope="module")
def setting(cluster: Cluster, place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Return the setting of 60 runs."""
    output = tmp_path_factory.mktemp("whole")
    assert main(arguments(place, output)) == 0
    return Setting(cluster, place, output / "micro")


@pytest.fixture(autouse=True)
def _fast_again(place: MicroPlace) -> Iterator[None]:
    yield
    SlowDetector(place.root).takes(0)


# --------------------------------------------------------------------------------------------- signals and nodes


def test_a_task_that_is_warned_finishes_its_run_and_goes_on_in_another_life(setting: Setting, tmp_path: Path) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 2)
    setting.wait_rows(tmp_path, 1, 2)
    run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    setting.cluster.wait_state(f"{job}_1", "PENDING")
    session = json.loads((tmp_path / "micro/shards/0001.session.json").read_text())
    assert (session["ended"], session["restarts"], session["job"]) == ("stopped", 0, f"{job}_1")
    assert session["done"] == setting.rows(tmp_path, 1)
    assert not (tmp_path / "micro/shards/0001.lock").exists()
    setting.detector.takes(0)
    assert set(setting.cluster.wait_for(job).values()) == {"COMPLETED"}
    after = json.loads((tmp_path / "micro/shards/0001.session.json").read_text())
    assert (after["ended"], after["restarts"], after["before"]) == ("done", 1, session["done"])
    assert "60 of 60 runs" in setting.merge_ended(tmp_path)
    assert "USR1: task" in (tmp_path / f"micro/logs/slurm-{job}_1.out").read_text()
    setting.same(tmp_path)


def test_a_task_whose_time_is_up_goes_on_in_another_life(setting: Setting, tmp_path: Path) -> None:
    # All runs together take longer than the limit: Slurm may warn at any moment up to then.
    setting.detector.takes(1.5)
    job = setting.submit(tmp_path, 1, "--slurm.time", "1")
    setting.cluster.wait_state(f"{job}_1", "RUNNING")
    within(120, lambda: setting.cluster.states(job) == {f"{job}_1": "PENDING"}, "requeued before its limit")
    setting.detector.takes(0)
    assert set(setting.cluster.wait_for(job).values()) == {"COMPLETED"}
    setting.merge_ended(tmp_path)
    setting.same(tmp_path)


def test_a_node_that_goes_down_loses_no_run(setting: Setting, tmp_path: Path) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 1)
    setting.wait_rows(tmp_path, 1, 2)
    node = run("squeue", "-h", "-r", "-j", f"{job}_1", "-o", "%N")
    before = setting.rows(tmp_path, 1)
    setting.cluster.lose(node, setting.cluster.process(tmp_path / "micro", 1))
    setting.detector.takes(0)
    try:
        assert set(setting.cluster.wait_for(job).values()) == {"COMPLETED"}
    finally:
        Cluster.start(setting.cluster.folder)
    session = json.loads((tmp_path / "micro/shards/0001.session.json").read_text())
    assert session["restarts"] == 1
    assert before <= session["before"] < 60
    setting.merge_ended(tmp_path)
    setting.same(tmp_path)


# --------------------------------------------------------------------------------------------- what is missing


def test_a_task_that_is_killed_is_named_and_its_shard_alone_is_submitted_again(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 3)
    setting.wait_rows(tmp_path, 2, 1)
    os.kill(setting.cluster.process(tmp_path / "micro", 2), signal.SIGKILL)
    setting.cluster.wait_state(f"{job}_2", "FAILED")
    setting.detector.takes(0)
    setting.cluster.wait_for(job)
    said = setting.merge_ended(tmp_path)
    assert f"shard 0002: {20 - setting.rows(tmp_path, 2)} runs, its worker ({job}_2) was killed" in said
    assert "Slurm says FAILED" in said
    missing = table(tmp_path / "micro/missing.csv")
    assert {row["shard"] for row in missing} == {"0002"}
    assert len(missing) == 20 - setting.rows(tmp_path, 2)
    again = setting.submit(tmp_path, 3)
    assert set(setting.cluster.wait_for(again)) == {f"{again}_2"}
    setting.merge_ended(tmp_path)
    setting.same(tmp_path)
    assert not (tmp_path / "micro/missing.csv").exists()
    capsys.readouterr()
    assert main([*setting.arguments(tmp_path), "--launcher", "slurm", "--workers", "3"]) == 0
    assert "all 60 runs are done" in capsys.readouterr().out


def test_cancelled_tasks_are_missing_and_stay_cancelled(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 3, "--slurm.array_limit", "1")
    setting.wait_rows(tmp_path, 1, 1)
    assert main(["status", str(tmp_path / "micro")]) == 1
    said = capsys.readouterr().out
    assert "1 of 3 shards running" in said
    assert re.search(rf"job {job}: .*1 RUNNING", said)
    assert re.search(r"shard 0001: \d+ of 20 runs, running: process \d+ on .*runs/s", said)
    run("scancel", f"{job}_3", f"{job}_1")
    setting.detector.takes(0)
    said = setting.merge_ended(tmp_path)
    assert setting.cluster.states(job).get(f"{job}_1") == "CANCELLED"
    assert re.search(r"shard 0001: \d+ runs, stopped: .*Slurm says CANCELLED", said) or re.search(
        r"shard 0001: \d+ runs, stopped; Slurm says CANCELLED", said
    )
    assert re.search(r"shard 0003: 20 runs, not begun; Slurm says (CANCELLED|UNKNOWN)", said)
    assert "shard 0002" not in said


def test_a_run_that_fails_stops_no_other(setting: Setting, tmp_path: Path) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 2)
    setting.wait_rows(tmp_path, 1, 1)
    setting.wait_rows(tmp_path, 2, 1)
    setting.detector.fails_once()
    within(60, lambda: setting.detector.has_failed, "a run has failed")
    setting.detector.takes(0)
    assert sorted(setting.cluster.wait_for(job).values()) == ["COMPLETED", "FAILED"]
    assert "59 of 60 runs" in setting.merge_ended(tmp_path)
    (missing,) = table(tmp_path / "micro/missing.csv")
    assert missing["reason"] == "ArithmeticError: as the test wants it"
    assert main([*setting.arguments(tmp_path)]) == 0
    setting.same(tmp_path)


def test_a_refused_submission_passes_on_what_slurm_says(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--slurm.partition", "nowhere", "--launcher", "slurm", "--workers", "2"]
    assert main([*setting.arguments(tmp_path), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "sbatch: " in line
    assert "invalid partition specified: nowhere" in line
    assert not (tmp_path / "micro/submission.json").exists()


def test_a_second_submission_beside_the_first_is_refused(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 2)
    assert main([*setting.arguments(tmp_path), "--launcher", "slurm", "--workers", "4"]) == 1
    assert f"2 tasks of job {job} are waiting or running" in capsys.readouterr().err
    run("scancel", job)
    setting.detector.takes(0)
    setting.cluster.wait_for(job)


# --------------------------------------------------------------------------------------------- by hand, and locks


def test_an_array_job_that_was_written_by_hand(setting: Setting, tmp_path: Path) -> None:
    words = " ".join(f"'{word}'" if "'" not in word else f'"{word}"' for word in setting.arguments(tmp_path))
    command = f"{sys.executable} {ROOT / 'run_sweep.py'} {words}"
    job = run("sbatch", "--parsable", "--array=0-2", "-o", str(tmp_path / "%a.out"), "--wrap", command)
    assert set(setting.cluster.wait_for(job).values()) == {"COMPLETED"}
    assert main(["merge", str(tmp_path / "micro")]) == 0
    setting.same(tmp_path)


def test_the_lock_of_a_job_on_another_node_is_free_when_slurm_says_so(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    job = run("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 60")
    setting.cluster.wait_state(job, "RUNNING")
    write_holder(path, host="node-17.example", job=job, restarts=0, cluster="tests")
    with pytest.raises(CheckRefusedError, match=rf"node-17\.example \(Slurm job {job}\) is writing"):
        WriterLock(path).__enter__()
    run("scancel", job)
    setting.cluster.wait_state(job, "CANCELLED")
    with WriterLock(path) as lock:
        assert lock.from_elsewhere
    write_holder(path, host="node-17.example", job=job, restarts=0, cluster="another")
    with pytest.raises(CheckRefusedError, match="is writing"):
        WriterLock(path).__enter__()


# --------------------------------------------------------------------------------------------- all of it together


def test_five_hundred_runs_with_a_task_killed_one_requeued_and_some_preempted(setting: Setting, tmp_path: Path) -> None:
    more = ["--num_runs=50", "--sweep.fault.location", "q,v,scores,weights,out"]
    assert main(setting.arguments(tmp_path / "whole", *more)) == 0
    full = Setting(setting.cluster, setting.place, tmp_path / "whole" / "micro")
    assert len(table(full.whole / "runs.csv")) == 500
    full.detector.takes(0.25)
    job = full.submit(tmp_path, 8, *more)
    for shard in range(1, 9):
        full.wait_rows(tmp_path, shard, 1)
    nodes = dict(line.split() for line in run("squeue", "-h", "-r", "-j", job, "-o", "%K %N").splitlines())
    killed, requeued = [int(task) for task, node in nodes.items() if node == "node0"][:2]
    os.kill(full.cluster.process(tmp_path / "micro", killed), signal.SIGKILL)
    run("scontrol", "requeue", f"{job}_{requeued}")
    urgent = run(
        "sbatch", "--parsable", "-p", "urgent", "-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    preempted = [f"{job}_{task}" for task, node in nodes.items() if node == "node1"]
    full.cluster.wait_for(urgent)
    restarts = [run("scontrol", "-o", "show", "job", task) for task in preempted]
    assert all("Restarts=1" in text for text in restarts), restarts
    full.detector.takes(0)
    states = full.cluster.wait_for(job)
    assert states.pop(f"{job}_{killed}") == "FAILED"
    assert set(states.values()) == {"COMPLETED"}
    full.merge_ended(tmp_path)
    assert {row["shard"] for row in table(tmp_path / "micro/missing.csv")} == {f"{killed:04d}"}
    again = full.submit(tmp_path, 8, *more)
    full.cluster.wait_for(again)
    full.merge_ended(tmp_path)
    full.same(tmp_path)


def test_what_was_begun_with_many_workers_is_finished_with_few(setting: Setting, tmp_path: Path) -> None:
    setting.detector.takes(0.25)
    job = setting.submit(tmp_path, 8)
    within(120, lambda: any(setting.rows(tmp_path, shard) for shard in range(1, 9)), "some rows")
    run("scancel", job)
    setting.cluster.wait_for(job)
    setting.merge_ended(tmp_path)
    setting.detector.takes(0)
    again = setting.submit(tmp_path, 2)
    setting.cluster.wait_for(again)
    setting.merge_ended(tmp_path)
    setting.same(tmp_path)


def test_the_scripts_stop_only_what_they_started(cluster: Cluster, tmp_path: Path) -> None:
    subprocess.run([Path(__file__).parent / "stop.sh", tmp_path / "another"], check=True)
    assert "UP" in run("scontrol", "ping")
