"""The report of a campaign: its numbers, that everything is escaped, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest
from micro_campaign import MicroPlace, table
from report_campaign import HOSTILE, Page, copied, few_figures, make_campaign
from scipy.stats import binomtest

from experiments.command_line import main
from experiments.tables.csv_file import write_text

HARMFUL = ["critical", "nonfinite"]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_campaign(tmp_path_factory.mktemp("report"))
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def _few_figures(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The campaign's own report, made before, has all of them.
    few_figures(monkeypatch)


@pytest.fixture(scope="module")
def page(campaign: Path) -> Page:
    return Page((campaign / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def faults(campaign: Path) -> pd.DataFrame:
    """The distinct faults, read without the code under test."""
    return pd.read_csv(campaign / "runs.csv").drop_duplicates("fault_id")


def frame(block: dict) -> pd.DataFrame:
    return pd.DataFrame(**block)


# ------------------------------------------------------------------------------------------------------ numbers


def test_totals_are_those_of_the_runs(page: Page, faults: pd.DataFrame) -> None:
    (row,) = frame(page.numbers["points"]).to_dict("records")
    harmful = faults[faults.outcome.isin(HARMFUL)]
    assert 0 < len(harmful) < len(faults)
    assert (row["runs"], row["detected_n"], row["harmful_n"]) == (48, len(faults), len(faults))
    assert row["detected"] == faults.violation_detected.sum()
    assert row["harmful"] == len(harmful)
    assert (row["harmful_detected"], row["harmful_detected_n"]) == (harmful.violation_detected.sum(), len(harmful))
    assert row["harmful_rate"] == pytest.approx(len(harmful) / len(faults), rel=1e-12)
    assert row["harmful_low"] < row["harmful_rate"] < row["harmful_high"]


def test_clean_rows_are_those_of_proved_detectors(campaign: Path, page: Page) -> None:
    clean = pd.read_csv(campaign / "clean.csv")
    proved = clean[clean.applicable & clean.proved & ~clean.detector.str.startswith("oracle_")]
    (row,) = frame(page.numbers["points"]).to_dict("records")
    assert (row["false_positives"], row["clean_rows"]) == (proved.violations.sum(), proved.rows_checked.sum())
    assert row["clean_rows"] > 0


@pytest.mark.parametrize("outcome", ["masked", "benign", "critical", "nonfinite"])
def test_outcomes_by_location_and_bit_field(page: Page, faults: pd.DataFrame, outcome: str) -> None:
    found = frame(page.numbers["outcomes"]).set_index(["location", "bit_field"])
    expected = (faults.outcome == outcome).groupby([faults.location, faults.bit_field]).agg(["sum", "count", "mean"])
    assert set(found.index) == set(expected.index)
    for group, row in expected.iterrows():
        assert list(found.loc[group, [outcome, f"{outcome}_n"]]) == [row["sum"], row["count"]]
        assert found.loc[group, f"{outcome}_rate"] == pytest.approx(row["mean"], rel=1e-12)


def test_locations_stand_in_the_order_of_the_computation(page: Page) -> None:
    found = frame(page.numbers["outcomes"])
    assert list(found.location) == ["q", "q", "scores", "scores", "weights", "weights"]
    assert list(found.bit_field) == ["exponent", "mantissa"] * 3


def test_an_interval_of_runs_in_clusters_is_at_least_as_wide_as_wilsons(page: Page) -> None:
    rates = [
        [row[f"{measure}{part}"] for part in ("", "_n", "_low", "_high")]
        for name in ("points", "outcomes", "cells")
        for row in frame(page.numbers[name]).to_dict("records")
        for measure in ("detected", "masked", "critical", "harmful_detected")
        if row[f"{measure}_n"]
    ]
    assert rates
    for hits, n, low, high in rates:
        expected = binomtest(int(hits), int(n)).proportion_ci(0.95, method="wilson")
        assert low <= expected[0] + 1e-9
        assert high >= expected[1] - 1e-9


def test_the_summary_table_and_the_page_hold_the_same_numbers(campaign: Path, page: Page) -> None:
    cells = table(campaign / "summary.csv")
    block = page.numbers["cells"]
    assert list(cells[0]) == block["columns"]
    assert list(cells[0])[:3] == ["fault.location", "fault.bit", "runs"]
    assert [(row["fault.location"], row["fault.bit"]) for row in cells] == [
        (location, bit) for location in ("q", "scores", "weights") for bit in ("3", "30")
    ]
    shown = [["" if value is None else str(value) for value in row] for row in block["data"]]
    assert [list(row.values()) for row in cells] == shown


def test_cells_are_those_of_the_grid(campaign: Path, faults: pd.DataFrame) -> None:
    for row in table(campaign / "summary.csv"):
        own = faults[(faults.location == row["fault.location"]) & (faults.bit == int(row["fault.bit"]))]
        assert (int(row["runs"]), int(row["detected_n"])) == (8, len(own))
        assert int(row["detected"]) == own.violation_detected.sum()
        assert int(row["harmful"]) == own.outcome.isin(HARMFUL).sum()


def test_tables_of_the_page_show_the_numbers_of_the_block(page: Page) -> None:
    (row,) = frame(page.numbers["points"]).to_dict("records")
    for name in ("detected", "harmful"):
        assert f"{100 * row[f'{name}_rate']:.1f} %" in page.text
        assert f"{row[name]}/{row[f'{name}_n']}" in page.text


def test_the_worst_runs_come_first_and_can_be_replayed(campaign: Path, page: Page, faults: pd.DataFrame) -> None:
    worst = frame(page.numbers["worst"])
    assert len(worst) == 10
    ranked = faults.assign(first=faults.nonfinite, size=faults.loss_diff.abs().fillna(-1.0))
    ranked = ranked.sort_values(["first", "size"], ascending=False, kind="stable")
    nonfinite = int(faults.nonfinite.sum())
    assert set(worst.run_id[:nonfinite]) == set(ranked.run_id[:nonfinite][:10])
    assert list(worst.run_id[nonfinite:]) == list(ranked.run_id[nonfinite:10])
    commands = page.numbers["replay"]
    assert all(command in page.text for command in commands)
    arguments = shlex.split(commands[0])
    assert arguments[:2] == ["python", "run_sweep.py"]
    # The model's path is relative to where the campaign was run.
    with contextlib.chdir(campaign.parents[1]):
        assert main(arguments[2:]) == 0


def test_origins_of_values(page: Page) -> None:
    found = {setting["field"]: (setting["value"], setting["origin"]) for setting in page.numbers["configuration"]}
    assert found["fault.bit"] == ("3, 30", "sweep")
    assert found["num_runs"] == ("8", "option")
    assert found["fault.kind"] == ("bitflip", "default")
    assert found["stop.margin"] == ("null", "option")


def test_the_command_prints_the_verdict(
    campaign: Path, page: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["report", str(copied(campaign, tmp_path / "micro"))]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(" ".join(page.numbers["verdict"]))
    assert "48 runs" in printed
    assert "report.html" in printed
    assert "summary.csv" in printed


def test_the_same_campaign_gives_the_same_bytes(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    found = []
    for _ in range(2):
        assert main(["report", str(folder)]) == 0
        found.append([(folder / name).read_bytes() for name in ("report.html", "summary.csv")])
    assert found[0] == found[1]


# ----------------------------------------------------------------------------------------------------- escaping


def test_a_model_named_like_a_script_is_a_text(page: Page) -> None:
    assert HOSTILE in page.text
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None]
    assert not any("alert(1)" in content for attributes, content in page.scripts if attributes.get("id") != "summary")


def test_texts_of_every_source_are_escaped(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    evil = "</script><img src=x onerror=alert(2)>&amp;<!--"
    with (folder / "failures.csv").open("a", encoding="utf-8") as stream:
        stream.write(f'0123456789abcdef,"{evil} error",logs/x.txt\n')
    write_text(folder / "stops.csv", f'cell,reason\n1,"{evil} stop"\n')
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["processor"] = f"{evil} processor"
    provenance[f"{evil} key"] = {evil: [evil, 1]}
    write_text(folder / "provenance.json", json.dumps(provenance))
    runs = pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
    runs.assign(execution=f"{evil} rows").to_csv(folder / "runs.csv", index=False)
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for source in ("error", "stop", "processor", "key", "rows"):
        assert f"{evil} {source}" in page.text, source
    assert len(page.scripts) == 2
    assert "onerror" not in {name for _, attributes in page.elements for name in attributes}
    assert page.numbers["provenance"]["processor"] == f"{evil} processor"
    assert page.numbers["stops"]["data"] == [["1", f"{evil} stop"]]


def test_a_page_whose_elements_are_closed_in_turn(page: Page) -> None:
    assert page.open == []
    identifiers = page.attributes("id")
    assert len(identifiers) == len(set(identifiers))


# --------------------------------------------------------------------------------------------- nothing from outside


def test_nothing_is_loaded_from_elsewhere(campaign: Path, page: Page) -> None:
    addresses = [*page.attributes("src"), *page.attributes("href"), *page.attributes("xlink:href")]
    assert addresses
    assert [address for address in addresses if not address.startswith(("#", "data:"))] == []
    text = (campaign / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|srcset|<iframe|<object|<base", text)
    assert not re.search(r"url\((?!#)", text)


def test_the_policy_allows_our_script_alone(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    (script,) = [content for attributes, content in page.scripts if "type" not in attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_every_entry_of_the_contents_leads_to_a_section(page: Page) -> None:
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [f"#{identifier}" for identifier in sections]
    assert "outcomes" in sections
    assert "stops" not in sections


def test_every_used_drawing_part_is_defined_in_the_page(page: Page) -> None:
    identifiers = set(page.attributes("id"))
    used = {address[1:] for tag, a in page.elements if tag == "use" for address in [str(a["href"])]}
    clipped = set(re.findall(r"url\(#([^)]+)\)", " ".join(page.attributes("clip-path"))))
    assert used
    assert used | clipped <= identifiers


def test_a_moved_campaign_has_a_report(campaign: Path, tmp_path: Path) -> None:
    moved = copied(campaign, tmp_path / "elsewhere" / "renamed campaign")
    shutil.rmtree(moved / "shards")
    assert main(["report", str(moved)]) == 0
    page = Page((moved / "report.html").read_text(encoding="utf-8"))
    assert f"'{moved}'" in page.numbers["replay"][0]


# -------------------------------------------------------------------------------------------- other campaigns


def test_missing_runs_are_said(campaign: Path, tmp_path: Path) -> None:
    folder = copied(campaign, tmp_path / "micro")
    shutil.rmtree(folder / "shards")
    lines = (folder / "runs.csv").read_text().splitlines(keepends=True)
    # Without the 8 runs of the first cell and 3 of the next.
    write_text(folder / "runs.csv", "".join([lines[0], *lines[12:]]))
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "11 of 48 runs are missing, 0 of them failed" in page.text
    rows = table(folder / "summary.csv")
    assert [row["runs"] for row in rows] == ["0", "5", "8", "8", "8", "8"]
    assert rows[0]["detected_rate"] == ""


def test_points_of_detect_are_never_added_up(tmp_path: Path) -> None:
    more = [
        "--fault.location",
        "q",
        "--sweep.detect.tolerance",
        "0,1e9",
        "--sweep.fault.bit",
        "22,30",
        "--num_runs",
        "6",
    ]
    with contextlib.chdir(tmp_path):
        assert main(MicroPlace.make(Path("place")).arguments(Path("out"), *more)) == 0
    folder = tmp_path / "out" / "micro"
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    points = frame(page.numbers["points"])
    assert list(points["detect.tolerance"].astype(float)) == [0.0, 1e9]
    assert list(points["detected_n"]) == [12, 12]
    assert list(points["harmful"]) == [points["harmful"][0]] * 2
    assert points["detected"][0] > points["detected"][1]
    assert page.numbers["focus"] == "detect.tolerance = 0.0"
    assert "Of the runs with detect.tolerance = 0.0" in page.text
    plan = pd.read_csv(folder / "plan.csv")
    assert set(frame(page.numbers["worst"])["run_id"]) <= set(plan.run_id[plan["detect.tolerance"] == 0.0])
    clean = pd.read_csv(folder / "clean.csv")
    own = clean[clean.applicable & clean.proved & ~clean.detector.str.startswith("oracle_")]
    assert list(points["clean_rows"]) == [own.rows_checked[own.tolerance == t].sum() for t in (0.0, 1e9)]
    assert "With detect.tolerance = " in page.text
