"""The table at the end of a campaign: outcomes and detections, by location and bit field.

Every rate has its n and a 95 % interval that respects clusters (``experiments.analysis``); faults that were drawn twice
count once. Detections are counted over all runs; outcomes and detections of harmful faults are counted over the runs
with an outcome (``run.scope``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bounds.registry import is_oracle
from bounds.suites import SUITES
from experiments.analysis.detectors import fired
from experiments.analysis.rates import critical_rate, group_rates
from experiments.analysis.statistics.clusters import Grouping
from experiments.analysis.statistics.distinct import distinct_faults, weights_of
from experiments.analysis.statistics.intervals import wilson_interval
from experiments.campaign.folder import CampaignFolder
from experiments.report.facts.looking import AXES, clean_of, detectors_of
from experiments.tables.schema import HARMFUL, OUTCOMES
from fault_injection import LOCATIONS
from fault_injection.numbers.formats import FIELDS

__all__ = ["closing_table", "wilson_interval"]

READ_COLUMNS = (
    *("run_id", "fault_id", "location", "bit_field", "effective", "scope", "outcome", "execution"),
    *("model", "batch_index", "layer", "index_head", "sampling_weight"),
    *(
        "violation_detected",
        "detectors",
        "unproved_detectors",
        "oracle_detectors",
        "certificate",
        "repairs",
        "miscorrections",
        "unrepaired",
    ),
    *("baseline_seconds", "injection_seconds", "bounds_seconds", "detection_seconds", "total_seconds"),
)
"""The columns of ``runs.csv`` that are read; for a million runs the others would take gigabytes."""

BY = ["location", "bit_field"]
"""The columns that make the lines of outcomes."""


def closing_table(folder: CampaignFolder) -> str:
    """Return the text of the table from the merged files of a campaign.

    Points of the grid that differ only in ``detect`` fields have the same faults: each point has a table of its own.
    """
    runs = pd.read_csv(folder.file("runs.csv"), usecols=READ_COLUMNS, dtype={"run_id": str, "fault_id": str})
    if runs.empty:
        return "no finished runs"
    plan = pd.read_csv(folder.file("plan.csv"), dtype=str)
    axes = [name for name in plan.columns if name.startswith(("detect.", "run."))]
    if not axes:
        return "\n".join(_table(folder, runs))
    lines: list[str] = []
    for values, part in plan.groupby(axes, sort=False, dropna=False):
        heading = ", ".join(f"{axis} = {value}" for axis, value in zip(axes, values, strict=True))
        own = {axis: str(part[axis].iloc[0]) for axis in AXES if axis in axes}
        lines += [f"== {heading}", *_table(folder, runs[runs.run_id.isin(part.run_id)], own), ""]
    return "\n".join(lines)


def _table(folder: CampaignFolder, runs: pd.DataFrame, point: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    if runs.empty:
        return ["no finished runs"]
    distinct = distinct_faults(runs)
    lines = [
        f"{len(runs)} runs, {len(distinct)} distinct faults, {int((~distinct.effective.astype(bool)).sum())} of them "
        "not effective",
        *_scope_lines(runs),
        *_weight_lines(runs),
        "",
        f"{'location':9}{'bit field':10}{'n':>6}{'masked':>8}{'benign':>8}{'critical':>9}{'nonfin':>8}"
        f"  {'detected (95 % interval)':27}{'of harmful':>11}{'inject ms':>11}{'detect ms':>11}",
    ]
    named = distinct.assign(bit_field=distinct.bit_field.astype(object).fillna("-"))
    # One grouping serves all lines: to group the clusters of each line alone costs ten times as much.
    grouping, seen, weights = Grouping(named, BY), distinct.violation_detected.to_numpy(bool), weights_of(distinct)
    rates = {key: _share(row) for key, row in group_rates(grouping, seen, weights, whole=False)}
    order = {name: i for i, name in enumerate((*LOCATIONS, *FIELDS))}
    for key, group in sorted(named.groupby(BY), key=lambda item: [order.get(name, 99) for name in item[0]]):
        lines.append(_line(str(key[0]), str(key[1]), group, rates[key]))
    of_all = Grouping(distinct)
    lines += [_line("all", "", distinct, _rate(distinct, seen, of_all, whole=True)), ""]
    lines += _detector_lines(folder, distinct, of_all, point)
    return [*lines, *_correction_lines(distinct), *_times_lines(runs)]


def _scope_lines(runs: pd.DataFrame) -> list[str]:
    """Return how many runs were propagated, if not all were."""
    propagated = runs.scope == "full"
    if propagated.all():
        return []
    masked = int((~propagated & runs.outcome.notna()).sum())
    return [
        f"{int(propagated.sum())} of {len(runs)} runs propagated (run.scope=site); of the others {masked} are masked "
        f"in their layer and {int(runs.outcome.isna().sum())} have no outcome; shares of outcomes: take scope = full"
    ]


def _weight_lines(runs: pd.DataFrame) -> list[str]:
    """Return a note on weights, and the harmful share, if runs were not drawn uniformly (``fault.aim``)."""
    if weights_of(runs) is None:
        return []
    said = "drawn with unequal probabilities (fault.aim): counts are of these runs, shares with intervals are weighted"
    found = critical_rate(runs).iloc[0]
    if not found.n:
        return [said]
    return [
        f"{said}; {100 * found.rate:.2f} % ({100 * found.low:.2f} - {100 * found.high:.2f}) of all faults are harmful "
        f"({found.method})"
    ]


def _line(location: str, field: str, group: pd.DataFrame, rate: str) -> str:
    number = group.outcome.value_counts()
    counts = [int(number.get(outcome, 0)) for outcome in OUTCOMES]
    harmful = group[group.outcome.isin(HARMFUL)]
    seen = f"{int(harmful.violation_detected.sum())}/{len(harmful)}" if len(harmful) else "-"
    detecting = 1e3 * float((group.bounds_seconds + group.detection_seconds).mean())
    return (
        f"{location:9}{field:10}{len(group):6}{counts[0]:8}{counts[1]:8}{counts[2]:9}{counts[3]:8}"
        f"  {rate:27}{seen:>11}"
        f"{1e3 * float(group.injection_seconds.mean()):11.2f}{detecting:11.2f}"
    )


def _rate(runs: pd.DataFrame, seen: NDArray[np.bool_], grouping: Grouping, whole: bool = False) -> str:
    """Return a share and its interval.

    Args:
        runs: the faults.
        seen: which of them count.
        grouping: the clusters of ``runs``.
        whole: ``runs`` are all faults of a table, not a selection of them.
    """
    [(_, row)] = group_rates(grouping, seen, weights_of(runs), whole)
    return _share(row)


def _share(row: Mapping[str, Any]) -> str:
    return f"{100 * row['rate']:5.1f} % ({100 * row['low']:.1f} - {100 * row['high']:.1f})"


def _detector_lines(
    folder: CampaignFolder, distinct: pd.DataFrame, of_all: Grouping, point: Mapping[str, str]
) -> list[str]:
    """Return a line for each detector: its detections, and its false positives on the fault-free passes."""
    every = pd.read_csv(folder.file("clean.csv"))
    names = detectors_of(folder.config().detect, point)
    # An oracle does not judge fault-free passes; it applies where the detector applies that gives it its bounds.
    judge = {name: name.removeprefix("oracle_") if is_oracle(name) else name for name in names}
    applying = set(every[every.applicable.astype(bool)].detector.unique())
    judged = set(every.detector.unique())
    known = [name for name in names if judge[name] in judged]
    clean = clean_of(every, point)
    hits = fired(distinct, known)
    harmful = distinct.outcome.isin(HARMFUL).to_numpy(bool)

    harmed = distinct[harmful]
    of_harmed = Grouping(harmed)

    def shares(seen: NDArray[np.bool_]) -> str:
        of_harmful = _rate(harmed, seen[harmful], of_harmed) if harmful.any() else "-"
        return f"{_rate(distinct, seen, of_all, whole=True):27}{of_harmful:27}"

    lines = [f"{'detector':18}{'detected':27}{'of harmful':27}{'false positives':>16}{'in clean rows':>15}"]
    for suite, members in SUITES.items():
        if len(members) > 1 and set(members) <= set(known):
            silent = [name for name in members if judge[name] not in applying]
            note = f"  ({len(silent)} of its {len(members)} do not apply)" if silent else ""
            lines.append(f"{'suite ' + suite:18}{shares(np.any([hits[name] for name in members], axis=0))}{note}")
    unproved = set(clean[~clean.proved.astype(bool)].detector.unique())
    applicable = clean[clean.applicable.astype(bool)]
    sums = applicable.groupby("detector")[["violations", "rows_checked"]].sum().reindex(known, fill_value=0)
    for name, violations, rows_checked in sums.itertuples():
        false, checked = str(int(violations)), f"{int(rows_checked):,}"
        note = "  (no theorem rules out false positives)" if name in unproved else ""
        if is_oracle(name):
            false, checked, note = "-", "-", "  (reads the fault-free pass: no detector)"
        if judge[name] in applying:
            lines.append(f"{name:18}{shares(hits[name])}{false:>16}{checked:>15}{note}")
        else:
            lines.append(f"{name:18}{'not applicable':27}")
    return [*lines, *_clean_lines(clean)]


def _clean_lines(clean: pd.DataFrame) -> list[str]:
    """Return which detectors do not apply and why, and the false positives of the proved detectors."""
    online = clean[clean.applicable.astype(bool) & clean.proved.astype(bool) & ~clean.detector.map(is_oracle)]
    total, rows_checked = int(online.violations.sum()), int(online.rows_checked.sum())
    skipped = clean[~clean.applicable.astype(bool)].groupby("detector").reason.first()
    return [
        *(f"not applicable: {detector}: {reason}" for detector, reason in skipped.items()),
        f"false positives: {total} violations in {rows_checked:,} rows checked by all proved detectors together, on "
        f"{clean.baseline.nunique()} fault-free passes",
    ]


def _correction_lines(distinct: pd.DataFrame) -> list[str]:
    """Return the repairs of ``detect.correct`` and the certificate's median; no line if neither was requested."""
    lines = []
    if distinct.repairs.notna().any():
        lines.append(
            f"correction: {int(distinct.repairs.sum())} elements repaired in {int((distinct.repairs > 0).sum())} of "
            f"{len(distinct)} runs, {int(distinct.miscorrections.sum())} miscorrections, "
            f"{int(distinct.unrepaired.sum())} errors seen and not repaired; outcomes are those after repair"
        )
    certified = distinct.certificate.dropna()
    if len(certified):
        lines.append(
            f"certificate: in the {len(certified)} runs without an alarm a single fault can have moved a row of the "
            f"output by at most {100 * certified.median():.2g} % of its length (median)"
        )
    return lines


def _times_lines(runs: pd.DataFrame) -> list[str]:
    means = {
        name: 1e3 * float(runs[f"{name}_seconds"].mean())
        for name in ("baseline", "injection", "bounds", "detection", "total")
    }
    executed = runs.execution.value_counts()
    return [
        "mean milliseconds: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items()),
        "executed: " + ", ".join(f"{count} by {engine}" for engine, count in executed.items()),
    ]
