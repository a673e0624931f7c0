"""Campaigns with suites, detectors of the user's own, calibrated and unproved ones, and the certificate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from micro_campaign import MicroPlace, numbers, table

from bounds.suites import SUITES, expand
from experiments.command_line import main
from experiments.config import load_config
from experiments.plan.plan import make_plan

OWN = """
from bounds import Detector, Verdict
from bounds.core.detector import first_positions


class LargeOutput(Detector):
    name, needs, statement, cost = "large_output", frozenset({"out"}), "no output is larger than 1000", "d"
    proved = False

    def judge(self, state, baseline):
        large = ~(state.out.abs().amax(-1) <= 1000)
        return Verdict(self.name, rows_checked=large.numel(), violations=int(large.sum()),
                       positions=first_positions(large.nonzero()))
"""


def run(place: MicroPlace, output: Path, *more: str) -> list[dict[str, str]]:
    assert main(place.arguments(output, *more)) == 0
    return table(output / "micro" / "runs.csv")


def test_a_suite_stands_for_its_members_and_every_one_has_rows(place: MicroPlace, tmp_path: Path) -> None:
    run(place, tmp_path, "--detect.detectors", "[full-g4, fused]")
    rows = table(tmp_path / "micro" / "clean.csv")
    members = set(SUITES["full-g4"]) | set(SUITES["fused"])
    assert {row["detector"] for row in rows} == members
    assert all(int(row["violations"]) == 0 for row in rows)
    silent = {row["detector"]: row["reason"] for row in rows if row["applicable"] == "False"}
    assert set(silent) == {"KV", *SUITES["fused"]}
    assert "equal keys and values" in silent["KV"]
    assert silent["lse_key"] == "it reads lse, which this state does not carry"


def test_full_sees_every_flip_of_a_sign_or_high_exponent_bit(place: MicroPlace, tmp_path: Path) -> None:
    locations = "q,k,v,scores,weights,out"
    more = ("--sweep.fault.location", locations, "--sweep.fault.bit", "28:32", "--detect.detectors", "[full]")
    assert all(row["violation_detected"] == "True" for row in run(place, tmp_path, *more))


def test_a_detector_of_ones_own_is_loaded_from_a_file_and_resumes(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    more = ("--detect.detectors", f"[finite, '{path}:LargeOutput']", "--fault.location", "out")
    first = run(place, tmp_path / "a", *more)
    assert {row["detector"] for row in table(tmp_path / "a/micro/detections.csv")} == {"finite", "large_output"}
    fired = [row for row in first if row["unproved_detectors"]]
    assert fired
    assert all(row["unproved_detectors"] == "large_output" for row in fired)
    # An unproved detector is never an alarm that counts.
    assert all(row["violation_detected"] == str("finite" in row["detectors"]) for row in first)
    assert "no theorem rules out false positives" in capsys.readouterr().out
    assert main([*place.arguments(tmp_path / "b", *more), "--launcher", "local", "--workers", "2"]) == 0
    assert numbers(tmp_path / "a/micro/runs.csv") == numbers(tmp_path / "b/micro/runs.csv")


def test_calibrated_detectors_see_other_windows_and_say_when_there_are_none(place: MicroPlace, tmp_path: Path) -> None:
    run(place, tmp_path, "--detect.detectors", "[competitors]")
    assert {row["applicable"] for row in table(tmp_path / "micro/clean.csv")} == {"True"}
    # The campaign's windows are all that this text has.
    text = tmp_path / "short.txt"
    text.write_text("x" * (12 * 4 + 1))
    rows = run(place, tmp_path / "short", "--detect.detectors", "[competitors]", "--data.source", f"text:{text}")
    assert len(rows) == 24
    silent = {row["detector"] for row in table(tmp_path / "short/micro/clean.csv") if row["applicable"] == "False"}
    assert silent == {"ranger", "realm", "flash_abft"}


def test_the_certificate_is_there_exactly_where_nothing_fired(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--detect.certificate", "true", "--sweep.fault.location", "q,v,scores,out", "--sweep.fault.bit", "0,30")
    rows = run(place, tmp_path, *more)
    assert {row["violation_detected"] for row in rows} == {"True", "False"}
    for row in rows:
        assert (row["certificate"] == "") is (row["violation_detected"] == "True")
        assert row["certificate"] == "" or 0 < float(row["certificate"]) < 0.1
    assert "certificate: in the" in capsys.readouterr().out


def test_correction_is_part_of_a_runs_identity_and_detectors_are_not(place: MicroPlace, tmp_path: Path) -> None:
    def ids(*more: str) -> tuple[list[str], list[str]]:
        plan = make_plan(load_config(place.arguments(tmp_path, *more)))
        return [run.run_id for run in plan.runs], [run.draw_id for run in plan.runs]

    plain, corrected, watched = ids(), ids("--detect.correct", "true"), ids("--detect.detectors", "[lite]")
    assert plain == watched
    assert plain[1] == corrected[1]
    assert not set(plain[0]) & set(corrected[0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("full-g5", "detect.detectors: detector: got 'full-g5', allowed .*did you mean 'full-g[14]'"),
        ("S_raw", "did you mean 'S_row'"),
        ("nowhere.py:Mine", "detect.detectors: .*nowhere.py"),
        ("json:Mine", "detect.detectors: .*Mine"),
    ],
)
def test_unknown_detectors_are_refused_by_name(
    entry: str, message: str, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(place.arguments(tmp_path / "out", "--detect.detectors", f"['{entry}']")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_the_default_suites_are_those_of_the_documentation() -> None:
    names = load_config([]).detect.names()
    assert names == expand(["full", "epsilon", "oracles"])
