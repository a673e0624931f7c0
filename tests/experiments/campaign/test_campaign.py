"""Whole campaigns on a micro model: what comes out, each run exactly once, whatever disturbs them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from campaign_disturbance import killed, rows_on_disk, run_that, same_tables
from micro_campaign import MicroPlace, files_below, micro_gpt2, table

from experiments.command_line import main
from experiments.config import load_config
from experiments.engine import contexts
from experiments.plan.plan import make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.tables.csv_file import CsvFile, read_rows
from experiments.tables.schema import (
    CleanRow,
    DetectionRow,
    ExperimentResult,
    FailureRow,
    PropagationRow,
    columns,
)

TABLES = {
    "runs": ExperimentResult,
    "detections": DetectionRow,
    "propagation": PropagationRow,
    "clean": CleanRow,
    "failures": FailureRow,
}


# --------------------------------------------------------------------------------------------- what comes out


def test_the_files_of_a_campaign(whole: Path, place: MicroPlace) -> None:
    present = files_below(whole)
    for name in (
        "config.yaml", "provenance.json", "plan.csv", "shards/0001.csv", "runs.csv", "detections.csv", "failures.csv",
        "trace/0001.jsonl",
    ):  # fmt: skip
        assert name in present
    assert not [name for name in present if name.endswith((".lock", ".tmp")) or "/." in name or name.startswith(".")]
    for name, row_type in TABLES.items():
        assert (whole / f"{name}.csv").read_text().splitlines()[0] == ",".join(columns(row_type))


def test_every_planned_run_has_its_row(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    config = load_config(place.arguments(tmp_path))
    planned = [run.run_id for run in make_plan(config).runs]
    assert len(planned) == 24
    assert [row["run_id"] for row in table(whole / "plan.csv")] == planned
    rows = table(whole / "runs.csv")
    assert [row["run_id"] for row in rows] == planned
    for row in rows:
        assert (row["model"], row["dtype"], row["source"]) == (place.model, "float32", place.source)
        assert repr(float(row["loss_diff"])) == repr(float(row["injected_loss"]) - float(row["baseline_loss"]))
        assert row["outcome"] in ("masked", "benign", "critical", "nonfinite")
    assert table(whole / "failures.csv") == []
    detections = table(whole / "detections.csv")
    assert {row["run_id"] for row in detections} == set(planned)
    clean = table(whole / "clean.csv")
    assert sum(int(row["violations"]) for row in clean) == 0


def test_the_configuration_on_disk_is_that_of_the_campaign(whole: Path, place: MicroPlace) -> None:
    config = load_config(["--config", str(whole / "config.yaml")])
    assert [run.run_id for run in make_plan(config).runs] == [row["run_id"] for row in table(whole / "plan.csv")]
    assert config == load_config(place.arguments(whole.parent))


def test_where_the_numbers_come_from(whole: Path) -> None:
    facts = json.loads((whole / "provenance.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert "--name" in facts["arguments"]
    (context,) = facts["contexts"].values()
    assert (context["family"], context["attention_layers"]) == (
        "causal",
        ["transformer.h.0.attn", "transformer.h.1.attn"],
    )
    assert len(context["model_fingerprint"]) == len(context["data_fingerprint"]) == 32
    assert "bitwise equal" in context["equivalence_gate"]


def test_the_trace_has_one_line_for_every_injected_pass(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "trace" / "0001.jsonl").read_text().splitlines()]
    injected = [line for line in lines if line["op"] == "injected"]
    assert len(injected) == 24
    assert {line["run_id"] for line in injected} == {row["run_id"] for row in table(whole / "runs.csv")}


def test_the_closing_table(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(place.arguments(tmp_path)) == 0
    said = capsys.readouterr().out
    rows = table(tmp_path / "micro" / "runs.csv")
    assert f"24 runs, {len({row['fault_id'] for row in rows})} distinct faults" in said
    for location in ("q", "k", "v", "scores", "weights", "out"):
        assert f"\n{location} " in said
    detected = sum(row["violation_detected"] == "True" for row in rows)
    last = next(line for line in said.splitlines() if line.startswith("all"))
    counts = [
        sum(row["outcome"] == outcome for row in rows) for outcome in ("masked", "benign", "critical", "nonfinite")
    ]
    assert last.split()[1:6] == [str(24), *map(str, counts)]
    assert f"{100 * detected / 24:.1f} % (" in last
    harmful = [row for row in rows if row["outcome"] in ("critical", "nonfinite")]
    seen = sum(row["violation_detected"] == "True" for row in harmful)
    assert 0 < len(harmful) < 24
    assert last.split()[-3] == f"{seen}/{len(harmful)}"
    assert "false positives: 0 violations in" in said
    assert f"24 of 24 runs in {tmp_path / 'micro' / 'runs.csv'}" in said


def test_the_plan_is_on_disk_before_the_first_run(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def look(number: int, planned: Any) -> None:
        if number == 1:
            seen.append(files_below(tmp_path / "micro"))

    with run_that(monkeypatch, look):
        assert main(place.arguments(tmp_path)) == 0
    assert {"config.yaml", "plan.csv", "shards/0001.json", "shards/0001.lock"} < set(seen[0])


# --------------------------------------------------------------------------------------------- exactly once


def test_a_finished_campaign_does_nothing_and_says_so(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    contents = {name: (tmp_path / "micro" / name).read_bytes() for name in ("runs.csv", "shards/0001.csv", "plan.csv")}
    monkeypatch.setattr(contexts, "load_model", lambda *_: pytest.fail("loaded a model for nothing"))
    assert main(place.arguments(tmp_path)) == 0
    assert "24 of 24 runs" in capsys.readouterr().out
    for name, content in contents.items():
        assert (tmp_path / "micro" / name).read_bytes() == content
    assert files_below(tmp_path / "micro") == files_below(whole)


@pytest.mark.parametrize("last", [1, 2, 13, 24])
def test_an_interrupted_campaign_goes_on_and_ends_the_same(
    whole: Path,
    place: MicroPlace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    last: int,
) -> None:
    def interrupt(number: int, planned: Any) -> None:
        if number == last:
            raise KeyboardInterrupt

    with run_that(monkeypatch, interrupt):
        assert main(place.arguments(tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert rows_on_disk(tmp_path / "micro") == last - 1
    assert not list(tmp_path.rglob("*.lock"))
    with run_that(monkeypatch, lambda number, planned: None) as begun:
        assert main(place.arguments(tmp_path)) == 0
    assert len(begun) == 25 - last
    same_tables(tmp_path / "micro", whole)


@pytest.mark.parametrize("torn", [0.0, 0.5, 1.0], ids=["not", "half", "fully"])
@pytest.mark.parametrize("kind", ["csv", "detections.csv", "propagation.csv", "clean.csv"])
def test_a_crash_in_the_middle_of_any_write_is_made_good(
    whole: Path, place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, torn: float
) -> None:
    """The bytes that were asked for are not, half, or fully on disk when the process ends."""
    calls, real = [0], CsvFile.append

    def append(self: CsvFile, *rows: Sequence[str]) -> None:
        calls[0] += self.path.name == f"0001.{kind}" and bool(rows)
        if calls[0] < 3 or self.path.name != f"0001.{kind}" or not rows:
            return real(self, *rows)
        size = self.path.stat().st_size
        real(self, *rows)
        os.truncate(self.path, size + int(torn * (self.path.stat().st_size - size)))
        raise KeyboardInterrupt

    monkeypatch.setattr(CsvFile, "append", append)
    assert main(place.arguments(tmp_path)) == 130
    monkeypatch.undo()
    assert calls[0] == 3
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def killed_and_restarted(place: MicroPlace, output: Path, moments: Sequence[float]) -> int:
    """Kill the campaign when about that share of its rows is on disk, again and again; return how often it was."""
    pauses = [random.Random(moment).uniform(0, 0.02) for moment in moments]
    return sum(
        killed(place.arguments(output), output / "micro", 24 * moment, pause)
        for moment, pause in zip(moments, pauses, strict=True)
    )


def test_a_campaign_that_was_killed_three_times_ends_the_same(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    assert killed_and_restarted(place, tmp_path, [0.04, 0.3, 0.7]) == 3
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_campaign_that_was_killed_often_ends_the_same(
    whole: Path, place: MicroPlace, tmp_path: Path, seed: int
) -> None:
    random_moments = random.Random(seed)
    moments = [0.0, *sorted(random_moments.uniform(0, 1.0) for _ in range(12))]
    assert killed_and_restarted(place, tmp_path, moments) >= 3
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


@pytest.mark.parametrize("seed", range(4))
def test_torn_tails_are_repaired_and_the_campaign_ends_the_same(
    whole: Path, place: MicroPlace, tmp_path: Path, seed: int
) -> None:
    """The detections of a run are on disk before its own row, so a kill leaves them complete or ahead."""
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    os.truncate(path, random.Random(seed).randint(0, path.stat().st_size))
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_half_written_row_of_garbage_is_cut_off(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_row_that_was_deleted_by_hand_is_done_again(whole: Path, place: MicroPlace, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], *lines[6:]]))
    assert main(place.arguments(tmp_path)) == 0
    same_tables(tmp_path / "micro", whole)


def test_a_damaged_row_in_the_middle_is_refused(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "micro")
    path = tmp_path / "micro" / "shards" / "0001.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], lines[5][:30] + "\n", *lines[6:]]))
    for command in (place.arguments(tmp_path), ["merge", str(tmp_path / "micro")], ["status", str(tmp_path / "micro")]):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "0001.csv: line 6 has" in line


# --------------------------------------------------------------------------------------------- wider campaigns


def test_a_campaign_over_two_dtypes_seeds_and_lists_of_bits(place: MicroPlace, tmp_path: Path) -> None:
    arguments = [
        *place.arguments(tmp_path, "--fault.location=weights", "--num_runs=1", bits="[3, [0, 14], sign]"),
        "--sweep.model.dtype", "float32,bfloat16", "--sweep.seed", "0,1",
    ]  # fmt: skip
    assert main(arguments) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert sorted({(row["dtype"], row["seed"]) for row in rows}) == [
        ("bfloat16", "0"), ("bfloat16", "1"), ("float32", "0"), ("float32", "1"),
    ]  # fmt: skip
    assert len(rows) == 12
    assert len(json.loads((tmp_path / "micro" / "provenance.json").read_text())["contexts"]) == 4
    assert main(["replay", str(tmp_path / "micro"), *[row["run_id"] for row in rows[::4]]]) == 0


def test_the_clean_passes_of_every_model_are_counted(place: MicroPlace, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path, "--fault.location=q", "--data.num_samples=1", "--num_runs=1", bits="3")
    assert main([*arguments, "--sweep.model.dtype", "float32,bfloat16"]) == 0
    clean = table(tmp_path / "micro" / "clean.csv")
    # One input, two models: each of them has its own fault-free pass, and so its own false positives.
    assert len({row["baseline"] for row in clean}) == 2


def test_the_same_fault_in_two_models_is_two_experiments(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = micro_gpt2()
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.weight *= 1.5
    other.save_pretrained(tmp_path / "other")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "other")
    fixed = [
        "--fault.location=q", "--data.num_samples=1", "--num_runs=1", "--fault.layers=0", "--fault.index.batch=0",
        "--fault.index.head=0", "--fault.index.row=4", "--fault.index.col=2",
    ]  # fmt: skip
    arguments = [
        *place.arguments(tmp_path, *fixed, bits="28"),
        "--sweep.model.path",
        f"{place.model},{tmp_path / 'other'}",
    ]
    assert main(arguments) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert len({row["fault_id"] for row in rows}) == 2
    assert "2 runs, 2 distinct faults" in capsys.readouterr().out


def test_a_fault_that_is_drawn_twice_counts_once(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [
        "--fault.location=q", "--data.num_samples=1", "--num_runs=3", "--fault.layers=0", "--fault.index.batch=0",
        "--fault.index.head=0", "--fault.index.row=4", "--fault.index.col=2",
    ]  # fmt: skip
    assert main(place.arguments(tmp_path, *fixed, bits="28")) == 0
    assert "3 runs, 1 distinct faults" in capsys.readouterr().out


def test_a_campaign_over_kinds_without_bits(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = place.arguments(tmp_path, "--fault.bit=null", "--fault.location=weights")
    assert main([*arguments, "--sweep.fault.kind", "zero,random_value,bitflip,stuck_at_1"]) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert [row["kind"] for row in rows[::2]] == ["zero", "random_value", "bitflip", "stuck_at_1"]
    assert [row["bit_field"] == "" for row in rows] == [True] * 4 + [False] * 4
    assert "8 of 8 runs" in capsys.readouterr().out


def test_a_campaign_without_detectors(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(place.arguments(tmp_path, "--detect.detectors=[]", "--fault.location=q", "--num_runs=1")) == 0
    assert table(tmp_path / "micro" / "detections.csv") == []
    assert "2 of 2 runs" in capsys.readouterr().out


def test_a_campaign_on_a_bare_encoder(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    arguments = place.arguments(
        tmp_path, f"--model.path={tmp_path / 'bert'}", "--data.source=synthetic", "--num_runs=1"
    )
    assert main(arguments) == 0
    rows = table(tmp_path / "micro" / "runs.csv")
    assert {(row["baseline_loss"], row["loss_diff"], row["kl_mean"], row["top1_changed"]) for row in rows} == {
        ("", "", "", "")
    }
    assert "12 of 12 runs" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "micro"), rows[0]["run_id"]]) == 0


def test_every_shard_has_the_runs_that_the_plan_gives_it(place: MicroPlace, tmp_path: Path) -> None:
    arguments = place.arguments(tmp_path)
    assert main([*arguments, "--shard", "3/5"]) == 0
    plan = make_plan(load_config(arguments))
    rows = read_rows(tmp_path / "micro" / "shards" / "0003.csv", columns(ExperimentResult))
    assert [row[0] for row in rows] == [run.run_id for run in shard_of(plan, Shard(3, 5))]


@pytest.mark.slow
def test_the_default_campaign_in_shards_and_as_a_whole(tmp_path: Path) -> None:
    assert main(["--output_dir", str(tmp_path / "a"), "--num_runs", "1"]) == 0
    assert main(["--output_dir", str(tmp_path / "b"), "--num_runs", "1", "--launcher", "local", "--workers", "2"]) == 0
    same_tables(tmp_path / "a" / "default", tmp_path / "b" / "default")
    assert len(table(tmp_path / "a" / "default" / "runs.csv")) == 192
