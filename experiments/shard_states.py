"""How each shard of a campaign stands, and why a run has no row: from the files alone, and from Slurm where it answers.

    states = shard_states(folder, plan)
    missing_runs(folder, plan, states, run_ids)      # [MissingRun(run_id, shard, reason), ...]

Public names: ``ShardState``, ``MissingRun``, ``shard_states``, ``missing_runs``, ``MISSING_COLUMNS``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.campaign_folder import CampaignFolder
from experiments.csv_file import read_rows
from experiments.plan import Plan
from experiments.result import FailureRow, columns
from experiments.session import Session
from experiments.shards import Shard, shard_numbers
from experiments.slurm_task import UNKNOWN_JOB, task_states
from experiments.submission import Submission
from experiments.writer_lock import read_holder

MISSING_COLUMNS = ("run_id", "shard", "reason")

WAITS = "waits for a failed run of its cell"
"""Why a run was not tried whose cell may end early (``stop.margin``): the next look at the cell needs the other."""


@dataclass(frozen=True)
class ShardState:
    """One shard, as its workers were told to divide the campaign.

    Attributes:
        shard: which.
        planned, done: its runs, and how many of them have a row in any file.
        session: of its last worker; None if none has begun (with this number of shards).
        holder: who is writing it, in words; None if nobody is.
        slurm: the state of its task as ``squeue`` has it; None if it is none, or Slurm does not answer.
    """

    shard: Shard
    planned: int
    done: int
    session: Session | None
    holder: str | None
    slurm: str | None

    @property
    def name(self) -> str:
        """The stem of its files."""
        return self.shard.file_name

    @property
    def rate(self) -> float | None:
        """Runs a second of the worker that is at it; None if there is none, or it has no run yet."""
        if self.holder is None or self.session is None or self.session.ended is not None:
            return None
        seconds, done = time.time() - self.session.begun, self.done - self.session.before
        return done / seconds if done > 0 and seconds > 0 else None

    @property
    def words(self) -> str:
        """How it stands, in words."""
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


def shard_states(folder: CampaignFolder, plan: Plan, finished: set[str]) -> list[ShardState]:
    """Return the shards of the last attempt at a campaign, in order.

    Args:
        folder: its files.
        plan: its runs.
        finished: the ids of those that have a row.
    """
    sessions, submission = Session.read_all(folder), Submission.read(folder)
    attempts = [(session.begun, session.count) for session in sessions.values()]
    slurm: dict[str, str] = {}
    if submission is not None:
        attempts.append((submission.submitted, submission.workers))
        slurm = {} if submission.workers != max(attempts)[1] else task_states(submission.job)
    count = max(attempts)[1] if attempts else 1
    numbers = shard_numbers(plan, count).tolist()
    planned = Counter(numbers)
    done = Counter(number for run, number in zip(plan.runs, numbers, strict=True) if run.run_id in finished)
    return [
        ShardState(
            Shard(number, count),
            planned[number],
            done[number],
            next((session for session in [sessions.get(number)] if session and session.count == count), None),
            read_holder(folder.shards / f"{Shard(number, count).file_name}.lock"),
            _slurm_state(slurm, submission, number),
        )
        for number in range(1, count + 1)
    ]


def _slurm_state(states: dict[str, str], submission: Submission | None, number: int) -> str | None:
    if submission is None or not states or number not in submission.shards:
        return None
    # A task that was cancelled before it began vanishes.
    return states.get(f"{submission.job}_{number}", UNKNOWN_JOB)


def failure_reasons(folder: CampaignFolder) -> dict[str, str]:
    """Return what runs raised, by run id."""
    header = columns(FailureRow)
    return {row[0]: row[1] for path in folder.shard_files(".failures") for row in read_rows(path, header)}


def missing_runs(
    folder: CampaignFolder, plan: Plan, states: list[ShardState], run_ids: Iterable[str]
) -> list[MissingRun]:
    """Return why runs have no row: what they raised, else how their shard stands."""
    numbers = dict(zip((run.run_id for run in plan.runs), shard_numbers(plan, len(states)).tolist(), strict=True))
    failures, missing = failure_reasons(folder), list(run_ids)
    stopping = plan.config.stop.margin is not None
    # Repeats are innermost: a cell goes by the index of its first run.
    cell_of = {run.run_id: run.index - run.repeat for run in plan.runs} if stopping else {}
    held = {cell_of[run_id] for run_id in missing if run_id in failures} if stopping else set()
    found = []
    for run_id in missing:
        state = states[numbers[run_id] - 1]
        tried = state.session is not None and state.session.ended == "done"
        reason = WAITS if tried and cell_of.get(run_id) in held else state.words
        found.append(MissingRun(run_id, state.name, failures.get(run_id, reason)))
    return found
