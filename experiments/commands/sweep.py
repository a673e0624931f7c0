"""``run_sweep.py``: run a campaign, show its plan, or list the values that can be chosen."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.merge import Merged, merge_campaign
from experiments.campaign.states import MISSING_COLUMNS, missing_runs, shard_states
from experiments.campaign.submission import check_over
from experiments.commands.listing import print_list
from experiments.commands.options import take_flag, take_value, whole_number
from experiments.config import load_config
from experiments.errors import UsageError
from experiments.inputs.plan_check import check_plan
from experiments.launchers.leaving import OF_LAUNCHER, leave
from experiments.launchers.registry import LAUNCHERS, Order
from experiments.machine.slurm_task import SlurmTask
from experiments.machine.stop_request import StopRequest
from experiments.plan.plan import Plan, make_plan
from experiments.plan.shards import MOST_SHARDS, Shard, parse_shard, shard_of
from experiments.tables.csv_file import write_rows

SHOWN_RUNS, SHOWN_SHARDS = 5, 20


MOST_GRACE_SECONDS = 86400


def sweep(arguments: Sequence[str], stop: StopRequest) -> int:
    """Run the campaign that the arguments describe, until ``stop`` asks to leave; return the exit status."""
    options = list(arguments)
    dry_run, overwrite = take_flag(options, "--dry-run"), take_flag(options, "--overwrite")
    quiet = take_flag(options, "--quiet")
    what, shard_text = take_value(options, "--list"), take_value(options, "--shard")
    launcher, workers = take_value(options, "--launcher"), take_value(options, "--workers")
    grace_text = take_value(options, "--grace")
    config = load_config(options)
    if what is not None:
        print_list(what, config)
        return 0
    grace = None if grace_text is None else _grace(grace_text)
    stop.grace = stop.grace if grace is None else grace
    shard = parse_shard(shard_text, os.environ)
    count = _workers(launcher, workers, shard_text)
    overwrite = overwrite and _may_overwrite(CampaignFolder.of(config), shard, alone=count is not None or dry_run)
    chosen = LAUNCHERS[launcher or "local"]
    order = None if count is None else Order(config, options, count, overwrite, grace, quiet)
    if dry_run:
        plan = make_plan(config)
        check_plan(plan)
        _print_plan(plan, shard)
        if order is not None:
            chosen.show(order)
        return 0
    folder = CampaignFolder.of(config)
    try:
        if order is not None:
            launched = chosen.launch(order, stop)
            return _finish(folder, launched) if chosen.waits else launched
        if OF_LAUNCHER not in os.environ:
            check_over(folder)
        # Imported here: what only plans needs no torch.
        from experiments.campaign.worker import run_campaign

        status = run_campaign(
            config, shard=shard, overwrite=overwrite, arguments=arguments, stopping=stop.requested, quiet=quiet
        )
    except KeyboardInterrupt:
        if not stop.requested():
            raise
        return leave(stop)
    if status.stopped:
        return leave(stop)
    if shard.count > 1:
        part = f"shard {shard.number}/{shard.count}"
        print(f"{part}: {status.before + status.done} done, {status.failed} failed; then: run_sweep.py merge "
              f"{status.folder.path}")  # fmt: skip
        return 1 if status.failed else 0
    return _finish(status.folder, 1 if status.failed else 0)


def _may_overwrite(folder: CampaignFolder, shard: Shard, *, alone: bool) -> bool:
    """Return whether ``--overwrite`` applies. It does not to a task that Slurm starts again: its first start did it.

    Raises:
        UsageError: this is one of several tasks of an array, unless ``alone`` (it does not run a shard of the array).
    """
    tasks = os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")
    if tasks != "1" and shard.count > 1 and not alone:
        raise UsageError(
            f"--overwrite: got in one of {tasks} tasks of a Slurm array, each of which would delete what the others "
            f"did. Remove {folder.path} and submit the array without it, or use --launcher slurm --overwrite"
        )
    task = SlurmTask.of(os.environ)
    if task is None or task.restarts == 0:
        return True
    print(f"task {task.job} was started again: --overwrite is ignored, its earlier runs are kept", file=sys.stderr)
    return False


def _grace(text: str) -> int:
    if not whole_number(text, most=MOST_GRACE_SECONDS):
        raise UsageError(f"--grace: got {text}, allowed a whole number of seconds from 1 to {MOST_GRACE_SECONDS:,}")
    return int(text)


def _finish(folder: CampaignFolder, exit_status: int) -> int:
    if not folder.config_file.is_file():
        return exit_status
    # Imported here: a dry run, or a shard, needs no pandas.
    from experiments.report.closing_table import closing_table

    merged = merge_campaign(folder)
    print(closing_table(folder))
    print_merged(folder, merged)
    return exit_status or (1 if merged.missing else 0)


def print_merged(folder: CampaignFolder, merged: Merged) -> None:
    """Print the path of the runs table, and which runs are missing from it."""
    print(f"{merged.finished} of {merged.planned} runs in {folder.file('runs.csv')}")
    if merged.stops:
        print(f"{merged.unneeded} runs were not needed: {merged.stops}")
    if merged.failed:
        print(f"{len(merged.failed)} runs failed, see {folder.file('failures.csv')}; the same command tries them again")
    _print_missing(folder, merged)


def _print_missing(folder: CampaignFolder, merged: Merged) -> None:
    """Print how many runs each shard lacks and why, and write each missing run to ``missing.csv``."""
    path = folder.file("missing.csv")
    if not merged.missing:
        path.unlink(missing_ok=True)
        return
    plan = make_plan(folder.config())
    planned = {run.run_id for run in plan.runs}
    states = shard_states(folder, plan, planned - set(merged.missing))
    missing = missing_runs(folder, plan, states, merged.missing)
    write_rows(path, MISSING_COLUMNS, ((run.run_id, run.shard, run.reason) for run in missing))
    failed = set(merged.failed)
    waiting = [run for run in missing if run.run_id not in failed]
    if waiting:
        print(f"{len(waiting)} runs are not done yet, see {path}")
    counts = Counter((run.shard, run.reason) for run in waiting)
    for (shard, reason), number in list(counts.items())[:SHOWN_SHARDS]:
        print(f"  shard {shard}: {number} runs, {reason}")
    if len(counts) > SHOWN_SHARDS:
        print(f"  ... and {len(counts) - SHOWN_SHARDS} more shards")


def _workers(launcher: str | None, workers: str | None, shard: str | None) -> int | None:
    if launcher is None and workers is None:
        return None
    LAUNCHERS.find(launcher or "local")
    if shard is not None:
        raise UsageError("--shard: cannot be given together with --launcher; the launcher makes the shards")
    if workers is None or not whole_number(workers, most=MOST_SHARDS):
        raise UsageError(f"--workers: got {workers}, allowed a whole number from 1 to {MOST_SHARDS:,}")
    return int(workers)


def _print_plan(plan: Plan, shard: Shard) -> None:
    runs = shard_of(plan, shard) if shard.count > 1 else plan.runs
    print(
        f"campaign {plan.config.name}: {len(plan.runs)} runs" + (f", {len(runs)} in shard" if shard.count > 1 else "")
    )
    for key in plan.axes:
        values = plan.config.sweep[key]
        shown = ", ".join(map(str, values[:8])) + (f", ... ({len(values)})" if len(values) > 8 else "")
        print(f"  {key}: {shown}")
    print(f"  repeats: {'at most ' if plan.config.stop.margin else ''}{plan.config.num_runs}")
    for run in runs[:SHOWN_RUNS]:
        values = ", ".join(f"{key}={value}" for key, value in zip(plan.axes, run.values, strict=True))
        print(f"  {run.run_id} repeat {run.repeat} {values}")
    if len(runs) > SHOWN_RUNS:
        print(f"  ... and {len(runs) - SHOWN_RUNS} more; nothing was written")
