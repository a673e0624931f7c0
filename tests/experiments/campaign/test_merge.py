from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from micro_campaign import files_below, table

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.merge import merge_campaign
from experiments.config import ExperimentConfig
from experiments.errors import CheckRefusedError
from experiments.plan.plan import make_plan
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import (
    UNREPEATABLE,
    CleanRow,
    DetectionRow,
    ExperimentResult,
    FailureRow,
    PropagationRow,
    cells,
    columns,
)


class Made:
    """A campaign of six runs, whose shards a test writes by hand."""

    def __init__(self, tmp_path: Path) -> None:
        self.config = ExperimentConfig(name="x", output_dir=str(tmp_path), num_runs=3, sweep={"fault.bit": [1, 2]})
        self.plan = make_plan(self.config)
        self.ids = [run.run_id for run in self.plan.runs]
        self.folder = CampaignFolder.of(self.config)
        self.folder.begin(self.config, self.plan)

    def write(self, name: str, row_type: type[Any], rows: Sequence[Any]) -> None:
        write_rows(self.folder.shards / f"{name}.csv", columns(row_type), map(cells, rows))

    def runs(self, shard: str, numbers: Sequence[int], **values: Any) -> None:
        self.write(shard, ExperimentResult, [self.run(number, **values) for number in numbers])

    def run(self, number: int, **values: Any) -> ExperimentResult:
        return ExperimentResult(**{"run_id": self.ids[number], "outcome": "benign", "loss_diff": 0.1, **values})

    def detections(self, shard: str, numbers: Sequence[int], **values: Any) -> None:
        rows = [
            DetectionRow(run_id=self.ids[n], detector=d, layer=0, **values) for n in numbers for d in ("finite", "s@w")
        ]
        self.write(f"{shard}.detections", DetectionRow, rows)

    def propagation(self, shard: str, numbers: Sequence[int], change: float = 0.5) -> None:
        blocks = [(n, layer) for n in numbers for layer in (1, 2, 10)]
        rows = [PropagationRow(run_id=self.ids[n], layer=layer, relative_change=change) for n, layer in blocks]
        self.write(f"{shard}.propagation", PropagationRow, rows)

    def failures(self, shard: str, numbers: Sequence[int], why: str = "ValueError: x") -> None:
        self.write(
            f"{shard}.failures",
            FailureRow,
            [FailureRow(run_id=self.ids[n], exception=why, traceback="t") for n in numbers],
        )

    def merged(self, name: str = "runs.csv") -> list[int]:
        return [self.ids.index(row["run_id"]) for row in table(self.folder.file(name))]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def test_rows_come_in_the_order_of_the_plan_whoever_did_them(made: Made) -> None:
    made.runs("0001", [5, 0, 2])
    made.runs("0003", [1, 4])
    made.runs("0002", [3])
    made.detections("0001", [5, 0, 2])
    made.detections("0003", [1, 4])
    made.detections("0002", [3])
    result = merge_campaign(made.folder)
    assert (result.planned, result.finished, result.missing, result.failed) == (6, 6, (), ())
    assert made.merged() == [0, 1, 2, 3, 4, 5]
    assert made.merged("detections.csv") == [n for n in range(6) for _ in range(2)]


def test_missing_runs_are_named_in_the_order_of_the_plan(made: Made) -> None:
    made.runs("0001", [4, 1])
    result = merge_campaign(made.folder)
    assert (result.planned, result.finished) == (6, 2)
    assert result.missing == tuple(made.ids[n] for n in (0, 2, 3, 5))
    assert made.merged() == [1, 4]


def test_a_campaign_without_shards_has_empty_tables_with_headers(made: Made) -> None:
    assert merge_campaign(made.folder).missing == tuple(made.ids)
    for name, row_type in (
        ("runs", ExperimentResult),
        ("detections", DetectionRow),
        ("propagation", PropagationRow),
        ("clean", CleanRow),
        ("failures", FailureRow),
    ):
        assert made.folder.file(f"{name}.csv").read_text() == ",".join(columns(row_type)) + "\n"


def test_a_run_that_two_workers_did_counts_once_if_only_their_timings_and_engines_differ(made: Made) -> None:
    made.runs("0001", [0, 1], **dict.fromkeys(UNREPEATABLE, 1.0))
    made.runs("0002", [1, 2], **dict.fromkeys(UNREPEATABLE, 2.0))
    made.detections("0001", [0, 1])
    made.detections("0002", [1, 2])
    assert merge_campaign(made.folder).finished == 3
    assert made.merged() == [0, 1, 2]
    assert made.merged("detections.csv") == [0, 0, 1, 1, 2, 2]


def test_blocks_stay_in_their_order_and_come_from_the_worker_whose_run_counts(made: Made) -> None:
    made.runs("0002", [3, 1])
    made.runs("0001", [5, 1])
    made.propagation("0002", [3, 1], change=0.25)
    made.propagation("0001", [5, 1])
    merge_campaign(made.folder)
    rows = table(made.folder.file("propagation.csv"))
    assert [(made.ids.index(row["run_id"]), row["layer"], row["relative_change"]) for row in rows] == [
        (run, layer, change) for run, change in ((1, "0.5"), (3, "0.25"), (5, "0.5")) for layer in ("1", "2", "10")
    ]


def test_a_run_twice_in_one_shard_counts_once(made: Made) -> None:
    made.runs("0001", [0, 1, 1])
    assert merge_campaign(made.folder).finished == 2
    assert made.merged() == [0, 1]


@pytest.mark.parametrize("value", [0.2, -0.1, None, float("nan")])
def test_a_run_with_two_results_is_refused_with_what_differs(made: Made, value: float | None) -> None:
    made.runs("0001", [0, 1])
    made.runs("0002", [1], loss_diff=value, outcome="critical")
    with pytest.raises(CheckRefusedError, match=rf"run {made.ids[1]} was done twice .* in loss_diff, outcome;"):
        merge_campaign(made.folder)
    assert "runs.csv" not in files_below(made.folder.path)


def test_two_equal_nans_are_the_same_result(made: Made) -> None:
    made.runs("0001", [1], loss_diff=float("nan"))
    made.runs("0002", [1], loss_diff=float("nan"))
    assert merge_campaign(made.folder).finished == 1


def test_a_run_that_is_not_in_the_plan_is_refused(made: Made) -> None:
    made.runs("0001", [0])
    made.write("0002", ExperimentResult, [ExperimentResult(run_id="feedfeedfeedfeed")])
    with pytest.raises(CheckRefusedError, match=r"runs that are not in the plan, e\.g\. feedfeedfeedfeed"):
        merge_campaign(made.folder)


def test_a_failure_disappears_when_the_run_was_done_later(made: Made) -> None:
    made.failures("0001", [1, 2])
    made.failures("0002", [2, 3])
    made.runs("0002", [1])
    result = merge_campaign(made.folder)
    assert result.failed == (made.ids[2], made.ids[3])
    assert set(result.failed) < set(result.missing)
    assert made.merged("failures.csv") == [2, 3]


def test_of_several_failures_of_a_run_the_last_is_kept(made: Made) -> None:
    rows = [FailureRow(run_id=made.ids[0], exception=f"ValueError: {n}", traceback="t") for n in range(3)]
    made.write("0001.failures", FailureRow, rows)
    merge_campaign(made.folder)
    assert [row["exception"] for row in table(made.folder.file("failures.csv"))] == ["ValueError: 2"]


def test_detections_of_a_run_that_was_not_finished_are_left_out(made: Made) -> None:
    made.runs("0001", [0])
    made.detections("0001", [0, 1])
    made.detections("0002", [0, 2])
    merge_campaign(made.folder)
    assert made.merged("detections.csv") == [0, 0]


def test_clean_rows_are_kept_once_and_sorted(made: Made) -> None:
    def rows(*numbers: int) -> list[CleanRow]:
        return [CleanRow(baseline=f"{n}", detector="finite", layer=n, rows_checked=4, violations=0) for n in numbers]

    made.write("0001.clean", CleanRow, rows(2, 0))
    made.write("0002.clean", CleanRow, rows(1, 2))
    merge_campaign(made.folder)
    assert [row["baseline"] for row in table(made.folder.file("clean.csv"))] == ["0", "1", "2"]


def test_a_torn_tail_is_left_out_and_the_shard_is_not_touched(made: Made) -> None:
    made.runs("0001", [0, 1])
    path = made.folder.shards / "0001.csv"
    path.write_bytes(path.read_bytes()[:-5])
    before = path.read_bytes()
    result = merge_campaign(made.folder)
    assert (result.finished, made.merged()) == (1, [0])
    assert path.read_bytes() == before


def test_a_damaged_shard_is_refused(made: Made) -> None:
    made.runs("0001", [0, 1, 2])
    path = made.folder.shards / "0001.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:30] + "\n", lines[3]]))
    with pytest.raises(CheckRefusedError, match=r"0001\.csv: line 3 .* damaged"):
        merge_campaign(made.folder)


def test_merging_twice_gives_the_same_files(made: Made) -> None:
    made.runs("0001", [0, 1])
    made.detections("0001", [0, 1])
    made.failures("0001", [3])
    merge_campaign(made.folder)
    names = ("runs.csv", "detections.csv", "propagation.csv", "clean.csv", "failures.csv")
    first = [made.folder.file(name).read_bytes() for name in names]
    merge_campaign(made.folder)
    assert [made.folder.file(name).read_bytes() for name in names] == first


def test_merging_leaves_no_temporary_files(made: Made) -> None:
    made.runs("0001", [0])
    merge_campaign(made.folder)
    assert [name for name in files_below(made.folder.path) if "tmp" in name or name.startswith(".")] == []


@pytest.mark.parametrize("numbers", [[1, 2, 1], [1, 1], [0, 1, 1, 0], [1, 5, 1, 2, 1]], ids=str)
def test_rows_of_a_run_that_are_twice_in_one_shard_are_merged_once(made: Made, numbers: list[int]) -> None:
    # As after a worker that was cut off, and one that did its last runs again. Run 5 never finished.
    made.runs("0001", [number for number in numbers if number != 5])
    made.detections("0001", numbers)
    made.propagation("0001", numbers)
    done = sorted(set(numbers) - {5})
    assert merge_campaign(made.folder).finished == len(done)
    assert made.merged("detections.csv") == [n for n in done for _ in range(2)]
    assert made.merged("propagation.csv") == [n for n in done for _ in range(3)]
