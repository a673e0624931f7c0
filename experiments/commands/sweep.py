"""``run_sweep.py``: run a campaign, show its plan, or list what can be chosen.

Public name: ``sweep``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType

from experiments.campaign import run_campaign
from experiments.campaign_folder import CampaignFolder
from experiments.closing_table import closing_table
from experiments.commands.listing import print_list
from experiments.commands.local_launcher import launch_local
from experiments.commands.options import take_flag, take_value, whole_number
from experiments.config import load_config
from experiments.config_sections import check_choice
from experiments.contexts import check_plan
from experiments.errors import UsageError
from experiments.merge import Merged, merge_campaign
from experiments.plan import Plan, make_plan
from experiments.shards import Shard, parse_shard, shard_of

SHOWN_RUNS = 5


def sweep(arguments: Sequence[str]) -> int:
    """Run what the arguments describe; return the exit status."""
    options = list(arguments)
    dry_run, overwrite = take_flag(options, "--dry-run"), take_flag(options, "--overwrite")
    what, shard_text = take_value(options, "--list"), take_value(options, "--shard")
    launcher, workers = take_value(options, "--launcher"), take_value(options, "--workers")
    config = load_config(options)
    if what is not None:
        print_list(what, config)
        return 0
    shard = parse_shard(shard_text, os.environ)
    count = _workers(launcher, workers, shard_text)
    if dry_run:
        _print_plan(make_plan(config), shard)
        return 0
    if count is not None:
        return _finish(CampaignFolder.of(config), launch_local(config, options, count, overwrite=overwrite))
    signal.signal(signal.SIGTERM, _interrupt)
    status = run_campaign(config, shard=shard, overwrite=overwrite, arguments=arguments)
    if shard.count > 1:
        part = f"shard {shard.number}/{shard.count}"
        print(f"{part}: {status.before + status.done} done, {status.failed} failed; then: run_sweep.py merge "
              f"{status.folder.path}")  # fmt: skip
        return 1 if status.failed else 0
    return _finish(status.folder, 1 if status.failed else 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat a request to terminate as an interruption: what is open is closed, and the lock is released."""
    raise KeyboardInterrupt


def _finish(folder: CampaignFolder, exit_status: int) -> int:
    if not folder.config_file.is_file():
        return exit_status
    merged = merge_campaign(folder)
    print(closing_table(folder))
    print_merged(folder, merged)
    return exit_status or (1 if merged.missing else 0)


def print_merged(folder: CampaignFolder, merged: Merged) -> None:
    """Print where the tables are and what is missing from them."""
    print(f"{merged.finished} of {merged.planned} runs in {folder.file('runs.csv')}")
    if merged.failed:
        print(f"{len(merged.failed)} runs failed, see {folder.file('failures.csv')}; the same command tries them again")
    waiting = [run_id for run_id in merged.missing if run_id not in set(merged.failed)]
    if waiting:
        shown = ", ".join(waiting[:SHOWN_RUNS]) + (", ..." if len(waiting) > SHOWN_RUNS else "")
        print(f"{len(waiting)} runs are not done yet: {shown}")


def _workers(launcher: str | None, workers: str | None, shard: str | None) -> int | None:
    if launcher is None and workers is None:
        return None
    if launcher == "slurm":
        raise UsageError(
            "--launcher: slurm is not available in this version; submit an array job whose tasks run "
            "`python run_sweep.py --config FILE`: each takes its shard from SLURM_ARRAY_TASK_ID"
        )
    check_choice("--launcher", launcher or "local", ("local",))
    if shard is not None:
        raise UsageError("--shard: cannot be given together with --launcher; the launcher makes the shards")
    if workers is None or not whole_number(workers) or int(workers) < 1:
        raise UsageError(f"--workers: got {workers}, allowed a whole number of 1 or more")
    return int(workers)


def _print_plan(plan: Plan, shard: Shard) -> None:
    check_plan(plan)
    runs = shard_of(plan, shard)
    print(
        f"campaign {plan.config.name}: {len(plan.runs)} runs" + (f", {len(runs)} in shard" if shard.count > 1 else "")
    )
    for key in plan.axes:
        values = plan.config.sweep[key]
        shown = ", ".join(map(str, values[:8])) + (f", ... ({len(values)})" if len(values) > 8 else "")
        print(f"  {key}: {shown}")
    print(f"  repeats: {plan.config.num_runs}")
    for run in runs[:SHOWN_RUNS]:
        values = ", ".join(f"{key}={value}" for key, value in zip(plan.axes, run.values, strict=True))
        print(f"  {run.run_id} repeat {run.repeat} {values}")
    if len(runs) > SHOWN_RUNS:
        print(f"  ... and {len(runs) - SHOWN_RUNS} more; nothing was written")
