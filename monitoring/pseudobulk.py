"""Pseudo-bulk: measurements that belong together count once.

>>> rows = pd.DataFrame({"layer": [0, 0, 0, 1], "kv_head": [0, 0, 1, 0], "ssr_QK": [1.0, 3.0, 5.0, 9.0]})
>>> summary = pseudobulk(rows, "ssr_QK")               # medians of (layer, kv_head) groups: 2, 5 and 9
>>> summary.groups, summary.median
(3, 5.0)

The query heads of one key/value head are correlated: in a model with grouped queries they must not count g times. So
the median is taken inside each group first, and the summary over the groups' medians. Two summaries are in use and give
different numbers, so each is named by its mode: ``flat`` over the groups of all layers, ``per_layer`` over the medians
of the layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from fault_injection.names import nearest

MODES = ("flat", "per_layer")


@dataclass(frozen=True)
class Pseudobulk:
    """Summary of one column.

    Attributes:
        mode: ``flat`` or ``per_layer``: how it was made; print it with every number.
        values: what was summarised: a median for each group, or for each layer.
        groups: how many groups there were.
    """

    mode: str
    values: tuple[float, ...]
    groups: int

    @property
    def median(self) -> float | None:
        """The median of ``values``; None if there are none."""
        return statistics.median(self.values) if self.values else None

    @property
    def mean(self) -> float | None:
        """The mean of ``values``; None if there are none."""
        return statistics.fmean(self.values) if self.values else None


def pseudobulk(
    rows: pd.DataFrame, column: str, by: Sequence[str] = ("layer", "kv_head"), then: str = "flat"
) -> Pseudobulk:
    """Return the summary of a column over groups of rows.

    Rows without a value are dropped; a missing group key other than the first counts as 0 (a model whose heads have no
    key/value head of their own).

    Args:
        rows: one row per measurement.
        column: what is measured; a number.
        by: the columns that make groups, the layer first.
        then: ``flat``: over all groups. ``per_layer``: the median over the groups of each layer first.

    Raises:
        ValueError: an unknown column or mode, or no column to group by.

    >>> rows = pd.DataFrame({"layer": [0, 0, 0, 0, 1, 1], "kv_head": [0, 0, 1, 1, 0, 0],
    ...                      "ssr": [0.1, 0.3, 0.5, 0.5, 0.2, 0.9]})
    >>> flat = pseudobulk(rows, "ssr")
    >>> flat.mode, flat.median, round(flat.mean, 7)
    ('flat', 0.5, 0.4166667)
    >>> round(pseudobulk(rows, "ssr", then="per_layer").median, 7)
    0.45
    """
    if then not in MODES:
        raise ValueError(f"then: got {then!r}, allowed {', '.join(MODES)}{nearest(then, MODES)}")
    if not by:
        raise ValueError("by: got no column, allowed one or more, the layer first")
    for name in (*by, column):
        if name not in rows.columns:
            held = ", ".join(map(str, rows.columns))
            raise ValueError(f"column: got {name!r}, allowed {held}{nearest(name, map(str, rows.columns))}")
    known = rows.loc[rows[column].notna(), [*by, column]]
    known = known.fillna(dict.fromkeys(by[1:], 0))
    medians = known.groupby(list(by), observed=True)[column].median()
    groups = len(medians)
    if then == "per_layer":
        medians = medians.groupby(level=0, observed=True).median()
    return Pseudobulk(then, tuple(map(float, medians)), groups)
