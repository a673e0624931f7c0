"""Read ``propagation.csv`` for the page: in pieces, and only for a limited number of runs.

    propagation, step = followed(folder, runs)       # of every step-th run

A million runs have some ten million rows there; the quantiles of a hundred thousand runs look the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from experiments.analysis.loading import check_table, load_propagation
from experiments.campaign.folder import CampaignFolder
from experiments.errors import UsageError
from experiments.tables.column_types import arrow_schema
from experiments.tables.schema import PropagationRow, columns

MOST_FOLLOWED = 100_000
"""The largest number of runs whose blocks are drawn."""

_PIECE = 1 << 24
"""The number of bytes read from the file at a time."""


def followed(folder: CampaignFolder, runs: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return the rows of ``propagation.csv`` for every n-th of some runs, and n.

    Args:
        folder: the campaign.
        runs: rows of ``runs.csv`` with ``campaign`` and ``run_id``.

    Returns:
        The table with ``campaign``, and with the place of the run in ``runs`` as ``run_id``; no rows from a campaign
        that did not measure it.

    Raises:
        UsageError: the file is empty, truncated, damaged or of another schema.
    """
    path = folder.file("propagation.csv")
    if not path.is_file():
        return load_propagation(folder.path), 1
    step = -(-len(runs) // MOST_FOLLOWED)
    check_table(path, PropagationRow)
    chosen = pd.Index(runs["run_id"].astype(object).iloc[::step])
    parts = []
    for piece in _pieces(path):
        place = chosen.get_indexer(piece["run_id"])
        parts.append(piece.assign(run_id=place * step)[place >= 0])
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns(PropagationRow))
    campaigns = runs["campaign"].astype(object).to_numpy()
    return table.assign(campaign=campaigns[table["run_id"].to_numpy(np.int64)]), step


def _pieces(path: Path) -> Iterator[pd.DataFrame]:
    """Yield the rows of the file; unlike pandas, this reader refuses a line with a cell too many or too few."""
    options = csv.ConvertOptions(
        column_types=arrow_schema(PropagationRow), include_columns=columns(PropagationRow), null_values=[""],
    )  # fmt: skip
    try:
        with csv.open_csv(path, csv.ReadOptions(block_size=_PIECE), convert_options=options) as reader:
            for batch in reader:
                yield batch.to_pandas()
    except pa.ArrowInvalid as error:
        raise UsageError(f"{path}: is damaged: {str(error).splitlines()[0]}") from error
