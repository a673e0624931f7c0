"""The closing table of campaigns in which not every fault was propagated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from simulated_runs import runs_of

from experiments.analysis import critical_rate
from experiments.campaign.folder import CampaignFolder
from experiments.campaign.merge import merge_campaign
from experiments.config import ExperimentConfig
from experiments.plan.plan import make_plan
from experiments.report.closing_table import _weight_lines, closing_table
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import CleanRow, ExperimentResult, cells, columns


def table_of(tmp_path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of a campaign whose runs have these values."""
    config = ExperimentConfig(name="x", output_dir=str(tmp_path), num_runs=len(rows))
    plan = make_plan(config)
    folder = CampaignFolder.of(config)
    folder.begin(config, plan)
    fixed = {
        "location": "scores", "bit_field": "exponent", "effective": True, "scope": "full", "injection_seconds": 0.01,
        "bounds_seconds": 0.0, "detection_seconds": 0.0, "execution": "plain", "violation_detected": False,
    }  # fmt: skip
    runs = [
        ExperimentResult(
            # Each run on an input of its own, unless the row says otherwise: no two of them tell the same story.
            **{
                "run_id": run.run_id,
                "repeat": run.repeat,
                "fault_id": run.run_id,
                "batch_index": run.index,
                "detectors": "s@w" if row.get("violation_detected") else "",
                **fixed,
                **row,
            }
        )
        for run, row in zip(plan.runs, rows, strict=True)
    ]
    clean = CleanRow(
        baseline="b", detector="s@w", tolerance=0.0, layer=0, proved=True, applicable=True, rows_checked=4, violations=0
    )
    for name, row_type, found in (
        ("0001", ExperimentResult, runs), ("0001.clean", CleanRow, [clean]),
    ):  # fmt: skip
        write_rows(folder.shards / f"{name}.csv", columns(row_type), map(cells, found))
    merge_campaign(folder)
    return closing_table(folder).splitlines()


def site(count: int, **values: Any) -> list[dict[str, Any]]:
    return [{"scope": "site", "execution": "fast", **values}] * count


def full(count: int, outcome: str, **values: Any) -> list[dict[str, Any]]:
    return [{"outcome": outcome, **values}] * count


def numbers(lines: Sequence[str], first: str) -> list[str]:
    return next(line for line in lines if line.startswith(first)).split()[1:]


def test_outcomes_and_harmful_faults_are_counted_where_they_are_known(tmp_path: Path) -> None:
    rows = [
        *site(5, violation_detected=True), *site(3), *site(2, outcome="masked"),
        *full(2, "critical", violation_detected=True), *full(1, "critical"), *full(1, "nonfinite", execution="fast"),
        *full(4, "benign"),
    ]  # fmt: skip
    lines = table_of(tmp_path, rows)
    assert lines[0].startswith("18 runs, 18 distinct faults")
    assert lines[1] == (
        "8 of 18 runs propagated (run.scope=site); of the others 2 are masked in their layer and 8 have no outcome; "
        "shares of outcomes: take scope = full"
    )
    # n, masked, benign, critical, nonfinite; then 7 of 18 detected, and 2 of the 4 harmful ones.
    assert numbers(lines, "all")[:6] == ["18", "2", "4", "3", "1", "38.9"]
    assert numbers(lines, "all")[-3] == "2/4"
    assert numbers(lines, "s@w")[0] == "38.9"
    assert "50.0 % (15.0 - 85.0)" in next(line for line in lines if line.startswith("s@w"))
    assert lines[-1] == "executed: 11 by fast, 7 by plain"


def test_a_campaign_that_propagates_everything_says_nothing_of_scopes(tmp_path: Path) -> None:
    lines = table_of(tmp_path, full(3, "benign"))
    assert not any("propagated" in line for line in lines)
    assert lines[-1] == "executed: 3 by plain"


def test_a_campaign_that_propagates_nothing(tmp_path: Path) -> None:
    lines = table_of(tmp_path, site(3, violation_detected=True))
    assert lines[1].startswith(
        "0 of 3 runs propagated (run.scope=site); of the others 0 are masked in their layer and 3"
    )
    assert numbers(lines, "all")[:6] == ["3", "0", "0", "0", "0", "100.0"]
    assert numbers(lines, "all")[-3] == "-"


@pytest.mark.parametrize("first", [True, False])
def test_of_a_fault_that_was_propagated_once_the_outcome_counts(tmp_path: Path, first: bool) -> None:
    twice = [*full(1, "critical", fault_id="f"), *site(1, fault_id="f")]
    lines = table_of(tmp_path, [*(twice if first else twice[::-1]), *site(2, violation_detected=True)])
    assert lines[0].startswith("4 runs, 3 distinct faults")
    assert numbers(lines, "all")[:5] == ["3", "0", "0", "1", "0"]
    assert numbers(lines, "all")[-3] == "0/1"


def test_runs_that_share_an_input_and_a_head_widen_the_interval(tmp_path: Path) -> None:
    rows = [{"outcome": "benign", "batch_index": place // 4, "violation_detected": place < 8} for place in range(16)]
    line = next(line for line in table_of(tmp_path, rows) if line.startswith("all"))
    # Four clusters that agree within: not 8 of 16 (28.0 - 72.0) but 2 of 4 and less, for three degrees of freedom.
    assert "50.0 % (" in line
    low, high = map(float, line.split("(")[1].split(")")[0].split(" - "))
    assert low < 15.0
    assert high > 85.0


def test_the_harmful_share_of_weighted_runs_is_that_of_the_analysis() -> None:
    runs = runs_of(60, sampling_weight=[0.5, 1.5] * 30, batch_index=range(60),
                   outcome=["critical", "benign", "benign", "benign"] * 15)  # fmt: skip
    [line] = _weight_lines(runs)
    row = critical_rate(runs).iloc[0]
    assert "counts are of these runs, shares with intervals are weighted" in line
    assert f"{100 * row.rate:.2f} % ({100 * row.low:.2f} - {100 * row.high:.2f}) of all faults are harmful" in line
    assert _weight_lines(runs.assign(sampling_weight=1.0)) == []
