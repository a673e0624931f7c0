"""What a process is to Slurm, and what is made of Slurm's answers."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from experiments.errors import MissingResourceError
from experiments.launchers.leaving import OF_LAUNCHER, leave
from experiments.machine import slurm_task
from experiments.machine.slurm_task import (
    SlurmTask,
    cluster_name,
    is_gone,
    one_question,
    requeue,
    task_state,
    task_states,
)
from experiments.machine.stop_request import StopRequest

TASK = SlurmTask("812_3", 1, "big")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm.alone(tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    cluster_name.cache_clear()
    return fake


@pytest.mark.parametrize(
    ("environment", "task"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, SlurmTask("7", 0, "")),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, SlurmTask("7_2", 0, "")),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "SLURM_CLUSTER_NAME": "c"}, SlurmTask("7", 3, "c")),
    ],
    ids=str,
)
def test_the_task_of_an_environment(environment: dict[str, str], task: SlurmTask | None) -> None:
    assert SlurmTask.of(environment) == task


@pytest.mark.parametrize(
    ("says", "state", "gone"),
    [
        ("JobId=9 JobState=RUNNING Reason=None\n", "RUNNING", False),
        ("JobId=9 JobState=COMPLETING Reason=None\n", "COMPLETING", False),
        ("JobId=9 JobState=SUSPENDED\n", "SUSPENDED", False),
        ("JobId=9 JobState=COMPLETED Reason=None\n", "COMPLETED", True),
        ("JobId=9 JobState=NODE_FAIL\n", "NODE_FAIL", True),
        ("JobId=9 JobState=PENDING\n", "PENDING", True),
        ("JobId=9 JobState=PENDING\nJobId=9 JobState=COMPLETING\n", "COMPLETING", False),
        ("JobId=9 JobState=CANCELLED,COMPLETING\n", "COMPLETING", False),
        ("nothing that is known\n", None, False),
    ],
)
def test_states_and_whether_a_process_may_be_left(slurm: FakeSlurm, says: str, state: str | None, gone: bool) -> None:
    slurm.program("scontrol", says)
    assert task_state("812_3") == state
    assert is_gone("812_3", "big") == gone
    assert slurm.calls("scontrol")[0] == "--oneliner show job 812_3"


def test_a_job_that_slurm_has_forgotten_is_gone(slurm: FakeSlurm) -> None:
    slurm.program("scontrol", complains="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert task_state("1") == slurm_task.UNKNOWN_JOB
    assert is_gone("1", "big")


def test_no_answer_is_no_knowledge(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_gone("1", "big"), "no scontrol"
    assert task_states("1") is None
    slurm.program("scontrol", complains="Unable to contact slurm controller\n", status=1)
    assert task_state("1") is None
    assert not is_gone("1", "big")
    slurm.program("scontrol", "JobState=COMPLETED")
    assert not is_gone("1", "another"), "numbers of another cluster"
    assert not is_gone("1", "")

    def slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("scontrol", 30)

    monkeypatch.setattr(slurm_task.subprocess, "run", slow)
    assert not is_gone("1", "big")


def test_the_name_of_the_cluster_on_a_login_node(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CLUSTER_NAME")
    slurm.program("scontrol", "Configuration data\nClusterName             = huge\nX = y\n")
    assert cluster_name() == "huge"


def test_states_of_an_array(slurm: FakeSlurm) -> None:
    slurm.program("squeue", "812_1 RUNNING\n812_2 PENDING\n")
    assert task_states("812") == {"812_1": "RUNNING", "812_2": "PENDING"}
    slurm.program("squeue", "812_1 RUNNING\n812_1 PENDING\n812_2 PENDING\n812_2 COMPLETING\n")
    assert task_states("812", "900") == {"812_1": "RUNNING", "812_2": "COMPLETING"}
    assert "--jobs=812,900" in slurm.calls("squeue")[-1]


def test_a_failing_squeue_is_not_a_job_that_is_forgotten(slurm: FakeSlurm) -> None:
    slurm.program("squeue", complains="slurm_load_jobs error: Invalid job id specified\n", status=1)
    assert task_states("812") == {}
    slurm.program("squeue", complains="slurm_load_jobs error: Unable to contact slurm controller\n", status=1)
    assert task_states("812") is None


def test_in_a_block_of_one_question_nothing_else_is_asked(slurm: FakeSlurm) -> None:
    slurm.program("scontrol", "JobState=RUNNING")
    slurm.program("squeue", "812_1 COMPLETED\n812_2 RUNNING\n")
    with one_question({"812_1", "812"}) as states:
        assert states == {"812_1": "COMPLETED", "812_2": "RUNNING"}
        assert is_gone("812_1", "big")
        assert not is_gone("812_2", "big")
        assert is_gone("812_7", "big"), "Slurm does not know it any more"
        assert not is_gone("900_1", "big"), "it was not asked for"
    slurm.program("squeue", status=1)
    with one_question({"812"}) as states:
        assert states is None
        assert not is_gone("812_1", "big")
        assert task_state("812_2") is None
    with one_question(set()) as states:
        assert states == {}
    assert len(slurm.calls("squeue")) == 2
    assert slurm.calls("scontrol") == []
    assert task_state("812_2") == "RUNNING", "afterwards Slurm is asked again"


def test_who_only_looks_does_not_wait_long(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.program("squeue")
    waited = []

    def slow(*_: object, timeout: float, **__: object) -> None:
        waited.append(timeout)
        raise subprocess.TimeoutExpired("squeue", timeout)

    monkeypatch.setattr(slurm_task.subprocess, "run", slow)
    with one_question({"812"}) as states:
        assert states is None
    assert waited == [5.0]


# ------------------------------------------------------------------------------------------------- requeue


def test_a_running_task_is_begun_again(slurm: FakeSlurm) -> None:
    slurm.program("scontrol", "JobState=RUNNING")
    assert requeue(TASK) is None
    assert slurm.calls("scontrol")[-1] == "requeue 812_3"


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PENDING"])
def test_a_task_that_is_being_ended_is_not_called_back_to_life(slurm: FakeSlurm, state: str) -> None:
    slurm.program("scontrol", f"JobState={state}")
    assert requeue(TASK) == f"Slurm says {state} of it"
    assert len(slurm.calls("scontrol")) == 1


def test_who_leaves_asks_slurm_and_waits_for_the_end(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.program("scontrol", "JobState=RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            leave(stop)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert slurm.calls("scontrol")[-1] == "requeue 7"
    assert "SIGUSR1: task 7 asked Slurm to start it again" in capsys.readouterr().err


def test_who_leaves_outside_of_slurm_asks_nobody(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.program("scontrol", "JobState=RUNNING")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            leave(stop)
    assert slurm.calls("scontrol") == []


def test_a_worker_of_several_in_one_task_leaves_asking_to_who_began_it(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.program("scontrol", "JobState=RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(OF_LAUNCHER, "1")
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            leave(stop)
    assert slurm.calls("scontrol") == []


@pytest.mark.usefixtures("slurm")
def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(MissingResourceError, match="sbatch: not found"):
        slurm_task.ask("sbatch")
