"""A run again, by its row: the same numbers, or a refusal that says what differs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from micro_campaign import MicroPlace, files_below, table

from experiments.command_line import main
from experiments.engine import pairs
from experiments.engine.pairs import PairedRunner
from experiments.passes.gate import equivalence_gate
from experiments.tables.csv_file import read_rows
from experiments.tables.schema import (
    UNREPEATABLE,
    ExperimentResult,
    columns,
)

# --------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_replayed_to_the_bit(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    assert main(place.arguments(tmp_path, f"--model.dtype={dtype}", bits="3,14")) == 0
    folder = tmp_path / "micro"
    ids = [row["run_id"] for row in table(folder / "runs.csv")]
    before = {name: (folder / name).read_bytes() for name in files_below(folder) if (folder / name).is_file()}
    capsys.readouterr()
    assert main(["replay", str(folder), *ids[::5]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == sorted(ids[::5])
    assert all(": the same numbers (" in line for line in lines)
    assert {name: (folder / name).read_bytes() for name in files_below(folder) if (folder / name).is_file()} == before


@pytest.mark.parametrize(
    "column",
    ["loss_diff", "value_after", "bits_after", "outcome", "num_violations", "index_col", "kl_mean", "fault_id"],
)
def test_a_row_that_was_tampered_with_is_found_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "micro"))
    shard = folder / "shards" / "0001.csv"
    lines = shard.read_text().splitlines()
    names, victim = lines[0].split(","), lines[7].split(",")
    assert len(names) == len(victim)
    old = victim[names.index(column)]
    victim[names.index(column)] = "7.25"
    lines[7] = ",".join(victim)
    shard.write_text("\n".join(lines) + "\n")
    other = lines[9].split(",")[0]
    assert main(["replay", str(folder), victim[0], other]) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"{victim[0]}: {column} was 7.25, is {old or '(empty)'}" in said
    assert sum(line.startswith(other) and "the same numbers" in line for line in said) == 1
    assert len(said) == 2


def test_a_replay_on_other_data_is_found_out(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = MicroPlace(Path(shutil.copytree(place.root, tmp_path / "mine")))
    assert main(mine.arguments(tmp_path / "out", "--fault.location=q", "--num_runs=1", bits="3")) == 0
    (row,) = table(tmp_path / "out" / "micro" / "runs.csv")
    (mine.root / "text.txt").write_text((mine.root / "text.txt").read_text().upper())
    capsys.readouterr()
    assert main(["replay", str(tmp_path / "out" / "micro"), row["run_id"]]) == 1
    said, complained = capsys.readouterr()
    assert "baseline_loss" in said or "fingerprint" in complained


def test_timings_and_engines_may_differ_in_a_replay(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "micro"))
    shard = folder / "shards" / "0001.csv"
    lines = shard.read_text().splitlines()
    names, row = lines[0].split(","), lines[3].split(",")
    for name in UNREPEATABLE:
        row[names.index(name)] = "1.0"
    lines[3] = ",".join(row)
    shard.write_text("\n".join(lines) + "\n")
    assert main(["replay", str(folder), row[0]]) == 0


def test_the_gate_of_a_replay_looks_at_the_batch_of_the_run(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["batch_index"]: row["run_id"] for row in table(whole / "runs.csv")}
    seen: list[bytes] = []

    def gate(subject: Any, batch: Any, *rest: Any) -> None:
        seen.append(batch["input_ids"].numpy().tobytes())
        equivalence_gate(subject, batch, *rest)

    monkeypatch.setattr(pairs, "equivalence_gate", gate)
    for run_id in rows.values():
        assert main(["replay", str(whole), run_id]) == 0
    assert len(set(seen)) == len(rows) > 1


@pytest.mark.parametrize("options", [["--engine", "plain"], ["--engine=auto"], []], ids=str)
def test_a_run_is_replayed_by_the_engine_that_is_asked_for(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    seen, real = [], PairedRunner.run_many

    def run_many(self: PairedRunner, runs: Sequence[Any]) -> Iterator[Any]:
        seen.append([(run.run_id, config.run.engine) for run, config in runs])
        return real(self, runs)

    monkeypatch.setattr(PairedRunner, "run_many", run_many)
    ids = [row["run_id"] for row in table(whole / "runs.csv")][::9]
    assert main(["replay", str(whole), *options, *ids]) == 0
    engine = options[-1].removeprefix("--engine=") if options else "auto"
    assert [sorted(runs) for runs in seen] == [sorted((run_id, engine) for run_id in ids)]
    assert capsys.readouterr().out.count("the same numbers") == len(ids)


def test_what_cannot_be_replayed(
    whole: Path, place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*place.arguments(tmp_path), "--shard", "1/3"]) == 0
    folder, planned = tmp_path / "micro", [row["run_id"] for row in table(whole / "plan.csv")]
    done = {row[0] for row in read_rows(folder / "shards/0001.csv", columns(ExperimentResult))}
    capsys.readouterr()
    for arguments, status, message in (
        ([str(folder), next(run_id for run_id in planned if run_id not in done)], 2, "has no row yet"),
        ([str(folder), "0" * 16], 2, "is not in this plan of 24 runs"),
        ([str(folder)], 2, "needs a campaign folder and a run id"),
        ([], 2, "needs a campaign folder and a run id"),
        ([str(tmp_path), planned[0]], 3, "no campaign here"),
        ([str(folder), planned[0], "--engine", "fats"], 2, "--engine: got 'fats', allowed auto, plain, fast"),
        ([str(folder), planned[0], "--engine"], 2, "--engine: needs a value"),
    ):
        assert main(["replay", *arguments]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
