"""Means of a campaign, each with its n, its median and the limits of a bootstrap over clusters.

    epsilon_distribution(runs, "bit_field")
    overhead(runs)

Every table has the columns of ``by`` and ``n, mean, median, low, high, clusters, method``. ``low`` and ``high`` are the
95 % limits of the mean; they are NaN if all clusters agree, because that says nothing about other clusters. Missing and
non-finite values are left out and not counted in ``n``. Means use sampling weights as rates do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.analysis.rates import By, rate_table, table_of
from experiments.analysis.statistics.cluster_sums import ClusterSums, ratio
from experiments.analysis.statistics.clusters import DEFAULT_CLUSTER, Cluster, Grouping
from experiments.analysis.statistics.distinct import distinct_faults, listed, propagated, require_columns, weights_of
from experiments.analysis.statistics.resampling import mean_limits

MEAN_COLUMNS = ("n", "mean", "median", "low", "high", "clusters", "method")

PARTS = ("injection", "bounds", "detection", "correction")
"""The parts of a run that are timed; ``overhead`` is (bounds + detection) / injection."""

Floats = NDArray[np.float64]


def epsilon_distribution(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the mean of ``epsilon``, taken in the row of the first injected layer that is nearest to its bounds.

    >>> runs = pd.DataFrame({"fault_id": list("abc"), "scope": "full", "outcome": "benign", "model": "m",
    ...                      "batch_index": [0, 1, 2], "layer": 0, "index_head": 0, "epsilon": [1.0, 2.0, 6.0]})
    >>> epsilon_distribution(runs)[["n", "mean", "median", "method"]].values.tolist()
    [[3, 3.0, 2.0, 't over clusters']]
    """
    faults = distinct_faults(runs)
    return mean_table(faults, _numbers(faults, "epsilon"), by, cluster)


def margin_statistics(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the mean of ``epsilon_margin``, and how often it is negative: epsilon outside its bounds.

    Further columns: ``outside``, ``outside_n``, ``share_outside``, ``outside_low``, ``outside_high``. A margin of -inf
    counts as outside, although it enters no mean.
    """
    faults = distinct_faults(runs)
    margin = _numbers(faults, "epsilon_margin")
    table = mean_table(faults, margin, by, cluster)
    known = ~np.isnan(margin)
    outside = rate_table(faults[known], margin[known] < 0, by, cluster)
    names = listed(by)
    outside = outside.rename(
        columns={"successes": "outside", "n": "outside_n", "rate": "share_outside", "low": "outside_low",
                 "high": "outside_high"}
    )  # fmt: skip
    added = outside[[*names, "outside", "outside_n", "share_outside", "outside_low", "outside_high"]]
    return table.merge(added, on=names, how="left") if names else table.join(added)


def bound_tightness(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return how close the bounds are to epsilon: ``quantity`` is one of the two ratios below; 1 is tight.

    ``upper_over_epsilon`` is ``epsilon_upper / epsilon``, ``epsilon_over_lower`` is ``epsilon / epsilon_lower``; a run
    whose denominator is not positive has no ratio.
    """
    faults = distinct_faults(runs)
    epsilon, lower, upper = (_numbers(faults, name) for name in ("epsilon", "epsilon_lower", "epsilon_upper"))
    ratios = {"upper_over_epsilon": _quotient(upper, epsilon), "epsilon_over_lower": _quotient(epsilon, lower)}
    return _stacked(faults, ratios, "quantity", by, cluster)


def loss_change(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the mean of ``loss_diff`` of propagated faults, nats.

    A further column ``nonfinite`` counts the faults that made the loss NaN or infinite; they enter no mean.
    """
    faults = propagated(distinct_faults(runs))
    change = _numbers(faults, "loss_diff")
    table = mean_table(faults, change, by, cluster)
    lost = ~np.isfinite(change) & (faults["outcome"] == "nonfinite").to_numpy(bool)
    sums = Grouping(faults, by, cluster).sums(lost)
    return table.assign(nonfinite=[round(float(part.hits.sum())) for _, part in sums])


def overhead(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the seconds of each part of a run, and the overhead of detection; column ``part`` names the part.

    The ``mean`` of ``overhead`` is the ratio of sums, (bounds + detection) / injection; its ``median`` is the median of
    the runs' own ratios. All runs count without weights, also repeated faults: this is the time that the campaign took.
    """
    names = [f"{part}_seconds" for part in PARTS]
    injection, bounds, detection, _ = seconds = [_numbers(runs, name) for name in names]
    plain = runs.drop(columns="sampling_weight", errors="ignore")
    table = _stacked(plain, dict(zip(PARTS, seconds, strict=True)), "part", by, cluster)
    last = mean_table(plain, bounds + detection, by, cluster, injection)
    last.insert(len(listed(by)), "part", "overhead")
    return _interleaved([table, last], len(PARTS))


def mean_table(
    frame: pd.DataFrame,
    values: Floats,
    by: By = None,
    cluster: Cluster = DEFAULT_CLUSTER,
    denominators: Floats | None = None,
) -> pd.DataFrame:
    """Return the mean of values in each group, or the ratio of their sum to that of ``denominators``.

    Args:
        frame: one row per run; the caller drops duplicates.
        values: one number for each run; numbers that are not finite are left out.
        by: columns that make groups, or None for one row.
        cluster: columns that make clusters, or a list of such lists: several ways.
        denominators: one number for each run, default 1; the median is then the median of the quotients.

    Raises:
        UsageError: a column is unknown, or a sampling weight is wrong.
    """
    names = listed(by)
    grouping = Grouping(frame, names, cluster)
    below = np.ones(len(values)) if denominators is None else denominators
    finite = np.isfinite(values) & np.isfinite(below)
    given = weights_of(frame)
    weights = np.where(finite, 1.0 if given is None else given, 0.0)
    kept = finite & (weights > 0)
    sums = grouping.sums(
        np.where(finite, values, 0.0), weights, counted=kept, denominators=np.where(finite, below, 0.0)
    )
    quotients = values if denominators is None else _quotient(values, below)
    medians = [_median(quotients[rows], weights[rows]) for rows in grouping.rows()]
    found = [(key, _mean_row(part, median)) for (key, part), median in zip(sums, medians, strict=True)]
    return table_of(frame, names, found, MEAN_COLUMNS)


def _mean_row(sums: ClusterSums, median: float) -> dict[str, Any]:
    estimate = ratio(sums)
    limits = mean_limits(sums)
    return {
        "n": round(float(sums.runs.sum())),
        "mean": estimate.value,
        "median": median,
        "low": limits.low,
        "high": limits.high,
        "clusters": len(sums.runs),
        "method": limits.method,
    }


def _median(values: Floats, weights: Floats) -> float:
    """Return the median; for weighted values, the middle between the first and the last point with half the weight."""
    kept = np.isfinite(values) & (weights > 0)
    if not kept.any():
        return math.nan
    order = np.argsort(values[kept], kind="stable")
    ordered, share = values[kept][order], np.cumsum(weights[kept][order])
    half = share[-1] / 2
    first, last = np.searchsorted(share, half), np.searchsorted(share, half, side="right")
    return float(ordered[first] + ordered[min(last, len(ordered) - 1)]) / 2


def _stacked(frame: pd.DataFrame, values: dict[str, Floats], column: str, by: By, cluster: Cluster) -> pd.DataFrame:
    tables = []
    for name, numbers in values.items():
        table = mean_table(frame, numbers, by, cluster)
        table.insert(len(listed(by)), column, name)
        tables.append(table)
    return _interleaved(tables, 1)


def _interleaved(tables: list[pd.DataFrame], rows: int) -> pd.DataFrame:
    """Return tables as one, first all rows of the first group, then the second; the first has ``rows`` per group."""
    order = [np.arange(len(table)) // (rows if place == 0 else 1) for place, table in enumerate(tables)]
    joined = pd.concat(tables, ignore_index=True)
    return joined.iloc[np.argsort(np.concatenate(order), kind="stable")].reset_index(drop=True)


def _quotient(above: Floats, below: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def _numbers(frame: pd.DataFrame, name: str) -> Floats:
    require_columns(frame, [name])
    return frame[name].to_numpy(np.float64, na_value=np.nan)
