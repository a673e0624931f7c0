"""The rates of groups of runs, side by side: one row per group, for the tables, the JSON block and ``summary.csv``.

groups = Groups.by(points[["fault.location"]])
wide_rates(counted_faults(runs), groups)        # fault.location, runs, detected, detected_n, detected_rate, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.analysis import (
    DEFAULT_CLUSTER,
    coverage_of_critical,
    critical_rate,
    detection_rate,
    distinct_faults,
    outcome_rates,
)
from experiments.analysis.rates import drawn_apart
from experiments.analysis.statistics.clusters import cluster_columns
from experiments.tables.schema import OUTCOMES

MEASURES = ("detected", *OUTCOMES, "harmful", "harmful_detected")
"""The counted faults: detected by proved detectors, with each outcome, harmful, and both harmful and detected."""

_GROUP, _CELL = "group", "grid.cell"
"""Added columns. Groups of only swept fields have a dotted name, as these fields do: they are fixed before faults are
drawn, and the estimates of weighted draws need to know that (``analysis.rates.drawn_apart``)."""

_CLUSTERS = [[f"cluster_{way}"] for way in range(len(DEFAULT_CLUSTER))]


@dataclass(frozen=True)
class Groups:
    """A partition of runs.

    Attributes:
        labels: one row per group, with the values that its runs share.
        codes: for each run, the row of ``labels`` of its group; indexed like the runs.
    """

    labels: pd.DataFrame
    codes: pd.Series

    @classmethod
    def by(cls, keys: pd.DataFrame) -> Groups:
        """Return the groups of equal keys, in the order in which they first occur; without keys, one group."""
        if not len(keys.columns):
            return cls(pd.DataFrame(index=[0]), pd.Series(0, index=keys.index))
        codes = keys.groupby(list(keys.columns), sort=False, dropna=False, observed=True).ngroup()
        first = ~codes.duplicated()
        labels = keys[first].set_axis(codes[first]).sort_index().astype(object)
        return cls(labels.reset_index(drop=True), codes)


def counted_faults(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the distinct faults, reduced to the columns of rates: texts as numbers, one column for each cluster way.

    The rate functions drop duplicates and find clusters in every call; with this table, that is quick.
    """
    sharing = cluster_columns(DEFAULT_CLUSTER)
    known = ["fault_id", "scope", "outcome", "violation_detected", "sampling_weight", "campaign", *sharing]
    watching = [name for name in runs.columns if str(name).startswith(("detect.", "run."))]
    faults = distinct_faults(runs[[*known, *watching]])
    clusters = {
        name: faults.groupby(list(way), dropna=False, observed=True, sort=False).ngroup()
        for [name], way in zip(_CLUSTERS, DEFAULT_CLUSTER, strict=True)
    }
    # One number for a fault under one setting of detectors: every group has one setting, and each fault once.
    fault = faults.groupby(["fault_id", *watching], dropna=False, observed=True, sort=False).ngroup()
    return faults.assign(fault_id=fault, **clusters).drop(columns=[*sharing, *watching])


def wide_rates(faults: pd.DataFrame, groups: Groups) -> pd.DataFrame:
    """Return the labels of each group, ``runs`` (duplicates included), and each measure's count, n, rate and interval.

    The columns of a measure ``m`` are ``m`` (how many), ``m_n`` (of how many distinct faults), ``m_rate``, ``m_low``,
    ``m_high`` and ``m_method`` (the kind of interval). If ``m_n`` is 0, the rate is empty.

    Args:
        faults: the result of ``counted_faults``.
        groups: the groups of all runs.
    """
    group = _CELL if drawn_apart([str(name) for name in groups.labels.columns]) else _GROUP
    frame = faults.assign(**{group: groups.codes.reindex(faults.index)})
    table = groups.labels.assign(runs=groups.codes.value_counts().reindex(groups.labels.index, fill_value=0))
    outcomes = outcome_rates(frame, group, cluster=_CLUSTERS)
    rates = {
        "detected": detection_rate(frame, group, cluster=_CLUSTERS),
        **{outcome: outcomes[outcomes["outcome"] == outcome] for outcome in OUTCOMES},
        "harmful": critical_rate(frame, group, cluster=_CLUSTERS),
        "harmful_detected": coverage_of_critical(frame, group, cluster=_CLUSTERS),
    }
    columns: dict[str, pd.Series] = {}
    for measure in MEASURES:
        found = rates[measure].set_index(group).reindex(table.index)
        columns[measure] = found["successes"].fillna(0).astype("int64")
        columns[f"{measure}_n"] = found["n"].fillna(0).astype("int64")
        for part in ("rate", "low", "high", "method"):
            columns[f"{measure}_{part}"] = found[part]
    return pd.concat([table, pd.DataFrame(columns)], axis=1)
