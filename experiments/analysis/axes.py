"""Read the swept fields that have no column in ``runs.csv`` from ``plan.csv``, run by run.

axis_columns(Path("results/default/plan.csv"), run_ids)     # {"detect.tolerance": texts, one for each run}
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from experiments.errors import UsageError

OWN_COLUMN = frozenset({"seed", "model.path", "model.dtype", "data.source", "fault.location", "fault.kind"})
"""Fields whose value is a column of ``runs.csv``. ``fault.bit`` is one, too, if every value is a single bit."""


def axis_columns(plan: Path, run_ids: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    """Return the texts of every swept field without a column, for these runs; nothing without a plan.

    Raises:
        UsageError: a run is not in the plan, or the file is no plan.
    """
    if not plan.is_file():
        return {}
    try:
        table = csv.read_csv(plan)
        names = [name for name in table.column_names if name not in ("run_id", "repeat")]
        text = csv.ConvertOptions(column_types=dict.fromkeys(table.column_names, pa.string()))
        table = csv.read_csv(plan, convert_options=text)
    except pa.ArrowInvalid as error:
        raise UsageError(f"{plan}: no table of runs: {str(error).splitlines()[0]}") from error
    if "run_id" not in table.column_names:
        raise UsageError(f"{plan}: column 'run_id' is missing; it has {', '.join(table.column_names)}")
    place = pc.index_in(run_ids, value_set=table["run_id"])
    if place.null_count:
        missing = run_ids.filter(pc.is_null(place))[0]
        raise UsageError(f"{plan}: run {missing} is not in this plan; the two files are not of one campaign")
    own = OWN_COLUMN | ({"fault.bit"} if _are_single_bits(table) else set())
    return {name: table[name].take(place).dictionary_encode() for name in names if name not in own}


def _are_single_bits(table: pa.Table) -> bool:
    if "fault.bit" not in table.column_names:
        return False
    return all(str(value).isdigit() for value in pc.unique(table["fault.bit"]).to_pylist())


def typed_axis(values: pd.Series) -> pd.Series:
    """Return an axis of texts in its own type: integers, booleans, numbers or text.

    >>> typed_axis(pd.Series(["1", "2", "2"], dtype="category")).tolist()
    [1, 2, 2]
    >>> typed_axis(pd.Series(["1e-05", "0"], dtype="category")).tolist()
    [1e-05, 0.0]
    """
    texts = [text for text in values.cat.categories if text]
    kept = values.cat.set_categories(texts)
    if texts and set(texts) <= {"True", "False"}:
        return kept.map({"True": True, "False": False}).astype("boolean")
    if not texts or pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").isna().any():
        return kept
    kind = "Int64" if all(text.lstrip("-").isdigit() for text in texts) else "float64"
    numbers = pd.Series([int(text) if kind == "Int64" else float(text) for text in texts], dtype=kind)
    # Look up by the category's number, not row by row; -1 stands for a missing value and finds nothing.
    return numbers.reindex(kept.cat.codes).set_axis(values.index)
