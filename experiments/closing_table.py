"""The table a campaign closes with: by location and bit field, what the faults did and who saw them.

Every rate stands with its n and a 95 % Wilson interval; faults that were drawn twice count once.

Public names: ``closing_table``, ``wilson_interval``.
"""

from __future__ import annotations

import pandas as pd
from scipy.stats import binomtest

from experiments.campaign_folder import CampaignFolder
from experiments.result import OUTCOMES
from fault_injection import LOCATIONS
from fault_injection.bits import FIELDS


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a rate.

    >>> [round(limit, 3) for limit in wilson_interval(0, 100)]
    [0.0, 0.037]
    """
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def closing_table(folder: CampaignFolder) -> str:
    """Return the text of the table from the merged files of a campaign."""
    runs = pd.read_csv(folder.file("runs.csv"), dtype={"run_id": str, "fault_id": str}, keep_default_na=True)
    if runs.empty:
        return "no finished runs"
    distinct = runs.drop_duplicates("fault_id")
    lines = [
        f"{len(runs)} runs, {len(distinct)} distinct faults, {int((~distinct.effective.astype(bool)).sum())} of them "
        "not effective",
        "",
        f"{'location':9}{'bit field':10}{'n':>6}{'masked':>8}{'benign':>8}{'critical':>9}{'nonfin':>8}"
        f"  {'detected (95 % interval)':27}{'of harmful':>11}",
    ]
    groups = distinct.assign(bit_field=distinct.bit_field.fillna("-")).groupby(["location", "bit_field"])
    order = {name: i for i, name in enumerate((*LOCATIONS, *FIELDS))}
    for (location, field), group in sorted(groups, key=lambda item: [order.get(name, 99) for name in item[0]]):
        lines.append(_line(str(location), str(field), group))
    lines += [_line("all", "", distinct), "", *_clean_lines(folder), *_oracle_lines(distinct), _times_line(runs)]
    return "\n".join(lines)


def _line(location: str, field: str, group: pd.DataFrame) -> str:
    counts = [int((group.outcome == outcome).sum()) for outcome in OUTCOMES]
    harmful = group[group.outcome.isin(["critical", "nonfinite"])]
    seen = f"{int(harmful.violation_detected.sum())}/{len(harmful)}" if len(harmful) else "-"
    return (
        f"{location:9}{field:10}{len(group):6}{counts[0]:8}{counts[1]:8}{counts[2]:9}{counts[3]:8}"
        f"  {_rate(int(group.violation_detected.sum()), len(group)):27}{seen:>11}"
    )


def _rate(successes: int, trials: int) -> str:
    low, high = wilson_interval(successes, trials)
    return f"{100 * successes / trials:5.1f} % ({100 * low:.1f} - {100 * high:.1f})"


def _clean_lines(folder: CampaignFolder) -> list[str]:
    clean = pd.read_csv(folder.file("clean.csv"))
    online = clean[clean.applicable.astype(bool) & ~clean.detector.str.startswith("oracle_")]
    rows, violations = int(online.rows_checked.sum()), int(online.violations.sum())
    skipped = clean[~clean.applicable.astype(bool)].groupby("detector").reason.first()
    lines = [f"false positives: {violations} violations in {rows} clean rows of {clean.baseline.nunique()} inputs"]
    return lines + [f"not applicable: {detector}: {reason}" for detector, reason in skipped.items()]


def _oracle_lines(distinct: pd.DataFrame) -> list[str]:
    known = distinct[distinct.oracle_detected.notna()]
    if known.empty:
        return []
    fired = int(known.oracle_detected.astype(str).eq("True").sum())
    return [f"with the fault-free pass as an oracle (not a detector): {_rate(fired, len(known)).strip()} detected"]


def _times_line(runs: pd.DataFrame) -> str:
    means = {
        name: 1e3 * float(runs[f"{name}_seconds"].mean())
        for name in ("baseline", "injection", "bounds", "detection", "total")
    }
    return "mean milliseconds: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items())
