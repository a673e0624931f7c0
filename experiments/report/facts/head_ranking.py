"""Which heads are more sensitive than the rest: query heads and key/value heads apart, and by model.

    table, verdict = rank_heads(runs)
    table["heads"]                      # "query heads" or "key/value heads"

A fault in k or v has the number of a key/value head, which several query heads may share: head 1 of k is not head 1 of
the scores. Nor is head 1 of one model that of another.

Public names: ``rank_heads``, ``QUERY_HEADS``, ``KEY_VALUE_HEADS``.
"""

from __future__ import annotations

import pandas as pd

from experiments.analysis import rank_cells
from fault_injection.locations import LOCATION_TABLE

QUERY_HEADS, KEY_VALUE_HEADS = "query heads", "key/value heads"


def rank_heads(runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return one ranking below the other, named in the first column ``heads``, and both verdicts.

    Several models are ranked together, with a column ``model``. A ranking without a fault is left out, but for that of
    query heads if there is neither.
    """
    by = [*(["model"] if runs["model"].nunique() > 1 else []), "layer", "index_head"]
    of_keys = runs["location"].isin([row.name for row in LOCATION_TABLE if row.shared]).to_numpy(bool)
    parts = {QUERY_HEADS: runs[~of_keys], KEY_VALUE_HEADS: runs[of_keys]}
    headed = {heads: part for heads, part in parts.items() if part[by].notna().all(axis=1).any()}
    tables, verdicts = [], []
    for heads, part in (headed or {QUERY_HEADS: runs}).items():
        table = rank_cells(part, by)
        verdicts.append(f"{heads.capitalize()}: {table.attrs['verdict']}")
        # pandas compares attributes when it puts tables together, and keeps those of none.
        table.attrs.clear()
        table.insert(0, "heads", heads)
        tables.append(table.astype({name: object for name in by if name == "model"}))
    return pd.concat(tables, ignore_index=True), ". ".join(verdicts) + "."
