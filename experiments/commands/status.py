"""``run_sweep.py status``: the progress of a campaign, from its files and from Slurm, if it answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from experiments.campaign.cells import grid_of
from experiments.campaign.states import ShardState, failure_reasons, shard_states
from experiments.campaign.submission import Submission
from experiments.commands.options import one_folder
from experiments.plan.plan import make_plan

SHOWN = 40
"""Up to this many shards are listed one by one; of more, only those that are neither done nor running."""


def status(arguments: Sequence[str]) -> int:
    """Print how many runs are done, failed and missing, the rate and the expected end; return 0 if all are done.

    A run counts as done when its row is on disk, in any shard.
    """
    folder = one_folder("status", arguments)
    plan = make_plan(folder.config())
    finished = folder.finished_runs()
    done = sum(run.run_id in finished for run in plan.runs)
    unneeded = grid_of(folder, plan).unneeded()
    failed = {run_id: reason for run_id, reason in failure_reasons(folder).items() if run_id not in finished}
    states = shard_states(folder, plan, finished, unneeded)
    running = [state for state in states if state.holder is not None]
    print(f"{folder.path}: {done} of {len(plan.runs)} runs done, {len(failed)} failed, "
          + (f"{len(unneeded)} not needed (stop.margin), " if unneeded else "")
          + f"{len(plan.runs) - done - len(failed) - len(unneeded)} missing; "
          f"{len(running)} of {len(states)} shards running")  # fmt: skip
    if expected := _expectation(states):
        print(f"  {expected}")
    submission = Submission.read(folder)
    counts = Counter(state.slurm for state in states if state.slurm)
    if submission and counts:
        print(f"  job {submission.job}: {', '.join(f'{n} {state}' for state, n in counts.most_common())}")
    for state in states if len(states) <= SHOWN else [state for state in states if _needs_attention(state)][:SHOWN]:
        rate = f", {state.rate:.3g} runs/s" if state.rate else ""
        print(f"  shard {state.name}: {state.done} of {state.planned} runs, {state.words}{rate}")
    for run_id, reason in list(failed.items())[:5]:
        print(f"  failed {run_id}: {reason}")
    return 0 if done + len(unneeded) == len(plan.runs) else 1


def _needs_attention(state: ShardState) -> bool:
    return state.done < state.planned and state.holder is None


def _expectation(states: Sequence[ShardState]) -> str | None:
    """Return the rate, and the time when all runs will be done at this rate; None without a rate."""
    rates = [(state, state.rate) for state in states if state.rate is not None]
    total = sum(rate for _, rate in rates)
    if not total:
        return None
    left = sum(state.planned - state.done for state in states)
    # Shards without a worker wait for those that run; one worker does a whole shard.
    seconds = max(left / total, *((state.planned - state.done) / rate for state, rate in rates))
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + seconds))
    return f"{total:.3g} runs/s; expected end {end}, in {_duration(seconds)}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
