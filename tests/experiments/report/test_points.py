"""Reports of campaigns that sweep their detectors: nobody is credited where he did not look; heads of keys apart."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from micro_campaign import MicroPlace
from report_campaign import Page, few_figures

from bounds.suites import SUITES
from experiments.analysis import rank_cells
from experiments.campaign.folder import CampaignFolder
from experiments.command_line import main
from experiments.config.sections import DetectConfig
from experiments.errors import UsageError
from experiments.figures import FIGURES
from experiments.report.closing_table import closing_table
from experiments.report.facts.head_ranking import rank_heads
from experiments.report.facts.inputs import read_inputs
from experiments.report.facts.looking import clean_of, detectors_of
from experiments.report.facts.summary import summarize

OWN = """
import torch
from bounds.core.row_check import judged
from bounds.core.detector import Detector
from bounds.core.row_check import RowCheck

class Large(Detector):
    name, needs, statement, cost = "large_outputs", frozenset({"out"}), "outputs are below 1e9", "d"

    def judge(self, state, baseline):
        return judged(self.name, RowCheck(state.out.abs().amax(-1).double(), torch.tensor(1e9)))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("points")
    (root / "own.py").write_text(OWN)
    points = "[[finite], [lite], [epsilon], ['own.py:Large']]"
    more = [
        "--sweep.fault.bit", "30", "--num_runs", "3", "--sweep.detect.detectors", points,
        "--sweep.detect.tolerance", "0,0.5", "--data.num_samples=2",
    ]  # fmt: skip
    with contextlib.chdir(root):
        assert main(MicroPlace.make(Path("place")).arguments(Path("out"), *more)) == 0
        with pytest.MonkeyPatch.context() as patch:
            few_figures(patch)
            assert main(["report", "out/micro"]) == 0
    return root


def looking(texts: pd.Series) -> list[set[str]]:
    """The names behind a cell of the axis, by hand."""
    return [
        {
            member
            for name in json.loads(text)
            for member in SUITES.get(name, ("large_outputs",) if ":" in name else (name,))
        }
        for text in texts
    ]


def test_only_detectors_that_looked_have_a_recall(place: Path) -> None:
    page = Page((place / "out/micro/report.html").read_text(encoding="utf-8"))
    found = pd.DataFrame(**page.numbers["detectors"])
    found = found[found.kind != "suite"]
    groups = found.groupby(["detect.detectors", "detect.tolerance"], sort=False)
    assert len(groups) == 8
    for (detectors, _), group in groups:
        assert set(group.detector) == looking(pd.Series([detectors]))[0]


def test_false_positives_are_those_of_each_points_detectors(place: Path) -> None:
    page = Page((place / "out/micro/report.html").read_text(encoding="utf-8"))
    points = pd.DataFrame(**page.numbers["points"])
    clean = pd.read_csv(place / "out/micro/clean.csv")
    expected = [
        clean.rows_checked[
            clean.detector.isin(names) & (clean.tolerance == float(tolerance)) & clean.proved & clean.applicable
        ].sum()
        for names, tolerance in zip(looking(points["detect.detectors"]), points["detect.tolerance"], strict=True)
    ]
    assert list(points.clean_rows) == expected
    assert len({*expected}) > 1


def test_the_closing_table_names_the_same_detectors(place: Path) -> None:
    with contextlib.chdir(place):
        tables = closing_table(CampaignFolder(Path("out/micro"))).split("== ")[1:]
    assert len(tables) == 8
    for text in tables:
        (names,) = looking(pd.Series([text[text.index("[") : text.index("]") + 1]]))
        rows = text[text.index("\ndetector ") :].splitlines()[2:]
        named = {line.split()[0] for line in rows if line and line.split()[0] in {*names, "finite", "S_row", "s@w"}}
        assert named == names


def test_figures_get_the_fault_free_passes_of_their_point(place: Path) -> None:
    with contextlib.chdir(place):
        summary = summarize(read_inputs(CampaignFolder(Path("out/micro"))))
    assert summary.focus.startswith('detect.detectors = ["finite"]')
    assert set(summary.clean.detector) == {"finite"}
    assert set(summary.clean.tolerance) == {0.0}
    tables = {"runs": summary.chosen, "clean": summary.clean}
    _, caption = FIGURES["detector_recall"].make({**tables, "compared": summary.compared})
    assert list(summary.compared.detector) == ["finite"]
    assert "n = " in caption


def test_a_users_class_that_is_not_there_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(place / "out/micro")]) == 2
    assert "detect.detectors: " in capsys.readouterr().err


def test_what_is_not_swept_chooses_nothing() -> None:
    clean = pd.DataFrame({"detector": ["finite", "S_row"], "tolerance": [0.5, 0.5]})
    assert clean_of(clean, {"fault.bit": "3"}).equals(clean)
    assert list(clean_of(clean, {"detect.detectors": '["lite"]', "detect.tolerance": "0.5"}).detector) == [
        "finite", "S_row",
    ]  # fmt: skip
    assert clean_of(clean, {"detect.tolerance": "0.0"}).empty
    assert detectors_of(DetectConfig(detectors=["finite"]), {"fault.bit": "3"}) == ("finite",)
    with pytest.raises(UsageError, match=r"detect\.detectors: .*S_rov"):
        clean_of(clean, {"detect.detectors": '["S_rov"]'})


# ------------------------------------------------------------------------------------------------------- heads


def faults(count: int = 2000, **fixed: object) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    location = rng.choice(["q", "k", "v", "scores"], count)
    of_keys = np.isin(location, ["k", "v"])
    # One key/value head; its faults are three times as harmful as those of query heads, which are all alike.
    frame = pd.DataFrame({
        "fault_id": np.arange(count).astype(str), "scope": "full", "model": "m", "location": location, "layer": 0,
        "batch_index": rng.integers(0, 16, count), "index_head": np.where(of_keys, 0, rng.integers(0, 8, count)),
        "outcome": np.where(rng.random(count) < np.where(of_keys, 0.3, 0.1), "critical", "benign"),
        "violation_detected": False,
    })  # fmt: skip
    return frame.assign(**fixed)


def test_heads_of_keys_are_no_heads_of_queries() -> None:
    runs = faults()
    assert "index_head 0" in rank_cells(runs).attrs["verdict"]
    table, verdict = rank_heads(runs)
    assert not table.evidence.any()
    assert list(table.heads) == ["query heads"] * 8 + ["key/value heads"]
    assert verdict.startswith("Query heads: no evidence")
    assert "Key/value heads: fewer than two cells" in verdict
    of_keys = runs.location.isin(["k", "v"])
    assert table.n[table.heads == "key/value heads"].sum() == of_keys.sum()
    assert table.n[table.heads == "query heads"].sum() == (~of_keys).sum()


@pytest.mark.parametrize(("location", "heads"), [("v", "key/value heads"), ("out", "query heads")])
def test_one_ranking_where_there_is_one_kind(location: str, heads: str) -> None:
    table, verdict = rank_heads(faults(location=location))
    assert set(table.heads) == {heads}
    assert verdict.startswith(heads.capitalize())


def test_faults_without_a_head_leave_no_ranking() -> None:
    table, verdict = rank_heads(faults(index_head=pd.NA))
    assert table.empty
    assert verdict == "Query heads: fewer than two cells: nothing to compare."


def test_a_head_of_one_model_is_not_that_of_another() -> None:
    runs = faults(location="scores")
    runs["model"] = pd.Categorical(np.where(np.arange(len(runs)) % 2, "A", "B"))
    runs["index_head"] = np.arange(len(runs)) // 2 % 4
    bad = (runs.model == "A") & (runs.index_head == 2)
    runs["outcome"] = np.where(bad & (np.arange(len(runs)) % 3 > 0), "critical", "benign")
    table, verdict = rank_heads(runs)
    assert len(table) == 8
    assert table[table.evidence][["model", "layer", "index_head"]].to_numpy().tolist() == [["A", 0, 2]]
    assert "model A layer 0 index_head 2" in verdict


def test_the_page_shows_both_rankings(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_figures(monkeypatch)
    monkeypatch.chdir(tmp_path)
    more = [
        "--sweep.fault.location", "scores,k", "--fault.bit", "30", "--num_runs", "6", "--detect.detectors", "[finite]",
    ]  # fmt: skip
    assert main(MicroPlace(place / "place").arguments(tmp_path, *more)) == 0
    assert main(["report", str(tmp_path / "micro")]) == 0
    page = Page((tmp_path / "micro/report.html").read_text(encoding="utf-8"))
    assert "Layers and heads by harm, query heads" in page.text
    assert "Layers and heads by harm, key/value heads (faults in k and v)" in page.text
    assert set(pd.DataFrame(**page.numbers["ranking"]).heads) == {"query heads", "key/value heads"}
