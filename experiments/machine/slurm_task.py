"""What this process is to Slurm, what Slurm says of a task, and asking it to begin a task again.

    task = SlurmTask.of(os.environ)          # None outside of Slurm
    task_state(task.job)                     # "RUNNING", "PENDING", ...; UNKNOWN_JOB; None if Slurm does not answer

Jobs are named as ``squeue`` names them: ``812_3`` is task 3 of array job 812. Only ``squeue`` and ``scontrol`` are
asked, so no accounting database is needed; a finished job is known for ``MinJobAge`` seconds.

    with one_question({"812"}) as states:    # {"812_3": "RUNNING", ...}; in the block nothing more is asked
        ...

Public names: ``SlurmTask``, ``ask``, ``task_state``, ``task_states``, ``one_question``, ``is_gone``, ``requeue``,
``cluster_name``, ``UNKNOWN_JOB``.
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
"""How long ``one_question`` waits: who only looks can do without."""

UNKNOWN_JOB = "UNKNOWN"
"""What is said of a job that the controller does not know, or no longer."""

_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING"),
    *("PREEMPTED", "REVOKED", "TIMEOUT", UNKNOWN_JOB),
}
"""States in which no process of the task is left: over, or waiting for its first or next life."""


@dataclass(frozen=True)
class _Answers:
    """The jobs that were asked for at once, and the states of their tasks; None: no answer."""

    jobs: frozenset[str]
    states: dict[str, str] | None


_ANSWERS: ContextVar[_Answers | None] = ContextVar("answers", default=None)


@dataclass(frozen=True)
class SlurmTask:
    """A task of an array job, or a job without array.

    Attributes:
        job: its name, e.g. ``812_3``.
        restarts: how often Slurm has begun it again.
        cluster: which cluster's numbers these are.
    """

    job: str
    restarts: int
    cluster: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> SlurmTask | None:
        """Return the task that an environment belongs to."""
        # The last task of an array bears the number of the array as its own, so SLURM_JOB_ID alone says too little.
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
        if not job:
            return None
        restarts = environment.get("SLURM_RESTART_COUNT", "0")
        return cls(job, int(restarts) if restarts.isdigit() else 0, environment.get("SLURM_CLUSTER_NAME", ""))


def array_place(environment: Mapping[str, str], most: int) -> tuple[int, int] | None:
    """Return which task of an array this is, from 1, and of how many; None outside of an array.

    Raises:
        UsageError: variables that make no sense, or more than ``most`` tasks.
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
    """Run one of Slurm's programs, for so many seconds at most.

    Raises:
        MissingResourceError: it is not installed, or does not answer.
    """
    if shutil.which(program) is None:
        raise MissingResourceError(f"{program}: not found; Slurm's programs are needed on this machine")
    try:
        return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise MissingResourceError(f"{program}: no answer within {seconds:g} s") from error


def task_state(job: str) -> str | None:
    """Return the state of one task; None if Slurm is not here or does not answer."""
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
    """Return the states of the tasks of array jobs by their names, of those that Slurm knows.

    None if Slurm is not here, does not answer in so many seconds, or answers with an error.
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
    """Ask ``squeue`` once for the tasks of all these jobs; ``is_gone`` and ``task_state`` ask nothing in the block.

    Yields:
        What ``task_states`` returns. If that is None, no state is known in the block, and nobody is gone.
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
    """Whether Slurm says that no process of a task is left; False if it cannot be asked or is another cluster."""
    known = _ANSWERS.get()
    silent = known is not None and known.states is None
    if silent or not cluster or cluster != cluster_name():
        return False
    state = task_state(job)
    return state is not None and state in _ENDED


@functools.cache
def cluster_name() -> str | None:
    """Return the name of the cluster that this machine's Slurm belongs to; None without one."""
    if name := os.environ.get("SLURM_CLUSTER_NAME"):
        return name
    try:
        answer = ask("scontrol", "show", "config")
    except MissingResourceError:
        return None
    found = re.search(r"^ClusterName\s*=\s*(\S+)", answer.stdout, re.MULTILINE)
    return found[1] if found else None


def requeue(task: SlurmTask) -> str | None:
    """Ask Slurm to begin a task again if it still counts it as running; return why not, None if it will.

    A task that is being cancelled counts as completing; asking then would call it back to life.
    """
    state = task_state(task.job)
    if state != "RUNNING":
        return f"Slurm says {state or 'nothing'} of it"
    answer = ask("scontrol", "requeue", task.job)
    return answer.stderr.strip() or f"scontrol requeue: exit status {answer.returncode}" if answer.returncode else None
