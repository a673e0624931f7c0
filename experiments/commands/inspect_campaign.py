"""``run_sweep.py status|merge|trace``: look at a campaign from its files alone.

Public names: ``status``, ``merge``, ``trace``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.cells import grid_of
from experiments.commands.options import one_folder
from experiments.commands.sweep import print_merged
from experiments.csv_file import read_keys, read_rows
from experiments.errors import MissingResourceError
from experiments.merge import merge_campaign
from experiments.plan import make_plan
from experiments.result import ExperimentResult, FailureRow, columns
from experiments.writer_lock import is_held
from monitoring import trace_report


def status(arguments: Sequence[str]) -> int:
    """Print how many runs are done, failed and missing; exit status 0 if none is missing, else 1."""
    folder = one_folder("status", arguments)
    plan = make_plan(folder.config())
    planned = {run.run_id for run in plan.runs}
    unneeded = grid_of(folder, plan).unneeded()
    done, rows = set[str](), dict[Path, int]()
    for path in folder.shard_files():
        ids = list(read_keys(path, columns(ExperimentResult)))
        rows[path] = len(ids)
        done.update(planned.intersection(ids))
    failures = {
        row[0]: row[1] for path in folder.shard_files(".failures") for row in read_rows(path, columns(FailureRow))
    }
    failed = {run_id: reason for run_id, reason in failures.items() if run_id not in done}
    print(f"{folder.path}: {len(done)} of {len(planned)} runs done, {len(failed)} failed, "
          f"{len(planned) - len(done) - len(failed) - len(unneeded)} not tried"
          + (f", {len(unneeded)} not needed (stop.margin)" if unneeded else ""))  # fmt: skip
    for path, count in rows.items():
        print(f"  shard {path.stem}: {count} runs{', being written' if is_held(path.with_suffix('.lock')) else ''}")
    for run_id, reason in list(failed.items())[:5]:
        print(f"  failed {run_id}: {reason}")
    return 0 if len(done) + len(unneeded) == len(planned) else 1


def merge(arguments: Sequence[str]) -> int:
    """Merge the shards, print the closing table; exit status 1 if runs are missing."""
    # Imported here: the status of a campaign needs no pandas.
    from experiments.closing_table import closing_table

    folder = one_folder("merge", arguments)
    merged = merge_campaign(folder)
    print(closing_table(folder))
    print_merged(folder, merged)
    return 1 if merged.missing else 0


def trace(arguments: Sequence[str]) -> int:
    """Print where the time of a campaign went; further arguments are those of ``python -m monitoring.trace_report``."""
    folder = one_folder("trace", arguments[:1])
    files = sorted(folder.file("trace").glob("*.jsonl"))
    if not files:
        raise MissingResourceError(f"{folder.path}: has no trace")
    return trace_report.main([*map(str, files), *arguments[1:]])
