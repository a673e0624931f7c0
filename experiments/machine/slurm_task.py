"""Slurm from inside a task: which task this process is, the state of any task, and requests to start it again.

    task = SlurmTask.of(os.environ)          # None outside of Slurm
    task_state(task.job)                     # "RUNNING", "PENDING", ...; UNKNOWN_JOB; None if Slurm does not answer

Names of jobs are those of ``squeue``: ``812_3`` is task 3 of array job 812. This module calls only ``squeue`` and
``scontrol``, so it needs no accounting database; Slurm knows a finished job for ``MinJobAge`` seconds.

    with one_question({"812"}) as states:    # {"812_3": "RUNNING", ...}; the block does not call Slurm again
        ...
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from experiments.errors import MissingResourceError, UsageError

ANSWER_SECONDS = 30.0
LOOK_SECONDS = 5.0
"""How long ``one_question`` waits: ``status`` can do without Slurm's answer."""

UNKNOWN_JOB = "UNKNOWN"
"""The state of a job that the controller never knew, or has forgotten."""

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", UNKNOWN_JOB),
}
"""States in which no process of the task is left: it is over, or waits to start or start again."""


@dataclass(frozen=True)
class _Answers:
    """The jobs of one question, and the states of their tasks; None if Slurm did not answer."""

    jobs: frozenset[str]
    states: dict[str, str] | None


_ANSWERS: ContextVar[_Answers | None] = ContextVar("answers", default=None)


@dataclass(frozen=True)
class SlurmTask:
    """A task of an array job, or a job without array.

    Attributes:
        job: its name, e.g. ``812_3``.
        restarts: how often Slurm has started it again.
        cluster: the name of the cluster whose job numbers these are.
    """

    job: str
    restarts: int
    cluster: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmTask | None:
        """Return the task that an environment belongs to."""
        # The job number of an array's last task is the number of the array, so SLURM_JOB_ID alone is ambiguous.
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
        if not job:
            return None
        restarts = environment.get("SLURM_RESTART_COUNT", "0")
        return cls(job, int(restarts) if restarts.isdigit() else 0, environment.get("SLURM_CLUSTER_NAME", ""))


def array_place(environment: Mapping[str, str], most: int) -> tuple[int, int] | None:
    """Return the position of this task in its array (from 1), and the array's size; None outside an array.

    Raises:
        UsageError: the variables contradict each other, or name more than ``most`` tasks.
    """
    task, count = environment.get("SLURM_ARRAY_TASK_ID"), environment.get("SLURM_ARRAY_TASK_COUNT")
    if task is None or count is None:
        return None
    first, step = environment.get("SLURM_ARRAY_TASK_MIN", "0"), environment.get("SLURM_ARRAY_TASK_STEP", "1")
    numbers = [int(text) if re.fullmatch(r"\d+", text) else -1 for text in (task, count, first, step)]
    if min(numbers) >= 0 and numbers[3] > 0 and numbers[1] <= most:
        number, rest = divmod(numbers[0] - numbers[2], numbers[3])
        if rest == 0 and 1 <= number + 1 <= numbers[1]:
            return number + 1, numbers[1]
    raise UsageError(
        f"SLURM_ARRAY_TASK_ID: task {task!r} does not fit an array of {count!r} from {first!r} by {step!r}"
    )


def ask(program: str, *arguments: str, seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs, for ``seconds`` at most.

    Raises:
        MissingResourceError: the program is not installed, or does not answer.
    """
    if shutil.which(program) is None:
        raise MissingResourceError(f"{program}: not found; Slurm's programs are needed on this machine")
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise MissingResourceError(f"{program}: no answer within {seconds:g} s") from error


def task_state(job: str) -> str | None:
    """Return the state of one task; None if Slurm is not installed or does not answer."""
    known = _ANSWERS.get()
    if known is not None:
        asked = known.states is not None and _array_of(job) in known.jobs
        return (known.states or {}).get(job, UNKNOWN_JOB) if asked else None
    try:
        answer = ask("scontrol", "--oneliner", "show", "job", job)
    except MissingResourceError:
        return None
    if answer.returncode:
        return UNKNOWN_JOB if "Invalid job id" in answer.stderr else None
    found = re.findall(r"\bJobState=(\S+)", answer.stdout)
    states = [state for states in found for state in re.split(r"[,+]", states)]
    # A task that was begun again can be listed twice: ending here, waiting there.
    return next((state for state in states if state not in _ENDED), states[0] if states else None)


def task_states(*jobs: str, seconds: float = ANSWER_SECONDS) -> dict[str, str] | None:
    """Return the states of the tasks of array jobs, by the name of each task that Slurm knows.

    Return None if Slurm is not installed, does not answer within ``seconds``, or answers with an error.
    """
    if not jobs:
        return {}
    arguments = ("--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i %T")
    try:
        answer = ask("squeue", *arguments, seconds=seconds)
    except MissingResourceError:
        return None
    if answer.returncode:
        return {} if "Invalid job id" in answer.stderr else None
    found: dict[str, str] = {}
    for words in (line.split() for line in answer.stdout.splitlines()):
        # A task that was begun again can be listed twice: ending here, waiting there.
        if len(words) == 2 and found.get(words[0], UNKNOWN_JOB) in _ENDED:
            found[words[0]] = words[1]
    return found


@contextlib.contextmanager
def one_question(jobs: Collection[str]) -> Iterator[dict[str, str] | None]:
    """Ask ``squeue`` once about all these jobs; in the block, ``is_gone`` and ``task_state`` use its answer.

    Yields:
        The result of ``task_states``. If it is None, no state is known in the block, and ``is_gone`` is always false.
    """
    arrays = frozenset(map(_array_of, jobs))
    answers = _Answers(arrays, task_states(*sorted(arrays), seconds=LOOK_SECONDS))
    token = _ANSWERS.set(answers)
    try:
        yield answers.states
    finally:
        _ANSWERS.reset(token)


def _array_of(job: str) -> str:
    return job.partition("_")[0]


def is_gone(job: str, cluster: str) -> bool:
    """Return whether Slurm says that no process of a task is left; False without an answer or for another cluster."""
    known = _ANSWERS.get()
    silent = known is not None and known.states is None
    if silent or not cluster or cluster != cluster_name():
        return False
    state = task_state(job)
    return state is not None and state in _ENDED


@functools.cache
def cluster_name() -> str | None:
    """Return the name of the cluster that this machine belongs to; None without Slurm."""
    if name := os.environ.get("SLURM_CLUSTER_NAME"):
        return name
    try:
        answer = ask("scontrol", "show", "config")
    except MissingResourceError:
        return None
    found = re.search(r"^ClusterName\s*=\s*(\S+)", answer.stdout, re.MULTILINE)
    return found[1] if found else None


def requeue(task: SlurmTask) -> str | None:
    """Ask Slurm to start a task again if it counts as running; return None on success, else the reason for refusal.

    A task that is being cancelled counts as completing; a request would then revive it.
    """
    state = task_state(task.job)
    if state != "RUNNING":
        return f"Slurm says {state or 'nothing'} of it"
    answer = ask("scontrol", "requeue", task.job)
    return answer.stderr.strip() or f"scontrol requeue: exit status {answer.returncode}" if answer.returncode else None
