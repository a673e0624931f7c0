"""Campaigns at the logits and the mass: outside the default set, whatever the engine, honest in their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from micro_campaign import MicroPlace, numbers, table

from experiments.command_line import main

LOCATIONS = "--sweep.fault.location=logits,mass"


def rows_of(place: MicroPlace, output: Path, *more: str) -> list[dict[str, str]]:
    assert main(place.arguments(output, LOCATIONS, *more)) == 0
    return table(output / "micro" / "runs.csv")


def test_every_way_to_execute_them_gives_the_same_rows(place: MicroPlace, tmp_path: Path) -> None:
    # So many runs that the start-up proof is made; it speaks of the default set alone.
    many = "--num_runs=8"
    plain = rows_of(place, tmp_path / "plain", many, "--run.engine=plain")
    fast = rows_of(place, tmp_path / "auto", many)
    assert {row["execution"] for row in plain} == {"plain"}
    assert "rows" not in {row["execution"] for row in fast}
    assert numbers(tmp_path / "auto" / "micro" / "runs.csv") == numbers(tmp_path / "plain" / "micro" / "runs.csv")
    changed = [row for row in plain if row["bit"] == "30"]
    assert {row["location"] for row in changed if row["outcome"] != "masked"} == {"logits", "mass"}


def test_no_certificate_is_given_where_no_check_covers_the_tensor(place: MicroPlace, tmp_path: Path) -> None:
    rows = rows_of(place, tmp_path / "certified", "--detect.certificate=true")
    assert {row["certificate"] for row in rows} == {""}


def test_they_are_replayed(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(place, tmp_path / "replayed")
    assert main(["replay", str(tmp_path / "replayed" / "micro"), rows[-1]["run_id"]]) == 0
