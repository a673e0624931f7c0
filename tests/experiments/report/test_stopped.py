"""The report of a campaign whose cells ended early (``stop.margin``)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pandas as pd
import pytest
from micro_campaign import MicroPlace, table
from report_campaign import Page, copied, few_figures

from experiments.command_line import main
from experiments.tables.csv_file import write_text


@pytest.fixture(autouse=True)
def _few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    few_figures(monkeypatch)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopped")
    more = [
        "--fault.location", "scores", "--sweep.fault.bit", "0,30", "--num_runs", "90", "--detect.detectors", "[lite]",
        "--stop.margin", "0.15", "--stop.minimum", "16",
    ]  # fmt: skip
    with contextlib.chdir(root):
        assert main(MicroPlace.make(Path("place")).arguments(Path("out"), *more)) == 0
    return root / "out" / "micro"


def report(folder: Path) -> Page:
    assert main(["report", str(folder)]) == 0
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_runs_that_are_not_needed_are_not_missing(campaign: Path, tmp_path: Path) -> None:
    page = report(copied(campaign, tmp_path / "micro"))
    done = len(table(campaign / "runs.csv"))
    assert done < 180
    assert "not complete" not in page.text
    assert f"{180 - done} of 180 planned runs were not needed" in page.text
    assert "their harmful rate to ±15 % (stop.margin)" in page.text


def test_missing_runs_of_a_cell_that_did_not_end_are_missing(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    stops = pd.read_csv(folder / "stops.csv", dtype=str, keep_default_na=False)
    done = pd.Series([row["bit"] for row in table(folder / "runs.csv")]).value_counts()
    # As if the first cell had to go on.
    stops.assign(stopped=["False", "True"]).to_csv(folder / "stops.csv", index=False)
    page = report(folder)
    assert f"{90 - done['0']} of 180 runs are missing" in page.text
    assert (f"{90 - done['30']} of 180 planned runs were not needed" in page.text) == (done["30"] < 90)


def test_cells_show_the_limits_that_allow_for_stopping(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    page = report(folder)
    for cell, end in zip(table(folder / "summary.csv"), table(folder / "stops.csv"), strict=True):
        assert [cell["fault.bit"], cell["harmful"], cell["harmful_n"]] == [
            end["fault.bit"],
            end["successes"],
            end["runs"],
        ]
        for column, name in (("rate", "estimate"), ("low", "low"), ("high", "high")):
            assert float(cell[f"harmful_{column}"]) == float(end[name])
        assert cell["harmful_method"] == end["method"]
        assert cell["detected_method"].endswith("not adjusted for stopping")
    assert "have their numbers in the column harmful" in page.text
    assert "is adjusted for stopping early" in page.text
    (point,) = pd.DataFrame(**page.numbers["points"]).to_dict("records")
    assert point["harmful_method"].endswith("not adjusted for stopping")


def test_pooled_rates_stand_beside_the_mean_of_the_cells(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    page = report(folder)
    rates = [float(row["estimate"]) for row in table(folder / "stops.csv")]
    runs = pd.Series([row["bit"] for row in table(folder / "runs.csv")]).value_counts()
    assert runs.min() < runs.max()
    (point,) = pd.DataFrame(**page.numbers["points"]).to_dict("records")
    assert point["harmful_mean_of_cells"] == pytest.approx(sum(rates) / 2, rel=1e-12)
    assert point["harmful_mean_of_cells"] != pytest.approx(point["harmful_rate"], rel=1e-3)
    assert f"by its number of runs ({runs.min()} to {runs.max()})" in page.text
    assert f"they are {50 * sum(rates):.1f} % harmful" in page.text
    assert "every point of its grid counts by its number of runs" in page.text


def test_points_of_detect_have_means_of_their_own_cells(campaign: Path, tmp_path: Path) -> None:
    more = [
        "--fault.location", "q", "--sweep.fault.bit", "0,30", "--num_runs", "40", "--sweep.detect.tolerance", "0,1e9",
        "--detect.detectors", "[lite]",
        "--stop.margin", "0.2", "--stop.minimum", "8", "--stop.rate", "detected",
    ]  # fmt: skip
    assert main(MicroPlace(campaign.parents[1] / "place").arguments(tmp_path, *more)) == 0
    points = pd.DataFrame(**report(tmp_path / "micro").numbers["points"])
    stops = pd.read_csv(tmp_path / "micro" / "stops.csv").astype({"estimate": float})
    expected = stops.groupby("detect.tolerance").estimate.mean()
    assert len(points) == 2
    for point in points.to_dict("records"):
        assert point["detected_mean_of_cells"] == pytest.approx(expected[float(point["detect.tolerance"])])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("looks", "lookz"), "stops.csv: column 'looks' is missing"),
        (lambda text: text.replace("fault.bit", "x"), "stops.csv: column 'fault.bit' is missing"),
        (lambda text: text.replace("\n0,", "\n0,x"), "stops.csv: is damaged"),
    ],
)
def test_a_damaged_table_of_stops_is_refused(campaign, tmp_path, capsys, edit, says) -> None:
    folder = copied(campaign, tmp_path / "micro")
    write_text(folder / "stops.csv", edit((folder / "stops.csv").read_text()))
    capsys.readouterr()
    assert main(["report", str(folder)]) == 1
    assert says in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_without_its_table_of_stops_nothing_is_called_unneeded(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    (folder / "stops.csv").unlink()
    page = report(folder)
    assert f"{180 - len(table(folder / 'runs.csv'))} of 180 runs are missing" in page.text
    assert table(folder / "summary.csv")[0]["harmful_method"].endswith("not adjusted for stopping")
