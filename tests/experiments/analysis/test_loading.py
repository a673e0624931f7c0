"""Reading campaigns: types, axes, and everything a file can have wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from simulated_runs import write_campaign

from experiments.analysis import load_clean, load_detections, load_propagation, load_runs
from experiments.errors import MissingResourceError, UsageError
from experiments.tables.csv_file import write_rows
from experiments.tables.schema import CleanRow, ExperimentResult, PropagationRow, cells, columns

ROW: dict[str, Any] = {
    "model": "m", "bit": 3, "outcome": "benign", "violation_detected": True, "effective": False, "detectors": "",
    "value_after": math.inf, "loss_diff": 0.1 + 0.2, "fault_id": "f", "bits_before": None, "scope": "full",
}  # fmt: skip


def test_types_come_from_the_schema(tmp_path: Path) -> None:
    runs = load_runs(
        write_campaign(tmp_path / "one", [ROW, {**ROW, "bit": None, "outcome": None, "value_after": math.nan}])
    )
    assert list(runs.columns) == [*columns(ExperimentResult), "campaign"]
    assert (str(runs.bit.dtype), str(runs.violation_detected.dtype), str(runs.loss_diff.dtype)) == (
        "Int64", "boolean", "float64",
    )  # fmt: skip
    assert (str(runs.outcome.dtype), str(runs.campaign.dtype)) == ("category", "category")
    assert runs.bit.isna().tolist() == runs.outcome.isna().tolist() == [False, True]
    assert runs.value_after.iloc[0] == math.inf
    assert runs.loss_diff.iloc[0] == 0.1 + 0.2, "floats come back to the same bits"
    assert runs.detectors.tolist() == ["", ""], "no detector fired: a text, not a missing one"
    assert runs.bits_before.isna().all()
    assert runs.campaign.tolist() == ["one", "one"]
    runs.loc[0, "loss_diff"], runs.loc[0, "bit"] = 1.0, 7
    assert (runs.loss_diff.iloc[0], runs.bit.iloc[0]) == (1.0, 7), "a table that was read can be written to"


def test_swept_fields_without_a_column_are_added(tmp_path: Path) -> None:
    axes = {"detect.tolerance": ["0", "1e-05"], "fault.bit": ["3", "4"], "run.full_every": [1, 2],
            "detect.correct": [True, False], "fault.index": ["[0]", "[1]"]}  # fmt: skip
    runs = load_runs(write_campaign(tmp_path / "one", [ROW, ROW], axes))
    assert runs["detect.tolerance"].tolist() == [0.0, 1e-5]
    assert runs["run.full_every"].tolist() == [1, 2]
    assert runs["detect.correct"].tolist() == [True, False]
    assert runs["fault.index"].tolist() == ["[0]", "[1]"]
    assert "fault.bit" not in runs, "it is in the column bit"


def test_an_axis_follows_its_run_whatever_the_order(tmp_path: Path) -> None:
    folder = write_campaign(tmp_path / "one", [ROW] * 3, {"detect.tolerance": [1, 2, 3]})
    header, *lines = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text(header + lines[2] + lines[0])
    assert load_runs(folder)["detect.tolerance"].tolist() == [3, 1]


def test_several_campaigns_and_chosen_columns(tmp_path: Path) -> None:
    one = write_campaign(tmp_path / "one", [ROW], {"detect.tolerance": [0.5]})
    two = write_campaign(tmp_path / "two", [{**ROW, "outcome": "critical"}] * 2)
    runs = load_runs([one, two / "runs.csv"], columns=["outcome", "bit"])
    assert list(runs.columns) == ["outcome", "bit", "campaign", "detect.tolerance"]
    assert runs.campaign.tolist() == ["one", "two", "two"]
    assert runs.outcome.tolist() == ["benign", "critical", "critical"]
    assert runs["detect.tolerance"].isna().tolist() == [False, True, True]


def test_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    runs = load_runs([write_campaign(tmp_path / side / "same", [ROW]) for side in "ab"])
    assert runs.campaign.nunique() == 2


def test_the_other_tables(tmp_path: Path) -> None:
    folder = write_campaign(tmp_path / "one", [ROW])
    clean = CleanRow(baseline="b", detector="s@w", tolerance=0.0, layer=0, proved=True, applicable=True,
                     rows_checked=4, violations=0)  # fmt: skip
    write_rows(folder / "clean.csv", columns(CleanRow), [cells(clean)])
    assert load_clean(folder / "runs.csv").rows_checked.tolist() == [4]
    assert list(load_propagation(folder).columns) == [*columns(PropagationRow), "campaign"]
    assert len(load_propagation(folder)) == 0
    write_rows(folder / "propagation.csv", columns(PropagationRow), [["0", "1", "inf"]])
    assert load_propagation(folder).relative_change.tolist() == [math.inf]
    with pytest.raises(MissingResourceError, match=r"detections\.csv: not there; run_sweep\.py merge"):
        load_detections(folder)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match="no such campaign or file"):
        load_runs(tmp_path / "none")
    with pytest.raises(UsageError, match="empty list"):
        load_runs([])
    folder = write_campaign(tmp_path / "one", [ROW])
    with pytest.raises(UsageError, match="given twice"):
        load_runs([folder, folder / "runs.csv"])
    with pytest.raises(UsageError, match=r"columns: got 'outcom'.*did you mean 'outcome'"):
        load_runs(folder, columns=["outcom"])


def changed(folder: Path, old: str, new: str) -> Path:
    path = folder / "runs.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder


def test_an_empty_file(tmp_path: Path) -> None:
    folder = write_campaign(tmp_path / "one", [ROW])
    (folder / "runs.csv").write_text("")
    with pytest.raises(UsageError, match=r"runs\.csv: is empty"):
        load_runs(folder)


def test_a_file_without_rows_is_a_table_without_rows(tmp_path: Path) -> None:
    runs = load_runs(write_campaign(tmp_path / "one", []))
    assert len(runs) == 0
    assert "outcome" in runs


def test_a_missing_column(tmp_path: Path) -> None:
    folder = changed(write_campaign(tmp_path / "one", [ROW]), ",fault_id,", ",fault_idd,")
    with pytest.raises(UsageError, match="column 'fault_id' is missing; did you mean 'fault_idd'"):
        load_runs(folder)
    assert load_runs(folder, columns=["bit"]).bit.tolist() == [3], "the columns that are there can be read"


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    path = write_campaign(tmp_path / "one", [ROW, ROW]) / "runs.csv"
    path.write_text(path.read_text()[:-cut])
    with pytest.raises(UsageError, match="last line is cut off"):
        load_runs(path)


def test_a_row_with_too_few_cells_and_a_cell_of_another_type(tmp_path: Path) -> None:
    path = write_campaign(tmp_path / "one", [ROW, ROW]) / "runs.csv"
    path.write_text(path.read_text()[:-9] + "\n")
    with pytest.raises(UsageError, match=r"is damaged: .*Expected \d+ columns"):
        load_runs(path)
    with pytest.raises(UsageError, match=r"is damaged: .*invalid value"):
        load_runs(changed(write_campaign(tmp_path / "two", [ROW]), "True", "Yes"))


def test_two_schemas(tmp_path: Path) -> None:
    one = write_campaign(tmp_path / "one", [ROW])
    two = write_campaign(tmp_path / "two", [ROW])
    changed(two, ",hits\n", ",touched\n")
    with pytest.raises(UsageError, match=r"two schemas: only .*one.* has hits, only .*two.* has touched"):
        load_runs([one, two])
    assert len(load_runs([one, two], columns=["bit"])) == 2


def test_a_plan_of_another_campaign(tmp_path: Path) -> None:
    folder = write_campaign(tmp_path / "one", [ROW], {"detect.tolerance": [1]})
    write_rows(folder / "plan.csv", ["run_id", "repeat", "detect.tolerance"], [["other", "0", "1"]])
    with pytest.raises(UsageError, match="is not in this plan"):
        load_runs(folder)
    (folder / "plan.csv").write_text("")
    with pytest.raises(UsageError, match="no table of runs"):
        load_runs(folder)


@pytest.mark.parametrize(("column", "cell", "message"), [
    ("layer", "", "got an empty cell, allowed a value in every row"),
    ("effective", "", "got an empty cell"),
    ("scope", "", "got an empty cell"),
    ("fault_id", "", "got an empty cell"),
    ("outcome", "critcal", "got 'critcal', allowed masked, benign, critical, nonfinite; did you mean 'critical'"),
    ("location", "p", "got 'p', allowed q, k, v"),
    ("scope", "ful", "got 'ful', allowed full, site; did you mean 'full'"),
    ("sampling_weight", "nan", "got nan, allowed numbers from 0 on"),
    ("sampling_weight", "-1", r"got -1\.0, allowed numbers from 0 on"),
    ("sampling_weight", "inf", "got inf, allowed numbers from 0 on"),
])  # fmt: skip
def test_a_cell_that_no_run_can_have_written(tmp_path: Path, column: str, cell: str, message: str) -> None:
    path = write_campaign(tmp_path / "one", [ROW, ROW, ROW]) / "runs.csv"
    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[1][header.index(column)] = cell
    path.write_text("".join(",".join(line) + "\n" for line in [header, *lines]))
    with pytest.raises(UsageError, match=rf"runs\.csv: column '{column}', line 3: {message}"):
        load_runs(path)
