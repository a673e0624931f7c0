"""Rank heads by sensitivity, separately for query heads and key/value heads, and by model.

    table, verdict = rank_heads(runs)
    table["heads"]                      # "query heads" or "key/value heads"

A fault in k or v has the number of a key/value head, which several query heads may share. So head 1 of k is not head 1
of the scores, and head 1 of one model is not head 1 of another.
"""

from __future__ import annotations

import pandas as pd

from experiments.analysis import rank_cells
from fault_injection.locations import LOCATION_TABLE

QUERY_HEADS, KEY_VALUE_HEADS = "query heads", "key/value heads"


def rank_heads(runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return both rankings in one table, named in the first column ``heads``, and both verdicts.

    Several models are ranked together, with a column ``model``. A ranking without a fault is left out; if neither has
    one, the ranking of query heads stays.
    """
    by = [*(["model"] if runs["model"].nunique() > 1 else []), "layer", "index_head"]
    of_keys = runs["location"].isin([row.name for row in LOCATION_TABLE if row.shared]).to_numpy(bool)
    parts = {QUERY_HEADS: runs[~of_keys], KEY_VALUE_HEADS: runs[of_keys]}
    headed = {heads: part for heads, part in parts.items() if part[by].notna().all(axis=1).any()}
    tables, verdicts = [], []
    for heads, part in (headed or {QUERY_HEADS: runs}).items():
        table = rank_cells(part, by)
        verdicts.append(f"{heads.capitalize()}: {table.attrs['verdict']}")
        # pandas compares attributes when it concatenates tables; here no attributes are wanted.
        table.attrs.clear()
        table.insert(0, "heads", heads)
        tables.append(table.astype({name: object for name in by if name == "model"}))
    return pd.concat(tables, ignore_index=True), ". ".join(verdicts) + "."
