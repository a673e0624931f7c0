"""The state of each shard of a campaign, and why a run has no row: from the files, and from Slurm if it answers.

states = shard_states(folder, plan)
missing_runs(folder, plan, states, run_ids)      # [MissingRun(run_id, shard, reason), ...]
shards_left(folder, plan, 16)                    # the numbers of those of 16 shards that still have runs to do
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass

from experiments.campaign.cells import grid_of
from experiments.campaign.folder import CampaignFolder
from experiments.campaign.lock import read_holder
from experiments.campaign.session import Session
from experiments.campaign.submission import Submission
from experiments.machine.slurm_task import UNKNOWN_JOB, one_question
from experiments.plan.plan import Plan
from experiments.plan.shards import Shard, shard_numbers
from experiments.tables.csv_file import read_rows
from experiments.tables.schema import FailureRow, columns

MISSING_COLUMNS = ("run_id", "shard", "reason")

WAITS = "waits for a failed run of its cell"
"""Why a run was not tried if its cell may end early (``stop.margin``): the next look needs the failed run first."""


@dataclass(frozen=True)
class ShardState:
    """The state of one shard, in the division that its workers use.

    Attributes:
        shard: its number and their count.
        planned: how many runs it has.
        done: how many of them have a row in any file, or are no longer needed.
        rows: how many of them have a row.
        session: the session of its last worker; None if no worker has begun (with this number of shards).
        holder: a description of the process that writes it; None if no process does.
        slurm: the state of its task according to ``squeue``; None without a task, or if Slurm does not answer.
    """

    shard: Shard
    planned: int
    done: int
    rows: int
    session: Session | None
    holder: str | None
    slurm: str | None

    @property
    def name(self) -> str:
        """The stem of its files."""
        return self.shard.file_name

    @property
    def rate(self) -> float | None:
        """Runs per second of the current worker; None if no worker runs, or it has done no run yet."""
        if self.holder is None or self.session is None or self.session.ended is not None:
            return None
        seconds, done = time.time() - self.session.begun, self.rows - self.session.before
        return done / seconds if done > 0 and seconds > 0 else None

    @property
    def words(self) -> str:
        """The state of the shard, in words."""
        slurm = f"; Slurm says {self.slurm}" if self.slurm else ""
        if self.holder is not None:
            return f"running: {self.holder}{slurm}"
        if self.done == self.planned:
            return "done"
        if self.session is None:
            return f"not begun{slurm}"
        if self.session.ended is None:
            who = self.session.job or f"process {self.session.pid} on {self.session.host}"
            return f"its worker ({who}) was killed or its node lost{slurm}"
        if self.session.ended == "done":
            return f"every run was tried{slurm}"
        reason = f": {self.session.reason}" if self.session.reason else ""
        return f"{self.session.ended}{reason}{slurm}"


@dataclass(frozen=True)
class MissingRun:
    """A run without a row, the stem of the shard it belongs to, and why it is missing."""

    run_id: str
    shard: str
    reason: str


def shard_states(
    folder: CampaignFolder, plan: Plan, finished: Set[str], unneeded: Set[str] = frozenset()
) -> list[ShardState]:
    """Return the states of the shards of the last attempt at a campaign, in order.

    Args:
        folder: the campaign's folder.
        plan: the campaign's plan.
        finished: the ids of runs that have a row.
        unneeded: the ids of runs that need no row any more.
    """
    sessions, submission = Session.read_all(folder), Submission.read(folder)
    attempts = [(session.begun, session.count) for session in sessions.values()]
    if submission is not None:
        attempts.append((submission.submitted, submission.workers))
    count = max(attempts)[1] if attempts else 1
    numbers = _shard_of_each(plan, count)
    planned = Counter(numbers)
    rows = Counter(number for run, number in zip(plan.runs, numbers, strict=True) if run.run_id in finished)
    spared = unneeded - finished
    others = Counter(number for run, number in zip(plan.runs, numbers, strict=True) if run.run_id in spared)
    submitted = submission if submission is not None and submission.workers == count else None
    jobs = _jobs_of_locks(folder) | ({submitted.job} if submitted else set())
    with one_question(jobs) as slurm:
        tasks = {task: state for task, state in (slurm or {}).items() if submitted and _is_of(task, submitted)}
        return [
            ShardState(
                Shard(number, count),
                planned[number],
                rows[number] + others[number],
                rows[number],
                next((session for session in [sessions.get(number)] if session and session.count == count), None),
                read_holder(folder.shards / f"{Shard(number, count).file_name}.lock"),
                _slurm_state(tasks, submitted, number),
            )
            for number in range(1, count + 1)
        ]


def _shard_of_each(plan: Plan, count: int) -> list[int]:
    """Return the number of the shard of every run, in the order of the plan."""
    return [1] * len(plan.runs) if count == 1 else shard_numbers(plan, count).tolist()


def _jobs_of_locks(folder: CampaignFolder) -> set[str]:
    """Return the Slurm jobs that the locks of the shards name."""
    found = set()
    for path in folder.shards.glob("*.lock"):
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            # The lock was released meanwhile, or is damaged; read_holder handles both.
            continue
        if isinstance(holder, dict) and isinstance(holder.get("job"), str):
            found.add(holder["job"])
    return found


def _is_of(task: str, submission: Submission) -> bool:
    return task.startswith(f"{submission.job}_")


def _slurm_state(tasks: dict[str, str], submission: Submission | None, number: int) -> str | None:
    if submission is None or not tasks or number not in submission.shards:
        return None
    # A task that was cancelled before it began disappears from squeue.
    return tasks.get(f"{submission.job}_{number}", UNKNOWN_JOB)


def shards_left(folder: CampaignFolder, plan: Plan, count: int) -> list[int]:
    """Return the numbers of the shards (of ``count``) that still have runs to do, in rising order."""
    done = folder.finished_runs() | grid_of(folder, plan).unneeded()
    numbers = _shard_of_each(plan, count)
    return sorted({number for run, number in zip(plan.runs, numbers, strict=True) if run.run_id not in done})


def failure_reasons(folder: CampaignFolder) -> dict[str, str]:
    """Return the error of each failed run, by run id."""
    header = columns(FailureRow)
    return {row[0]: row[1] for path in folder.shard_files(".failures") for row in read_rows(path, header)}


def missing_runs(
    folder: CampaignFolder, plan: Plan, states: list[ShardState], run_ids: Iterable[str]
) -> list[MissingRun]:
    """Return why runs have no row: the error that a run raised, or else the state of its shard."""
    numbers = dict(zip((run.run_id for run in plan.runs), _shard_of_each(plan, len(states)), strict=True))
    failures, missing = failure_reasons(folder), list(run_ids)
    stopping = plan.config.stop.margin is not None
    # Repeats are innermost: the index of its first run identifies a cell.
    cell_of = {run.run_id: run.index - run.repeat for run in plan.runs} if stopping else {}
    held = {cell_of[run_id] for run_id in missing if run_id in failures} if stopping else set()
    found = []
    for run_id in missing:
        state = states[numbers[run_id] - 1]
        tried = state.session is not None and state.session.ended == "done"
        reason = WAITS if tried and cell_of.get(run_id) in held else state.words
        found.append(MissingRun(run_id, state.name, failures.get(run_id, reason)))
    return found
