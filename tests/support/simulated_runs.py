"""Tables of runs without a model: campaigns whose truth is known, for the tests of the analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.tables.column_types import column_types
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import ExperimentResult, cells, columns

FIXED = {"campaign": "c", "model": "m", "batch_index": 0, "layer": 0, "index_head": 0, "scope": "full",
         "outcome": "benign", "effective": True, "violation_detected": False, "sampling_weight": 1.0,
         "detectors": "", "unproved_detectors": "", "oracle_detectors": ""}  # fmt: skip


def runs_of(count: int, **values: Any) -> pd.DataFrame:
    """Return that many runs of different faults; a value is one for all or a list."""
    return pd.DataFrame({"fault_id": [f"f{place}" for place in range(count)], **FIXED, **values})


def simulated(
    rates: Mapping[tuple[int, int], float], inputs: int, runs: int, correlation: float, generator: np.random.Generator
) -> pd.DataFrame:
    """Return a campaign: ``runs`` runs of every cell (layer, head) on every input, beta-binomial by cluster."""
    spread = (1 - correlation) / correlation
    parts = []
    for (layer, head), rate in rates.items():
        chances = generator.beta(rate * spread, (1 - rate) * spread, inputs).repeat(runs)
        harmful = generator.random(inputs * runs) < chances
        parts.append(
            runs_of(
                inputs * runs,
                layer=layer,
                index_head=head,
                batch_index=np.arange(inputs).repeat(runs),
                outcome=np.where(harmful, "critical", "benign"),
            )
        )
    joined = pd.concat(parts, ignore_index=True)
    return joined.assign(fault_id=[f"f{place}" for place in range(len(joined))])


def write_campaign(
    folder: Path, rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Write ``runs.csv`` and ``plan.csv`` with these values and return the folder; what needs a value has one."""
    zeros = {str: "", bool: False, int: 0, float: 0.0}
    types = column_types(ExperimentResult).items()
    needed = {name: zeros[column.kind] for name, column in types if not column.optional}
    needed |= {"model": "m", "location": "q", "scope": "full", "fault_id": "f"}
    results = [ExperimentResult(**{**needed, "run_id": f"{place:016x}", **row}) for place, row in enumerate(rows)]
    write_rows(folder / "runs.csv", columns(ExperimentResult), map(cells, results))
    swept = axes or {}
    plan = [
        [result.run_id, "0", *(str(values[place]) for values in swept.values())] for place, result in enumerate(results)
    ]
    write_rows(folder / "plan.csv", ["run_id", "repeat", *swept], plan)
    return folder
