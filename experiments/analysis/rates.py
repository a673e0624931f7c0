"""Rates of a campaign, each with its n and with limits that contain the true rate in 95 of 100 campaigns.

    detection_rate(runs, "bit_field")
    outcome_rates(runs, ["location", "bit_field"])

Every table has the columns of ``by`` and

| column | meaning |
|---|---|
| ``successes``, ``n`` | counts of distinct faults |
| ``rate`` | successes / n; with sampling weights an estimate for uniform drawing, see below |
| ``low``, ``high`` | the 95 % limits to print; they respect clusters |
| ``wilson_low``, ``wilson_high`` | Wilson's limits, which treat all runs as independent |
| ``exact_low``, ``exact_high`` | Clopper and Pearson's limits, which do so, too |
| ``clusters`` | the number of clusters: inputs, or heads if their effective number is smaller |
| ``method`` | how ``low`` and ``high`` were computed |

Without runs (n = 0) the rate is NaN, and so are its limits.

Runs drawn with unequal probabilities (``fault.aim``) have two possible estimates, and ``method`` names the one in use.
*Regression* uses the fact that the weights of all draws have mean 1. This holds for all runs together and for groups
that were fixed before the draw (``drawn_apart``: campaigns, models, swept fields); it can be several times as precise.
*Ratio* (Hajek) is for groups that result from the draw, such as bits or layers, and for tables whose mean weight shows
that rows are missing. So group with ``by`` instead of selecting rows. See
``experiments.analysis.statistics.estimates``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bounds.registry import is_oracle
from experiments.analysis.statistics.cluster_sums import ClusterSums, Ratio, ratio
from experiments.analysis.statistics.clusters import DEFAULT_CLUSTER, Cluster, Grouping
from experiments.analysis.statistics.distinct import (
    check_one_setting,
    detected,
    harmful,
    listed,
    measured,
    outcome_faults,
    require_columns,
    weights_of,
)
from experiments.analysis.statistics.estimates import regressions
from experiments.analysis.statistics.intervals import (
    clustered_interval,
    exact_interval,
    exact_limits,
    wilson_interval,
    wilson_limits,
)
from experiments.tables.schema import OUTCOMES

By = str | Sequence[str] | None

RATE_COLUMNS = (
    *("successes", "n", "rate", "low", "high", "wilson_low", "wilson_high", "exact_low", "exact_high"),
    *("clusters", "method"),
)

CLUSTERED = "Wilson, effective n of clusters"
INDEPENDENT = "Wilson"
NOTHING = "none"


def drawn_apart(by: By) -> bool:
    """Return whether groups by these columns are fixed before faults are drawn: swept fields, campaigns, models.

    >>> drawn_apart(None), drawn_apart("run.scope"), drawn_apart(["detect.tolerance", "bit"])
    (True, True, False)
    """
    return all(name in ("campaign", "seed", "model", "dtype", "source") or "." in name for name in listed(by))


def detection_rate(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the share of distinct faults that a proved detector saw.

    >>> runs = pd.DataFrame({"fault_id": list("abcd"), "scope": "full", "outcome": "benign", "model": "m",
    ...                      "batch_index": 0, "layer": [0, 1, 2, 3], "index_head": 0,
    ...                      "violation_detected": [True, True, True, False]})
    >>> row = detection_rate(runs).iloc[0]
    >>> int(row.successes), int(row.n), row.method, round(float(row.low), 2), round(float(row.high), 2)
    (3, 4, 'Wilson', 0.3, 0.95)
    """
    faults, seen = measured(runs, "detected", listed(by))
    return rate_table(faults, seen, by, cluster, whole=drawn_apart(by))


def outcome_rates(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the share of each outcome among propagated faults: one row for each group and outcome.

    >>> runs = pd.DataFrame({"fault_id": list("abcd"), "scope": "full", "model": "m", "batch_index": 0,
    ...                      "layer": [0, 1, 2, 3], "index_head": 0, "outcome": ["masked"] * 3 + ["critical"]})
    >>> outcome_rates(runs)[["outcome", "successes", "n", "rate"]].values.tolist()
    [['masked', 3, 4, 0.75], ['benign', 0, 4, 0.0], ['critical', 1, 4, 0.25], ['nonfinite', 0, 4, 0.0]]
    """
    names = listed(by)
    faults = outcome_faults(runs, names)
    weights = weights_of(faults)
    grouping = Grouping(faults, names, cluster)
    rows = []
    for outcome in OUTCOMES:
        found = group_rates(grouping, (faults["outcome"] == outcome).to_numpy(bool), weights, drawn_apart(by))
        rows.append([(key, {"outcome": outcome, **row}) for key, row in found])
    # Group by group, the four outcomes of each together.
    return table_of(
        faults, names, [row for group in zip(*rows, strict=True) for row in group], ["outcome", *RATE_COLUMNS]
    )


def critical_rate(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the share of harmful outcomes (critical or nonfinite) among propagated faults.

    >>> runs = pd.DataFrame({"fault_id": list("ab"), "scope": "full", "model": "m", "batch_index": 0,
    ...                      "layer": [0, 1], "index_head": 0, "outcome": ["masked", "nonfinite"]})
    >>> float(critical_rate(runs).rate.iloc[0])
    0.5
    """
    faults, bad = measured(runs, "harmful", listed(by))
    return rate_table(faults, bad, by, cluster, whole=drawn_apart(by))


def coverage_of_critical(runs: pd.DataFrame, by: By = None, *, cluster: Cluster = DEFAULT_CLUSTER) -> pd.DataFrame:
    """Return the share of harmful faults that a proved detector saw.

    >>> runs = pd.DataFrame({"fault_id": list("abc"), "scope": "full", "model": "m", "batch_index": 0,
    ...                      "layer": [0, 1, 2], "index_head": 0, "outcome": ["masked", "nonfinite", "critical"],
    ...                      "violation_detected": [False, True, False]})
    >>> coverage_of_critical(runs)[["successes", "n", "rate"]].values.tolist()
    [[1.0, 2.0, 0.5]]
    """
    check_one_setting(runs, listed(by))
    faults = outcome_faults(runs, listed(by))
    bad = faults[harmful(faults)]
    return rate_table(bad, detected(bad), by, cluster)


def false_positive_rate(clean: pd.DataFrame, by: By = None) -> pd.DataFrame:
    """Return the share of checked rows of fault-free passes that are in violation; each pass is a cluster.

    Oracles read the fault-free pass, so they have no false positives. Detectors without a proof count only if ``by``
    separates them, with ``detector`` or ``proved``.

    >>> clean = pd.DataFrame({"baseline": ["a", "b"], "detector": "s@w", "proved": True, "applicable": True,
    ...                       "rows_checked": [600, 400], "violations": 0})
    >>> row = false_positive_rate(clean).iloc[0]
    >>> int(row.successes), int(row.n), round(float(row.wilson_high), 4)
    (0, 1000, 0.0038)
    """
    require_columns(clean, ["baseline", "detector", "proved", "applicable", "rows_checked", "violations"])
    names = listed(by)
    kept = clean["applicable"].to_numpy(bool) & ~clean["detector"].map(is_oracle).to_numpy(bool)
    if not {"detector", "proved"} & set(names):
        kept &= clean["proved"].to_numpy(bool)
    checked = clean[kept & (clean["rows_checked"].to_numpy(np.int64) > 0)]
    grouping = Grouping(checked, names, ["baseline"])
    violations, rows = (grouping.sums(checked[name].to_numpy(np.float64)) for name in ("violations", "rows_checked"))
    found = [
        (key, rate_of(ClusterSums(some.hits, every.hits, every.hits, every.hits, some.hits)))
        for (key, some), (_, every) in zip(violations, rows, strict=True)
    ]
    return table_of(checked, names, found, RATE_COLUMNS)


def rate_table(
    frame: pd.DataFrame,
    hits: NDArray[np.bool_],
    by: By = None,
    cluster: Cluster = DEFAULT_CLUSTER,
    *,
    whole: bool = False,
) -> pd.DataFrame:
    """Return the share of rows that are hits, for each group.

    Args:
        frame: one row per run; the caller drops duplicates.
        hits: for each row, whether it counts.
        by: columns that make groups, or None for one row.
        cluster: columns that make clusters, or a list of such lists: several ways.
        whole: whether each group has all its draws, so that its weights have mean 1.

    Raises:
        UsageError: a column is unknown, or a sampling weight is wrong.
    """
    names = listed(by)
    found = group_rates(Grouping(frame, names, cluster), hits, weights_of(frame), whole)
    return table_of(frame, names, found, RATE_COLUMNS)


def group_rates(
    grouping: Grouping, hits: NDArray[np.bool_], weights: NDArray[np.float64] | None, whole: bool
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the key and the row of each group."""
    sums = list(grouping.sums(hits, weights))
    if weights is None or not whole:
        return [(key, rate_of(part, weights is not None)) for key, part in sums]
    estimates = regressions(grouping, hits, weights)
    return [(key, rate_of(part, True, estimate)) for (key, part), estimate in zip(sums, estimates, strict=True)]


def rate_of(sums: ClusterSums, weighted: bool = False, regression: Ratio | None = None) -> dict[str, Any]:
    """Return a row of a table of rates, without its group.

    Args:
        sums: the sums over the clusters of the group.
        weighted: whether the runs were drawn with unequal probabilities.
        regression: the estimate for such runs; default: the ratio of the sums.

    >>> ones = np.ones(60)
    >>> sums = ClusterSums(0 * ones, 16 * ones, 16 * ones, 16 * ones, 0 * ones)
    >>> row = rate_of(sums)
    >>> row["n"], row["clusters"], round(row["wilson_high"], 4), round(row["high"], 4), row["method"]
    (960, 60, 0.004, 0.0602, 'Wilson, effective n of clusters')
    """
    successes, n = round(float(sums.hits.sum())), round(float(sums.runs.sum()))
    estimate = regression or ratio(sums)
    if not n or math.isnan(estimate.value):
        wilson = exact = printed = (math.nan, math.nan)
        method = NOTHING
    elif weighted:
        # For weighted counts, Wilson's limits use the number of runs of equal weight with the same information.
        wilson = wilson_limits(estimate.value, sums.effective_runs)
        exact = exact_limits(estimate.value, sums.effective_runs)
        method = f"{'regression' if regression else 'ratio'}, {CLUSTERED}"
    else:
        wilson, exact = wilson_interval(successes, n), exact_interval(successes, n)
        method = CLUSTERED
    if n and not weighted and sums.are_singletons:
        printed, method = wilson, INDEPENDENT
    elif method != NOTHING:
        printed = clustered_interval(
            estimate.value, estimate.variance, estimate.degrees, n, sums.units, weighted=weighted
        )
    limits = zip(("", "wilson_", "exact_"), (printed, wilson, exact), strict=True)
    return {
        "successes": successes,
        "n": n,
        "rate": estimate.value,
        **{f"{kind}{side}": value for kind, pair in limits for side, value in zip(("low", "high"), pair, strict=True)},
        "clusters": len(sums.runs),
        "method": method,
    }


def table_of(
    frame: pd.DataFrame, by: list[str], rows: list[tuple[tuple[Any, ...], dict[str, Any]]], columns: Sequence[str]
) -> pd.DataFrame:
    """Return rows as a table; the columns of ``by`` come first and keep their types in ``frame``."""
    table = pd.DataFrame([row for _, row in rows], columns=list(columns))
    for place, name in enumerate(by):
        table.insert(place, name, pd.Series([key[place] for key, _ in rows], dtype=frame[name].dtype))
    return table
