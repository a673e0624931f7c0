"""Campaigns whose cells end early, on a micro model: the same rows however they are executed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from campaign_disturbance import killed, run_that
from micro_campaign import MicroPlace, numbers, table

from experiments.command_line import main
from experiments.config import load_config
from experiments.errors import UsageError
from experiments.plan.plan import make_plan
from experiments.plan.stopping import StopRule, confidence_sequence
from experiments.runner import CompleteExperimentRunner

RULE = ["--num_runs=60", "--stop.margin=0.12", "--stop.minimum=10", "--stop.growth=1.5", "--detect.detectors=[finite]"]
LOOKS = (10, 15, 23, 35, 53, 60)


def arguments(place: MicroPlace, output: Path, *more: str) -> list[str]:
    return place.arguments(output, *RULE, "--sweep.fault.bit=3,30", "--sweep.fault.location=q,weights", *more)


@pytest.fixture(scope="module")
def whole(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert main(arguments(place, output)) == 0
    return output / "micro"


def same(one: Path, other: Path) -> None:
    assert numbers(one / "runs.csv") == numbers(other / "runs.csv")
    for name in ("detections.csv", "clean.csv", "failures.csv", "plan.csv", "stops.csv"):
        assert (one / name).read_text() == (other / name).read_text(), name


def test_each_cell_has_the_runs_that_the_rule_asks_for(whole: Path) -> None:
    assert StopRule(0.12, minimum=10, growth=1.5).looks(60) == LOOKS
    plan = {row["run_id"]: row for row in table(whole / "plan.csv")}
    stops = table(whole / "stops.csv")
    assert [(row["fault.location"], row["fault.bit"]) for row in stops] == [
        ("q", "3"), ("q", "30"), ("weights", "3"), ("weights", "30")
    ]  # fmt: skip
    sizes = set()
    for stop in stops:
        key = stop["fault.location"], stop["fault.bit"]
        rows = [
            (int(row["repeat"]), row["outcome"] in ("critical", "nonfinite"))
            for row in table(whole / "runs.csv")
            if (plan[row["run_id"]]["fault.location"], plan[row["run_id"]]["fault.bit"]) == key
        ]
        size = int(stop["runs"])
        assert [repeat for repeat, _ in rows] == list(range(size))
        for look in LOOKS:
            successes = sum(harmful for _, harmful in rows[:look])
            low, high = confidence_sequence(successes, look, 0.95)
            if (high - low) / 2 <= 0.12 or look == 60:
                break
        assert (size, int(stop["looks"])) == (look, LOOKS.index(look) + 1)
        assert stop["stopped"] == str((high - low) / 2 <= 0.12)
        assert (int(stop["successes"]), float(stop["low"]), float(stop["high"])) == (successes, low, high)
        assert float(stop["estimate"]) == successes / size
        assert stop["method"] == "beta-binomial confidence sequence"
        sizes.add(size)
    # The rule has something to decide here: some cells end, at different looks.
    assert len(sizes) > 1
    assert min(sizes) < 60


def test_the_runs_are_those_of_a_campaign_without_the_rule(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    options = [text for text in arguments(place, tmp_path) if not text.startswith("--stop.")]
    assert main(options) == 0
    full = {row["run_id"]: row for row in numbers(tmp_path / "micro" / "runs.csv")}
    assert len(full) == 240
    stopped = numbers(whole / "runs.csv")
    assert len(stopped) < 240
    assert all(full[row["run_id"]] == row for row in stopped)
    assert not (tmp_path / "micro" / "stops.csv").exists()


def test_what_is_not_needed_is_not_missing(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = len(table(whole / "runs.csv"))
    assert main(["status", str(whole)]) == 0
    assert (
        f"{done} of 240 runs done, 0 failed, {240 - done} not needed (stop.margin), 0 missing"
        in capsys.readouterr().out
    )
    assert main(["merge", str(whole)]) == 0
    said = capsys.readouterr().out
    assert f"{240 - done} runs were not needed: " in said
    assert "cells know their harmful rate to +-0.12 (0.95 confidence, at all looks together)" in said
    assert "not done yet" not in said


def test_a_finished_campaign_is_not_begun_again(
    whole: Path, place: MicroPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_that(monkeypatch, lambda number, planned: None) as begun:
        assert main(arguments(place, whole.parent)) == 0
    assert begun == []


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_in_any_order_make_the_whole(
    whole: Path, place: MicroPlace, tmp_path: Path, order: Sequence[int]
) -> None:
    for number in order:
        assert main(arguments(place, tmp_path, f"--shard={number}/3")) == 0
    assert main(["merge", str(tmp_path / "micro")]) == 0
    same(tmp_path / "micro", whole)


def test_the_engine_does_not_matter(place: MicroPlace, tmp_path: Path) -> None:
    for engine in ("plain", "fast"):
        assert main(arguments(place, tmp_path / engine, "--data.seq_len=20", f"--run.engine={engine}")) == 0
    same(tmp_path / "plain" / "micro", tmp_path / "fast" / "micro")


@pytest.mark.parametrize("stop_after", [1, 12, 37])
def test_an_interrupted_campaign_ends_the_same(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    def interrupt(number: int, planned: object) -> None:
        if number > stop_after:
            raise KeyboardInterrupt

    with run_that(monkeypatch, interrupt):
        assert main(arguments(place, tmp_path)) != 0
    assert main(["status", str(tmp_path / "micro")]) == 1
    # Begun as a whole, gone on with in shards.
    assert main(arguments(place, tmp_path, "--shard=2/2")) == 0
    assert main(arguments(place, tmp_path)) == 0
    same(tmp_path / "micro", whole)


def test_a_campaign_that_is_killed_again_and_again_ends_the_same(
    whole: Path, place: MicroPlace, tmp_path: Path
) -> None:
    moments, runs = random.Random(3), len(table(whole / "runs.csv"))
    for rows in sorted(moments.uniform(0, runs - 4) for _ in range(6)):
        assert killed(arguments(place, tmp_path), tmp_path / "micro", rows, moments.uniform(0, 0.1))
    assert main(arguments(place, tmp_path)) == 0
    same(tmp_path / "micro", whole)


def test_a_run_that_raises_holds_its_cell_and_no_other(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(load_config(arguments(place, tmp_path)))
    # Repeat 4 of the first cell, which the first look waits for.
    bad = plan.runs[4].run_id

    def fail(number: int, planned: object) -> None:
        if planned.run_id == bad:
            raise ArithmeticError("broken")

    with run_that(monkeypatch, fail) as begun:
        assert main(arguments(place, tmp_path)) == 1
    first = [run_id for run_id in begun if run_id in {run.run_id for run in plan.runs[:60]}]
    assert len(first) == 10
    assert "1 runs failed" in capsys.readouterr().out
    assert table(tmp_path / "micro" / "stops.csv")[0]["runs"] == "0"
    assert table(tmp_path / "micro" / "stops.csv")[0]["estimate"] == ""
    assert table(tmp_path / "micro" / "stops.csv")[1:] == table(whole / "stops.csv")[1:]
    assert main(arguments(place, tmp_path)) == 0
    same(tmp_path / "micro", whole)


def test_the_detected_rate_needs_no_outcome(place: MicroPlace, tmp_path: Path) -> None:
    options = ["--run.scope=site", "--stop.rate=detected"]
    assert main(arguments(place, tmp_path, *options)) == 0
    runs, stops = table(tmp_path / "micro" / "runs.csv"), table(tmp_path / "micro" / "stops.csv")
    seen = sum(row["violation_detected"] == "True" for row in runs)
    assert seen == sum(int(row["successes"]) for row in stops) > 0


def test_another_rule_is_another_campaign(whole: Path, place: MicroPlace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments(place, whole.parent), "--stop.margin=0.2"]) == 2
    assert "stop.margin (0.12 -> 0.2)" in capsys.readouterr().err


def test_the_runner_in_python_refuses(place: MicroPlace, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stop.margin: this runner does every run of its plan"):
        CompleteExperimentRunner(load_config(arguments(place, tmp_path)))


def test_the_plan_says_at_most(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, tmp_path, "--dry-run")) == 0
    assert "repeats: at most 60" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--stop.margin=0.1", "--fault.aim=bits"], "stop.margin: got 0.1 with fault.aim 'bits', allowed uniform"),
    (["--stop.margin=0.1", "--sweep.fault.aim=uniform,effect"], "stop.margin: got 0.1 with fault.aim 'effect'"),
    (["--stop.margin=0.1", "--run.scope=site"], "stop.rate: got 'harmful' with run.scope 'site', allowed detected"),
    (["--stop.margin=0.1", "--sweep.run.scope=full,site"], "stop.rate: got 'harmful' with run.scope 'site'"),
    (["--stop.margin=0"], "stop.margin: got 0.0, allowed a number between 0 and 0.5"),
    (["--stop.margin=.nan"], "stop.margin: got nan, allowed"),
    (["--stop.confidence=95"], "stop.confidence: got 95.0, allowed a number between 0 and 1"),
    (["--stop.rate=harmfull"], "stop.rate: got 'harmfull', allowed harmful, .*did you mean 'harmful'"),
    (["--stop.minimum=0"], "stop.minimum: got 0, allowed 1 or more"),
    (["--stop.growth=1"], "stop.growth: got 1.0, allowed a number above 1, at most 10"),
    (["--stop.growth=.nan"], "stop.growth: got nan"),
    (["--sweep.stop.margin=0.1,0.2"], "sweep.stop.margin: this field belongs to the campaign as a whole"),
])  # fmt: skip
def test_rules_that_cannot_be_meant_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        load_config(["--fault.bit=null", *options])
