"""``detect.record``: a campaign that records only who fired says the same, but for what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from micro_campaign import MicroPlace, numbers, table

from experiments.command_line import main
from experiments.config import DetectConfig, load_config
from experiments.errors import UsageError
from experiments.plan.plan import make_plan

GRID = ("--sweep.fault.location", "q,scores,out")


@pytest.fixture(scope="module")
def both(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of one campaign that records all, and one that records who fired."""
    root = tmp_path_factory.mktemp("record")
    for record in ("all", "fired"):
        assert main(place.arguments(root / record, *GRID, "--detect.record", record)) == 0
    return {record: root / record / "micro" for record in ("all", "fired")}


def closing_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> Sequence[str]:
    """Return the lines about detectors of a campaign's closing table."""
    capsys.readouterr()
    assert main(["merge", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("detector "))
    return [
        line
        for line in lines[start:]
        if not line.startswith(("mean milliseconds", "executed")) and "runs in" not in line
    ]


def test_the_rows_of_those_who_fired_are_the_same_and_there_are_no_others(both: dict[str, Path]) -> None:
    everything = table(both["all"] / "detections.csv")
    fired = [row for row in everything if int(row["violations"])]
    assert 0 < len(fired) < len(everything)
    assert table(both["fired"] / "detections.csv") == fired


def test_runs_and_clean_rows_are_the_same(both: dict[str, Path]) -> None:
    assert numbers(both["fired"] / "runs.csv") == numbers(both["all"] / "runs.csv")
    assert table(both["fired"] / "clean.csv") == table(both["all"] / "clean.csv")


def test_the_closing_table_says_the_same_of_every_detector(
    both: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = closing_lines(both["all"], capsys)
    assert sum("0.0 % (0.0" in line for line in expected) > 1, "no detector was silent: this shows nothing"
    assert any(line.startswith("oracle_") for line in expected)
    assert closing_lines(both["fired"], capsys) == expected


def test_it_is_replayed(both: dict[str, Path]) -> None:
    run_id = table(both["fired"] / "runs.csv")[5]["run_id"]
    assert main(["replay", str(both["fired"]), run_id]) == 0


def test_it_changes_no_run_but_belongs_to_the_campaign(
    both: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def ids(*options: str) -> list[str]:
        return [
            run.run_id for run in make_plan(load_config(["--config", str(both["all"] / "config.yaml"), *options])).runs
        ]

    assert ids("--detect.record", "fired") == ids()
    capsys.readouterr()
    assert main(["--config", str(both["fired"] / "config.yaml"), "--detect.record", "all"]) == 2
    assert "detect.record ('fired' -> 'all')" in capsys.readouterr().err


def test_what_is_not_allowed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"detect\.record: got 'fird', allowed all, fired; did you mean 'fired'"):
        DetectConfig(record="fird")
    with pytest.raises(UsageError, match=r"sweep\.detect\.record: this field belongs to the campaign as a whole"):
        load_config(["--sweep.detect.record", "all,fired"])
