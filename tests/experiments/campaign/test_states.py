"""How shards stand and why runs are missing, from files that workers leave, whole or killed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from lock_holders import write_dead_holder, write_elsewhere, write_holder

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.session import Session
from experiments.campaign.states import WAITS, missing_runs, shard_states, shards_left
from experiments.campaign.submission import Submission
from experiments.commands.status import _expectation
from experiments.config import ExperimentConfig, StopConfig
from experiments.errors import CheckRefusedError
from experiments.launchers.local import RowCounter
from experiments.machine.slurm_task import cluster_name
from experiments.plan.plan import Plan, make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.tables.csv_file import CsvFile, write_rows
from experiments.tables.schema import ExperimentResult, FailureRow, cells, columns


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    for key in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{key}", raising=False)
    return FakeSlurm.alone(tmp_path / "bin", monkeypatch)


@pytest.fixture
def plan() -> Plan:
    return make_plan(ExperimentConfig(num_runs=10, sweep={"fault.bit": [3, 30]}))


@pytest.fixture
def folder(tmp_path: Path, slurm: FakeSlurm, plan: Plan) -> CampaignFolder:
    folder = CampaignFolder(tmp_path / "x")
    folder.begin(plan.config, plan)
    return folder


def session(folder: CampaignFolder, number: int, count: int = 4, *, age: float = 0.0, before: int = 0) -> Session:
    begun = dataclasses.replace(Session.begin(folder, Shard(number, count), 5, before), begun=time.time() - age)
    begun._write(folder)
    return begun


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate is runs by seconds until now: on a busy machine a second can pass within a test."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)


def words(folder: CampaignFolder, plan: Plan, finished: set[str] | None = None) -> dict[str, str]:
    return {state.name: state.words for state in shard_states(folder, plan, finished or set())}


def test_a_campaign_nobody_has_begun_is_one_shard(folder: CampaignFolder, plan: Plan) -> None:
    (state,) = shard_states(folder, plan, set())
    assert (state.planned, state.done, state.words, state.rate) == (20, 0, "not begun", None)


def test_how_workers_left(folder: CampaignFolder, plan: Plan) -> None:
    session(folder, 1).end(folder, "done", 4, 1)
    session(folder, 2).end(folder, "stopped", 2, 0, "SIGTERM: the pass in hand was given up")
    session(folder, 3)
    said = words(folder, plan)
    assert said["0001"] == "every run was tried"
    assert said["0002"] == "stopped: SIGTERM: the pass in hand was given up"
    assert said["0003"].startswith("its worker (process ")
    assert said["0003"].endswith("was killed or its node lost")
    assert said["0004"] == "not begun"
    finished = {run.run_id for run in shard_of(plan, Shard(3, 4))}
    assert words(folder, plan, finished)["0003"] == "done"


def test_who_is_writing(folder: CampaignFolder, plan: Plan) -> None:
    for number in (1, 2):
        session(folder, number)
    write_holder(folder.shards / "0001.lock")
    write_dead_holder(folder.shards / "0002.lock")
    said = words(folder, plan)
    assert said["0001"].startswith("running: process ")
    assert "was killed" in said["0002"]


def test_slurm_adds_what_it_knows(folder: CampaignFolder, plan: Plan, slurm: FakeSlurm) -> None:
    Submission("812", "813", 4, [1, 2, 4], time.time() + 5).write(folder)
    slurm.program("squeue", "812_1 PENDING\n812_2 CANCELLED\n")
    said = words(folder, plan)
    assert said["0001"] == "not begun; Slurm says PENDING"
    assert said["0002"] == "not begun; Slurm says CANCELLED"
    assert said["0003"] == "not begun", "it was no task of that submission"
    assert said["0004"] == "not begun; Slurm says UNKNOWN", "a task that is cancelled before it begins vanishes"


def test_the_last_attempt_says_how_many_shards_there_are(folder: CampaignFolder, plan: Plan, slurm: FakeSlurm) -> None:
    slurm.program("squeue", "812_1 COMPLETED\n")
    Submission("812", "813", 8, [1], time.time() - 100).write(folder)
    session(folder, 8, 8, age=90)
    session(folder, 1, 2, age=10)
    states = shard_states(folder, plan, set())
    assert [state.shard for state in states] == [Shard(1, 2), Shard(2, 2)]
    assert [state.slurm for state in states] == [None, None], "those of another attempt say nothing of these"


def test_why_runs_are_missing(folder: CampaignFolder, plan: Plan) -> None:
    session(folder, 1, 2).end(folder, "done", 9, 1)
    one, two = (shard_of(plan, Shard(number, 2)) for number in (1, 2))
    row = cells(FailureRow(run_id=one[0].run_id, exception="ValueError: no", traceback="logs/x.txt"))
    write_rows(folder.shards / "0001.failures.csv", columns(FailureRow), [row])
    states = shard_states(folder, plan, set())
    first, second = missing_runs(folder, plan, states, [one[0].run_id, two[0].run_id])
    assert (first.shard, first.reason) == ("0001", "ValueError: no")
    assert (second.shard, second.reason) == ("0002", "not begun")


@pytest.mark.parametrize("ended", ["done", None])
def test_a_run_that_waits_for_a_failed_one_of_its_cell_says_so(tmp_path: Path, ended: str | None) -> None:
    config = ExperimentConfig(num_runs=10, sweep={"fault.bit": [3, 30]}, stop=StopConfig(margin=0.1, minimum=5))
    plan, folder = make_plan(config), CampaignFolder(tmp_path / "stop")
    folder.begin(config, plan)
    begun = session(folder, 1, 1)
    if ended:
        begun.end(folder, ended, 4, 1)
    row = cells(FailureRow(run_id=plan.runs[2].run_id, exception="ValueError: no", traceback="logs/x.txt"))
    write_rows(folder.shards / "0001.failures.csv", columns(FailureRow), [row])
    missing = [plan.runs[index].run_id for index in (2, 7, 15)]
    found = missing_runs(folder, plan, shard_states(folder, plan, set()), missing)
    state = found[2].reason
    assert [run.reason for run in found] == ["ValueError: no", WAITS if ended else state, state]
    assert state.startswith("every run was tried" if ended else "its worker (")


@pytest.mark.usefixtures("stopped_clock")
def test_rate_and_expected_end(folder: CampaignFolder, plan: Plan) -> None:
    for number, age in ((1, 10.0), (2, 20.0)):
        session(folder, number, age=age, before=1)
        write_holder(folder.shards / f"{number:04d}.lock")
    finished = {run.run_id for number in (1, 2) for run in shard_of(plan, Shard(number, 4))[:3]}
    states = shard_states(folder, plan, finished)
    # Two runs of these sessions each, in 10 and 20 seconds.
    assert [states[0].rate, states[1].rate] == pytest.approx([0.2, 0.1], rel=0.05)
    said = _expectation(states)
    assert said is not None
    # 14 runs are left at 0.3 a second: 47 s; shard 2 alone has 2 left at 0.1: 20 s.
    assert said.startswith("0.3 runs/s; expected end ")
    assert said.endswith(("in 0 min 46 s", "in 0 min 47 s"))
    for state in states:
        (folder.shards / f"{state.name}.lock").unlink(missing_ok=True)
    assert _expectation(shard_states(folder, plan, finished)) is None


def test_a_holder_on_another_machine_counts_as_running_unless_slurm_says_it_is_gone(
    folder: CampaignFolder, plan: Plan, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(folder, 1, 1)
    write_elsewhere(folder.shards / "0001.lock")
    assert words(folder, plan)["0001"] == "running: " + "process " + words(folder, plan)["0001"].split()[2] + (
        " on node-17.example (Slurm job 812_3)"
    )
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    slurm.program("squeue", "812_3 NODE_FAIL\n")
    cluster_name.cache_clear()
    assert "was killed or its node lost" in words(folder, plan)["0001"]


def test_slurm_is_asked_once_for_all_shards_and_not_again_if_it_does_not_answer(
    folder: CampaignFolder, plan: Plan, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    cluster_name.cache_clear()
    Submission("813", None, 4, [1, 2, 3, 4], time.time() + 5).write(folder)
    for number in (1, 2, 3):
        session(folder, number)
        write_elsewhere(folder.shards / f"{number:04d}.lock")
    slurm.program("scontrol", "JobState=NODE_FAIL")
    slurm.program("squeue", complains="Unable to contact slurm controller\n", status=1)
    assert [word.split()[0] for word in words(folder, plan).values()] == ["running:"] * 3 + ["not"]
    assert len(slurm.calls("squeue")) == 1
    slurm.program("squeue", "813_1 RUNNING\n813_4 PENDING\n812_3 COMPLETED\n")
    said = words(folder, plan)
    assert "was killed" in said["0001"]
    assert said["0001"].endswith("; Slurm says RUNNING")
    assert said["0004"] == "not begun; Slurm says PENDING"
    assert len(slurm.calls("squeue")) == 2
    assert "--jobs=812,813" in slurm.calls("squeue")[-1]
    assert slurm.calls("scontrol") == []


@pytest.mark.usefixtures("stopped_clock")
def test_runs_that_are_not_needed_are_no_work_that_was_done(folder: CampaignFolder, plan: Plan) -> None:
    session(folder, 1, 1, age=10.0, before=2)
    write_holder(folder.shards / "0001.lock")
    ids = [run.run_id for run in plan.runs]
    (state,) = shard_states(folder, plan, set(ids[:6]), set(ids[10:]))
    assert (state.planned, state.done, state.rows) == (20, 16, 6)
    # Four rows in ten seconds; four runs are left.
    assert state.rate == pytest.approx(0.4, rel=0.05)
    assert str(_expectation([state])).startswith("0.4 runs/s; expected end ")
    assert str(_expectation([state])).endswith("in 0 min 10 s")


def test_shards_with_something_left(folder: CampaignFolder, plan: Plan) -> None:
    assert shards_left(folder, plan, 4) == [1, 2, 3, 4]
    rows = [cells(ExperimentResult(run_id=run.run_id)) for n in (1, 3) for run in shard_of(plan, Shard(n, 4))]
    write_rows(folder.shards / "0001.csv", columns(ExperimentResult), rows)
    assert shards_left(folder, plan, 4) == [2, 4]


def test_a_cell_that_has_ended_leaves_nothing_to_do(tmp_path: Path) -> None:
    stop = StopConfig(margin=0.4, minimum=20, rate="detected")
    plan = make_plan(ExperimentConfig(num_runs=100, stop=stop, sweep={"fault.bit": [3, 30]}))
    folder = CampaignFolder(tmp_path / "y")
    rows = [cells(ExperimentResult(run_id=run.run_id)) for run in plan.runs[:50]]
    write_rows(folder.shards / "0001.csv", columns(ExperimentResult), rows)
    assert shards_left(folder, plan, 2) == [2], "50 rows without a detection are enough for that margin"


@pytest.mark.parametrize("name", ["submission.json", "shards/0001.session.json"])
def test_a_file_that_cannot_be_read_is_named(folder: CampaignFolder, plan: Plan, name: str) -> None:
    folder.file(name).parent.mkdir(exist_ok=True)
    folder.file(name).write_text("{}")
    with pytest.raises(CheckRefusedError, match=name):
        shard_states(folder, plan, set())


# ------------------------------------------------------------------------------------------------- counting rows


def test_rows_are_counted_as_they_come(folder: CampaignFolder) -> None:
    header = columns(FailureRow)
    row = ["a", 'ValueError: on two\nlines, with "quotes"', "x"]
    with CsvFile(folder.shards / "0001.failures.csv", header) as failures:
        failures.append(row)
        counter = RowCounter(folder)
        assert counter.count() == 0, "failures of before do not count"
        failures.append(row, row)
        assert counter.count() == 2
    with CsvFile(folder.shards / "0002.csv", columns(ExperimentResult)) as runs:
        for number in range(1, 4):
            runs.append(cells(ExperimentResult(run_id=str(number))))
            assert counter.count() == 2 + number
    with (folder.shards / "0002.csv").open("a") as stream:
        stream.write("torn")
        stream.flush()
        assert counter.count() == 5
    write_rows(folder.shards / "0002.csv", columns(ExperimentResult), [cells(ExperimentResult(run_id="1"))])
    assert counter.count() == 3, "a file that was replaced is read again"
