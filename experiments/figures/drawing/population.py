"""The runs that a figure shows, in words: the n of its caption.

>>> runs = pd.DataFrame({"fault_id": ["a", "a", "b"], "scope": "full", "outcome": "benign", "model": "reference",
...                      "dtype": "float32"})
>>> population(runs)
'n = 2 distinct faults of 3 runs; model reference (float32)'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from experiments.analysis import distinct_faults
from experiments.tables.schema import OUTCOMES
from fault_injection.locations import OBSERVED
from fault_injection.numbers.formats import FIELDS

_DEPTHS = ("early", "mid", "late")
_ORDER = {name: place for place, name in enumerate((*OBSERVED, *FIELDS, *OUTCOMES, *_DEPTHS))}


def propagated(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the distinct faults that were propagated to the model's output; shares of outcomes refer to these."""
    faults = distinct_faults(runs)
    return faults[(faults["scope"] == "full") & faults["outcome"].notna()]


def population(runs: pd.DataFrame) -> str:
    """Return a clause about the runs: their number, their models, and the fields over which they are pooled."""
    faults = distinct_faults(runs)
    known = int(((faults["scope"] == "full") & faults["outcome"].notna()).sum())
    clauses = [f"n = {len(faults):,} distinct faults of {len(runs):,} runs"]
    if known < len(faults):
        clauses.append(f"{known:,} of them propagated to the output of the model")
    models = faults[["model", "dtype"]].drop_duplicates().astype(str)
    names = ", ".join(f"{short_name(model)} ({dtype})" for model, dtype in models.itertuples(index=False))
    clauses.append(f"{'models' if len(models) > 1 else 'model'} {names}")
    # Points of the grid that differ only in detectors or in execution have the same faults: each point counts.
    axes = [name for name in faults.columns if name.startswith(("detect.", "run.")) and faults[name].nunique() > 1]
    clauses += [f"pooled over {faults[name].nunique()} values of {name}" for name in axes]
    weights = faults["sampling_weight"].dropna() if "sampling_weight" in faults.columns else pd.Series(dtype=float)
    if (weights != 1).any():
        clauses.append(
            "drawn with unequal probabilities: rates and means are weighted, quantiles and histograms are not"
        )
    return "; ".join(clauses)


def short_name(model: Any) -> str:
    """Return the last part of a model's path.

    >>> short_name("/data/models/gpt2/")
    'gpt2'
    """
    return str(model).rstrip("/").rsplit("/", 1)[-1]


def ordered(values: Sequence[Any]) -> list[Any]:
    """Return distinct names in the order of the computation or of the bit fields; sort other names.

    >>> ordered(["scores", "q", "early"]), ordered([3, 1])
    (['q', 'scores', 'early'], [1, 3])
    """
    return sorted(set(values), key=lambda value: (_ORDER.get(str(value).split(" ")[0], len(_ORDER)), value))
