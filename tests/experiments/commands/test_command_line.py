from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from lock_holders import write_dead_holder, write_holder
from micro_campaign import ROOT, MicroPlace, files_below, table

from bounds import list_detectors
from experiments.command_line import help_text, main
from experiments.commands.options import take_flag, take_value
from experiments.config import known_fields, load_config
from experiments.errors import UsageError
from experiments.plan.plan import make_plan
from experiments.plan.sample_size import sample_size
from fault_injection import LOCATIONS


@pytest.fixture(scope="module")
def done(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done")
    assert main(place.arguments(output)) == 0
    return output / "micro"


# --------------------------------------------------------------------------------------------- help and lists


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["replay", "--help"], ["--seed", "1", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out == help_text()


def test_help_names_every_command_and_option() -> None:
    commands = ("replay", "status", "merge", "report", "trace", "plan-size")
    options = ("config", "sweep.", "dry-run", "list", "shard", "launcher", "workers", "overwrite")
    for word in (*commands, *(f"--{option}" for option in options), "Exit status"):
        assert word in help_text()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from experiments.command_line import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("locations", LOCATIONS), ("detectors", list_detectors()), ("models", ("reference", "reference-kv")),
        ("sources", ("pydoc", "synthetic", "text:PATH", "hf:NAME[:CONFIG]")), ("fields", tuple(known_fields())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_lists(what: str, expected: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", what]) == 0
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert set(expected) <= set(first_words)


def test_the_list_of_layers_is_that_of_the_model(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*place.arguments(tmp_path / "out"), "--list", "layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["0", "transformer.h.0.attn"], ["1", "transformer.h.1.attn"]]
    assert all("K = V: no" in line for line in lines)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- dry run


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = place.arguments(tmp_path / "out")
    assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    plan = make_plan(load_config(arguments))
    assert "campaign micro: 24 runs\n" in said
    assert "fault.location: q, k, v, scores, weights, out" in said
    assert "repeats: 2" in said
    assert plan.runs[0].run_id in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_the_default_campaign(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run"]) == 0
    assert "campaign default: 768 runs" in capsys.readouterr().out
    assert files_below(tmp_path) == []


def test_a_dry_run_of_a_shard(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*place.arguments(tmp_path / "out"), "--dry-run", "--shard", "2/5"]) == 0
    assert "24 runs, 5 in shard" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- status, trace, merge


def test_the_status_of_a_finished_campaign(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_below(done)
    assert main(["status", str(done)]) == 0
    first, shard = capsys.readouterr().out.splitlines()
    assert first == f"{done}: 24 of 24 runs done, 0 failed, 0 missing; 0 of 1 shards running"
    assert shard.strip() == "shard 0001: 24 of 24 runs, done"
    assert files_below(done) == before


def test_the_status_while_a_shard_is_being_written(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        assert main([*place.arguments(tmp_path), "--shard", f"{number}/3"]) == 0
    write_holder(tmp_path / "micro" / "shards" / "0001.lock")
    write_dead_holder(tmp_path / "micro" / "shards" / "0002.lock")
    capsys.readouterr()
    assert main(["status", str(tmp_path / "micro")]) == 1
    first, one, two, three = capsys.readouterr().out.splitlines()
    assert first.endswith("16 of 24 runs done, 0 failed, 8 missing; 1 of 3 shards running")
    assert re.fullmatch(r"  shard 0001: 8 of 8 runs, running: process \d+ on \S+", one)
    assert two.strip() == "shard 0002: 8 of 8 runs, done", "its writer is dead"
    assert three.strip() == "shard 0003: 0 of 8 runs, not begun"


def test_the_trace_says_where_the_time_went(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(done)]) == 0
    said = capsys.readouterr().out
    for word in ("hit rate", "baseline", "injection", "bounds", "detection"):
        assert word in said
    assert main(["trace", str(done), "--format", "json"]) == 0
    assert capsys.readouterr().out.startswith("{")


def test_the_trace_refuses_options_it_does_not_know(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(done), "--fromat", "json"]) == 2
    assert "--fromat" in capsys.readouterr().err


def test_merging_a_finished_campaign_again_changes_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done / "runs.csv").read_bytes()
    assert main(["merge", str(done)]) == 0
    assert "24 of 24 runs in" in capsys.readouterr().out
    assert (done / "runs.csv").read_bytes() == before


def test_a_folder_with_a_slash_at_the_end_is_the_same_folder(done: Path) -> None:
    assert main(["status", f"{done}/"]) == 0


# --------------------------------------------------------------------------------------------- plan-size


def test_plan_size_of_a_population(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-size", "--margin", "0.01", "--confidence", "0.95", "--population", "1000000000000"]) == 0
    assert "9604 runs for a margin of 0.01 at 0.95 confidence" in capsys.readouterr().out
    assert main(["plan-size", "--margin=0.05", "--confidence=0.95", "--population=1000", "--rate=0.1"]) == 0
    assert f"{sample_size(0.05, 0.95, 1000, 0.1)} runs" in capsys.readouterr().out


def test_plan_size_counts_the_faults_of_a_campaign(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = place.arguments(tmp_path / "out", "--sweep.fault.location=q,scores", "--fault.bit=null")
    assert main(["plan-size", "--margin", "0.01", "--confidence", "0.95", *arguments]) == 0
    said = capsys.readouterr().out
    # 4 windows x 2 layers x 2 heads x 32 bits, of 12 x 8 channels of q, and of 78 visible keys of the scores.
    q, scores = 4 * 2 * 2 * 32 * 12 * 8, 4 * 2 * 2 * 32 * 78
    assert f"of a population of {q + scores:,} faults" in said
    assert f"q         0..1 each{q // 64:15,}{32:6}{q // 2:18,}{sample_size(0.01, 0.95, q // 2):10,}" in said
    assert f"scores          all{scores:39,}{sample_size(0.01, 0.95, scores):10,}" in said
    assert f"{sample_size(0.01, 0.95, q + scores)} runs" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "elements", "bits"), [
    (["--fault.location=q", "--fault.layers=1", "--sweep.fault.bit=3,30,[3],exponent"], 12 * 8 * 2, 9),
    (["--fault.location=q", "--fault.layers=1", "--fault.bit=null", "--fault.kind=zero"], 12 * 8 * 2, 1),
    (["--fault.location=scores", "--sweep.fault.layers=1,[1]", "--fault.bit=sign", "--fault.index.head=0"], 78, 1),
    (["--fault.location=scores", "--fault.layers=0", "--fault.bit=null", "--fault.include_masked=true"], 288, 32),
    (["--fault.location=q", "--fault.layers=1", "--fault.bit=null", "--sweep.fault.kind=bitflip,zero"], 192, 33),
])  # fmt: skip
def test_plan_size_counts_what_can_be_drawn(
    place: MicroPlace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    elements: int,
    bits: int,
) -> None:
    arguments = place.arguments(tmp_path / "out", *options)
    assert main(["plan-size", "--margin=0.01", "--confidence=0.95", "--rate=0.1", *arguments]) == 0
    said = capsys.readouterr().out
    assert f"of a population of {4 * elements * bits:,} faults" in said
    saved = sample_size(0.01, 0.95, 4 * elements * bits) / sample_size(0.01, 0.95, 4 * elements * bits, 0.1)
    assert f"expecting 0.1 saves a factor {saved:.3g}" in said


@pytest.mark.parametrize(("options", "message"), [
    (["--sweep.seed=0,1", "--fault.bit=null"], "sweep.seed: faults are counted for one model and data set"),
    (["--fault.bit=null", "--fault.kind=random_value"], "fault.kind: got 'random_value', allowed bitflip, stuck_at_0"),
    (["--fault.bit=null", "--sweep.fault.kind=zero,random_value"], "fault.kind: got 'random_value', allowed bitflip"),
    (["--rate=1.5"], "--rate: got 1.5, allowed a number between 0 and 1"),
])  # fmt: skip
def test_plan_size_refuses_what_it_cannot_count(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = place.arguments(tmp_path / "out", *[text for text in options if not text.startswith("--rate")])
    rate = [text for text in options if text.startswith("--rate")]
    assert main(["plan-size", "--margin=0.01", "--confidence=0.95", *rate, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# --------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("text", [["--shard", "1/2"], ["--shard=1/2"]])
def test_a_value_is_taken_out(text: list[str]) -> None:
    arguments = ["--seed", "3", *text, "--name", "x"]
    assert take_value(arguments, "--shard") == "1/2"
    assert arguments == ["--seed", "3", "--name", "x"]
    assert take_value(arguments, "--shard") is None


@pytest.mark.parametrize("arguments", [["--shard"], ["--shard", "--seed", "3"]])
def test_a_missing_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="--shard: needs a value"):
        take_value(arguments, "--shard")


def test_a_flag_is_taken_out_wherever_and_however_often_it_is() -> None:
    arguments = ["--overwrite", "--seed", "3", "--overwrite"]
    assert take_flag(arguments, "--overwrite")
    assert arguments == ["--seed", "3"]
    assert not take_flag(arguments, "--overwrite")


def test_the_program_is_thin(done: Path) -> None:
    finished = subprocess.run(
        [sys.executable, str(ROOT / "run_sweep.py"), "status", str(done)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0
    assert "24 of 24 runs done" in finished.stdout
    assert finished.stderr == ""
    assert len(table(done / "runs.csv")) == 24


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(done: Path) -> None:
    command = f"{sys.executable} {ROOT / 'run_sweep.py'} --list fields | head -1; exit ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.stdout.strip() == "name"
    assert "Traceback" not in finished.stderr
