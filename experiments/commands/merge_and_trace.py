"""``run_sweep.py merge|trace``: commands that read the files of a campaign and need no model."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.campaign.merge import merge_campaign
from experiments.commands.options import one_folder
from experiments.commands.sweep import print_merged
from experiments.errors import MissingResourceError
from monitoring.trace import trace_report


def merge(arguments: Sequence[str]) -> int:
    """Merge the shards, print the closing table; exit status 1 if runs are missing."""
    # Imported here: the status of a campaign needs no pandas.
    from experiments.report.closing_table import closing_table

    folder = one_folder("merge", arguments)
    merged = merge_campaign(folder)
    print(closing_table(folder))
    print_merged(folder, merged)
    return 1 if merged.missing else 0


def trace(arguments: Sequence[str]) -> int:
    """Print how a campaign spent its time; further arguments as for ``python -m monitoring.trace.trace_report``."""
    folder = one_folder("trace", arguments[:1])
    files = sorted(folder.file("trace").glob("*.jsonl"))
    if not files:
        raise MissingResourceError(f"{folder.path}: has no trace")
    return trace_report.main([*map(str, files), *arguments[1:]])
