"""Compare detectors on the same faults, from ``runs.csv`` alone.

    detector_comparison(load_runs("results/default"), load_clean("results/default"))

``runs.csv`` names the detectors that fired; ``clean.csv`` lists all detectors, with their false positives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bounds.registry import cost_of, is_oracle
from bounds.suites import SUITES
from experiments.analysis.rates import group_rates
from experiments.analysis.statistics.clusters import DEFAULT_CLUSTER, Cluster, Grouping, cluster_columns
from experiments.analysis.statistics.distinct import (
    check_one_setting,
    distinct_faults,
    harmful,
    propagated,
    require_columns,
    weights_of,
)

DETECTOR_COLUMNS = (
    *("detector", "kind", "n", "seen", "detected", "detected_low", "detected_high"),
    *("harmful_n", "seen_harmful", "recall_critical", "recall_critical_low", "recall_critical_high"),
    *("effective_n", "seen_effective", "recall_effective", "recall_effective_low", "recall_effective_high"),
    *("exclusive", "union", "false_positives", "clean_rows", "cost"),
)

_COUNTS_OF = {
    "detected": ("n", "seen"),
    "recall_critical": ("harmful_n", "seen_harmful"),
    "recall_effective": ("effective_n", "seen_effective"),
}
"""For each share, the columns of its number of faults, and of how many of them were seen."""

COUNTS = (
    *(name for names in _COUNTS_OF.values() for name in names),
    *("exclusive", "false_positives", "clean_rows"),
)

KINDS = {"detectors": "proved", "unproved_detectors": "unproved", "oracle_detectors": "oracle"}
"""For each column of ``runs.csv`` that names detectors, their kind; rows come in this order."""

Hits = NDArray[np.bool_]


@dataclass(frozen=True)
class Lookers:
    """The detectors of a campaign: the kind of each, and the names of those that apply to no layer."""

    kinds: dict[str, str]
    inapplicable: frozenset[str]


def detector_comparison(
    runs: pd.DataFrame, clean: pd.DataFrame | None = None, *, cluster: Cluster = DEFAULT_CLUSTER
) -> pd.DataFrame:
    """Return a row for each detector, and for each suite whose members all took part.

    | column | meaning |
    |---|---|
    | ``kind`` | ``proved``, ``unproved``, ``oracle`` or ``suite`` |
    | ``n``, ``detected`` | distinct faults, and the share of them it saw |
    | ``harmful_n``, ``recall_critical`` | propagated faults with a harmful outcome, and the share it saw |
    | ``effective_n``, ``recall_effective`` | faults that changed a bit pattern, and the share it saw |
    | ``seen``, ``seen_harmful``, ``seen_effective`` | how many it saw of each; unlike shares, these are never weighted
    | | ``exclusive`` | harmful faults that no other detector (except oracles) saw |
    | ``union`` | share of the harmful faults that it or a detector above it saw; NaN for oracles and suites |
    | ``false_positives``, ``clean_rows`` | rows in violation and rows checked, in the fault-free passes |
    | ``cost`` | extra work per row of n keys and d channels, as the detector states it |

    ``..._low`` and ``..._high`` are 95 % limits that respect clusters. If a detector applies nowhere, all its numbers
    are empty.

    Args:
        runs: runs of campaigns whose detectors checked every fault.
        clean: their ``clean.csv``; without it the table has only detectors that fired, and no false positives.
        cluster: columns that make clusters, or a list of such lists: several ways.

    Raises:
        UsageError: a column is unknown, or runs differ in a field of ``detect``, so that one fault would count for
            several settings.
    """
    require_columns(runs, [*KINDS, "effective", *cluster_columns(cluster)])
    check_one_setting(runs)
    faults = distinct_faults(runs)
    clean = _same_tolerance(faults, clean)
    lookers = looked(faults, clean)
    seen = fired(faults, lookers.kinds)
    shares = _shares(faults, cluster)
    rows = [*_detector_rows(lookers, seen, shares, clean), *_suite_rows(lookers, seen, shares, clean)]
    table = pd.DataFrame(rows, columns=list(DETECTOR_COLUMNS))
    return table.astype(dict.fromkeys(COUNTS, "Int64")).fillna({"cost": ""})


def looked(runs: pd.DataFrame, clean: pd.DataFrame | None = None) -> Lookers:
    """Return the detectors of a campaign: proved ones first, then unproved, then oracles, each in the suites' order.

    >>> runs = pd.DataFrame({"detectors": ["finite;s@w", ""], "unproved_detectors": ["", "ranger"],
    ...                      "oracle_detectors": ["", ""]})
    >>> looked(runs).kinds
    {'finite': 'proved', 's@w': 'proved', 'ranger': 'unproved'}
    """
    kinds = {name: kind for column, kind in KINDS.items() for name in _names(runs[column])}
    inapplicable: set[str] = set()
    if clean is not None:
        require_columns(clean, ["detector", "proved", "applicable"])
        told = clean.groupby("detector", observed=True)[["proved", "applicable"]].any()
        for name, proved, applicable in told.itertuples():
            kinds[name] = "oracle" if is_oracle(name) else "proved" if proved else "unproved"
            if not applicable:
                inapplicable.add(name)
    order = {name: place for place, name in enumerate(dict.fromkeys(one for suite in SUITES.values() for one in suite))}
    rank = list(KINDS.values())
    ordered = sorted(kinds, key=lambda name: (rank.index(kinds[name]), order.get(name, len(order)), name))
    return Lookers({name: kinds[name] for name in ordered}, frozenset(inapplicable))


def fired(runs: pd.DataFrame, names: Iterable[str]) -> dict[str, Hits]:
    """Return, for each detector, in which runs it fired.

    >>> runs = pd.DataFrame({"detectors": ["finite;s@w", ""], "unproved_detectors": ["", "ranger"],
    ...                      "oracle_detectors": ["", ""]})
    >>> {name: hits.tolist() for name, hits in fired(runs, ["s@w", "ranger", "KV"]).items()}
    {'s@w': [True, False], 'ranger': [False, True], 'KV': [False, False]}
    """
    found = {name: np.zeros(len(runs), bool) for name in names}
    for column in KINDS:
        # A campaign of a million runs has few different lists of detectors.
        codes, lists = pd.factorize(runs[column].astype(object).fillna(""))
        members = [set(str(text).split(";")) for text in lists]
        for name in found.keys() & set().union(*members):
            found[name] |= np.array([name in one for one in members])[codes]
    return found


class _Shares:
    """Rates over one subset of the faults, for any detector."""

    def __init__(self, faults: pd.DataFrame, rows: Hits, cluster: Cluster, whole: bool) -> None:
        self.rows, self._weights, self._whole = rows, weights_of(faults), whole
        self._grouping = Grouping(faults, None, cluster)

    def of(self, seen: Hits) -> dict[str, Any]:
        [(_, row)] = group_rates(self._grouping, seen[self.rows], self._weights, self._whole)
        return row


def _shares(faults: pd.DataFrame, cluster: Cluster) -> dict[str, _Shares]:
    """Return the rates over all faults, over the harmful ones and over the effective ones."""
    subsets = {
        "detected": np.ones(len(faults), bool),
        "recall_critical": harmful(faults) & faults.index.isin(propagated(faults).index),
        "recall_effective": faults["effective"].to_numpy(bool),
    }
    # The draw decides which faults are harmful or effective, so only all faults together have weights of mean 1.
    return {name: _Shares(faults[rows], rows, cluster, name == "detected") for name, rows in subsets.items()}


def _detector_rows(
    lookers: Lookers, seen: dict[str, Hits], shares: dict[str, _Shares], clean: pd.DataFrame | None
) -> Iterator[dict[str, Any]]:
    critical = shares["recall_critical"]
    above, count = np.zeros(len(critical.rows), bool), np.zeros(len(critical.rows), np.int64)
    for name, kind in lookers.kinds.items():
        if kind != "oracle":
            count += seen[name]
    for name, kind in lookers.kinds.items():
        row: dict[str, Any] = {"detector": name, "kind": kind, "cost": cost_of(name), **_false(clean, [name])}
        if name not in lookers.inapplicable:
            others = count - seen[name] if kind != "oracle" else count
            row |= _row(seen[name], shares)
            row["exclusive"] = int((critical.rows & seen[name] & (others == 0)).sum())
            if kind != "oracle":
                above |= seen[name]
                row["union"] = critical.of(above)["rate"]
        yield row


def _suite_rows(
    lookers: Lookers, seen: dict[str, Hits], shares: dict[str, _Shares], clean: pd.DataFrame | None
) -> Iterator[dict[str, Any]]:
    for suite, members in SUITES.items():
        if len(members) > 1 and set(members) <= set(lookers.kinds):
            by_suite = np.logical_or.reduce([seen[name] for name in members])
            yield {"detector": suite, "kind": "suite", **_row(by_suite, shares), **_false(clean, members)}


def _row(seen: Hits, shares: dict[str, _Shares]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, share in shares.items():
        rate = share.of(seen)
        row |= {name: rate["rate"], f"{name}_low": rate["low"], f"{name}_high": rate["high"]}
        row |= dict(zip(_COUNTS_OF[name], (rate["n"], rate["successes"]), strict=True))
    return row


def _false(clean: pd.DataFrame | None, names: Sequence[str]) -> dict[str, float]:
    """Return the number of false positives and of checked rows; NaN if they are not known."""
    if clean is None or any(map(is_oracle, names)):
        return {"false_positives": math.nan, "clean_rows": math.nan}
    own = clean[clean["detector"].isin(names).to_numpy(bool) & clean["applicable"].to_numpy(bool)]
    return {"false_positives": int(own["violations"].sum()), "clean_rows": int(own["rows_checked"].sum())}


def _names(column: pd.Series) -> list[str]:
    lists = column.astype(object).fillna("").unique()
    return sorted({name for text in lists for name in str(text).split(";") if name})


def _same_tolerance(runs: pd.DataFrame, clean: pd.DataFrame | None) -> pd.DataFrame | None:
    if clean is None or "detect.tolerance" not in runs.columns or "tolerance" not in clean.columns:
        return clean
    return clean[clean["tolerance"].isin(runs["detect.tolerance"].dropna().unique())]
