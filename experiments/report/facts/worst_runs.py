"""The runs that did the most harm, and how to repeat each.

worst = worst_runs(runs)              # at most ten rows: non-finite ones first, then by |loss_diff|
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd

from experiments.analysis import distinct_faults
from experiments.tables.columns import declared
from experiments.tables.schema import ExperimentResult

SHOWN = (
    "run_id", "outcome", "loss_diff", "relative_change", "local_change", "location", "layer", "bits", "index_head",
    "index_row", "index_col", "value_before", "value_after", "bits_before", "bits_after", "violation_detected",
    "detectors",
)  # fmt: skip
"""The first columns of the table; the columns that are declared with ``report=True`` follow."""


def worst_runs(runs: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """Return the worst runs of distinct faults: non-finite first, then by the size of what changed.

    The size is ``loss_diff``; without a loss, ``relative_change`` of the output; and if that was not computed
    (``run.scope``), ``local_change`` in the layer. Runs that changed nothing are left out; ties keep the order of the
    plan.
    """
    sizes = runs[["loss_diff", "relative_change", "local_change"]].astype(float).abs()
    nonfinite = runs["nonfinite"].astype("boolean").fillna(False).astype(bool)
    harm = pd.DataFrame({"nonfinite": nonfinite, **sizes.fillna(-1.0)})
    changed = nonfinite | (sizes > 0).any(axis=1)
    # Only the few worst runs are searched for duplicates, not a million runs.
    order = harm[changed].sort_values(list(harm.columns), ascending=False, kind="stable").index
    taken = count
    while True:
        worst = distinct_faults(runs.loc[order[:taken]])
        if len(worst) >= count or taken >= len(order):
            break
        taken *= 4
    rank = pd.Series(range(len(order)), index=order)
    worst = worst.loc[rank[worst.index].sort_values().index]
    declared_so = [field.name for field in declared(ExperimentResult) if field.metadata["report"]]
    return worst[[*SHOWN, *declared_so]].head(count)


def replay_command(folder: Path, run_id: str) -> str:
    """Return the command that executes one run again and compares the numbers."""
    return shlex.join(["python", "run_sweep.py", "replay", str(folder), run_id])
