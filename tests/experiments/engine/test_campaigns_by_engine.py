"""Whole campaigns by the fast engine and by plain passes: the same tables, but for who computed a row and its times."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from campaign_disturbance import killed, rows_on_disk
from engine_campaigns import arguments, campaign, same_tables
from micro_campaign import MicroPlace, files_below, numbers, table
from zoo import ZOO

from experiments.command_line import main


def executions(folder: Path) -> Counter[str]:
    return Counter(row["execution"] for row in table(folder / "runs.csv"))


def facts(folder: Path) -> dict[str, object]:
    (context,) = json.loads((folder / "provenance.json").read_text())["contexts"].values()
    execution: dict[str, object] = context["execution"]
    return execution


@pytest.fixture(scope="module")
def plain(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign(place, tmp_path_factory.mktemp("plain"), "--run.engine=plain")


@pytest.fixture(scope="module")
def fast(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign(place, tmp_path_factory.mktemp("fast"))


# --------------------------------------------------------------------------------------------- the same tables


def test_the_tables_are_those_of_plain_passes(plain: Path, fast: Path) -> None:
    same_tables(plain, fast)
    assert executions(plain) == {"plain": 36}
    assert executions(fast)["rows"] > 18
    assert set(executions(fast)) == {"rows"}
    rows = table(fast / "runs.csv")
    assert {row["outcome"] for row in rows} == {"masked", "benign", "critical", "nonfinite"}
    # What overflows goes through whole sequences, by rows all the same.
    assert any(row["outcome"] == "nonfinite" and row["layer"] == "0" for row in rows)


def test_provenance_says_what_is_exact(plain: Path, fast: Path) -> None:
    known = facts(fast)
    assert (known["resume"], known["rows"], known["head"]) == ("exact", "exact", "exact")
    assert (known["faults_compared"], known["threads"]) == (15, 1)
    assert json.loads((plain / "provenance.json").read_text())["contexts"].popitem()[1]["execution"] == "plain"


def test_the_default_detectors(place: MicroPlace, tmp_path: Path) -> None:
    default = '--detect.detectors=["full","epsilon","oracles"]'
    one = campaign(place, tmp_path / "plain", default, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", default)
    same_tables(one, other)
    assert executions(other)["rows"] > 18


NO_BIT = ("--fault.bit=null", "--num_runs=6")
KINDS = {
    "stuck_at": (["--fault.kind=stuck_at_1"], {"rows", "resume"}),
    "zero": ([*NO_BIT, "--fault.kind=zero"], {"rows"}),
    "random_value": ([*NO_BIT, "--fault.kind=random_value"], {"rows", "resume"}),
    "error_rate": ([*NO_BIT, "--fault.kind=bit_error_rate", "--fault.rate=2e-3"], {"resume"}),
    "error_rate_of_a_head": (
        [*NO_BIT, "--fault.kind=bit_error_rate", "--fault.rate=1e-3", "--fault.index.head=1"],
        {"rows", "resume"},
    ),
    "all_layers": (["--fault.layer_mode=all"], {"resume"}),
    "hidden_keys": (["--fault.include_masked=true"], {"rows", "resume"}),
    "detectors_everywhere": (["--detect.layers=all"], {"resume"}),
    "certificate": (["--detect.certificate=true"], {"resume"}),
    "correction": (["--detect.correct=true"], {"resume"}),
    "repeated_baseline": (["--run.reuse_baseline=false"], {"plain"}),
    "pairs_of_windows": (["--data.batch_size=2", "--data.num_samples=4"], {"rows", "resume"}),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("error_rate", "all_layers", "random_value") else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_every_kind_of_campaign(place: MicroPlace, tmp_path: Path, kind: str) -> None:
    more, ways = KINDS[kind]
    one = campaign(place, tmp_path / "plain", *more, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", *more)
    same_tables(one, other)
    assert set(executions(other)) <= ways
    assert ("rows" in executions(other)) == ("rows" in ways)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", True), ("float16", False)])
def test_other_dtypes(place: MicroPlace, tmp_path: Path, dtype: str, rows: bool) -> None:
    more = f"--model.dtype={dtype}"
    one = campaign(place, tmp_path / "plain", more, "--run.engine=plain", bits="3,14")
    other = campaign(place, tmp_path / "fast", more, bits="3,14")
    same_tables(one, other)
    assert ("rows" in executions(other)) == rows


# --------------------------------------------------------------------------------------------- sweeps


def test_points_with_other_detectors(place: MicroPlace, tmp_path: Path) -> None:
    more = ['--sweep.detect.detectors=[["finite"],["W_sum","oracle_s@w"],["ranger"]]', "--num_runs=1"]
    one = campaign(place, tmp_path / "plain", *more, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", *more)
    same_tables(one, other)
    # Those of the last point judge whole layers.
    assert executions(other)["resume"] >= 12
    assert executions(other)["rows"] > 12


def test_points_with_other_critical_losses(place: MicroPlace, tmp_path: Path) -> None:
    more = ["--sweep.detect.critical_loss=1e-9,10", "--num_runs=2"]
    one = campaign(place, tmp_path / "plain", *more, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", *more)
    same_tables(one, other)


def test_clean_rows_are_those_of_inputs_that_runs_used(place: MicroPlace, tmp_path: Path) -> None:
    more = [
        '--sweep.detect.detectors=[["s@w"],["W_sum"],["O_row"]]', "--data.num_samples=16",
        "--fault.location=q", "--num_runs=6", "--seed=1",
    ]  # fmt: skip
    one = campaign(place, tmp_path / "plain", *more, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", *more)
    assert numbers(one / "runs.csv") == numbers(other / "runs.csv")
    assert (one / "clean.csv").read_text() == (other / "clean.csv").read_text()


# --------------------------------------------------------------------------------------------- the site alone

EMPTY = ("injected_loss", "loss_diff", "relative_change", "kl_mean", "top1_changed", "nonfinite", "outcome")
SITE = ("--run.scope=site", "--num_runs=7")


@pytest.fixture(scope="module")
def at_site(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a campaign of 84 runs whose faults are followed to the output in repeats 0, 3 and 6."""
    folders = [tmp_path_factory.mktemp(engine) for engine in ("plain", "auto")]
    more = [*SITE, "--run.full_every=3"]
    one, other = (campaign(place, folder, *more, f"--run.engine={folder.name[:-1]}") for folder in folders)
    return one, other


def test_runs_at_the_site_are_those_of_plain_passes(at_site: tuple[Path, Path]) -> None:
    same_tables(*at_site)


@pytest.mark.slow
def test_points_of_both_scopes(place: MicroPlace, tmp_path: Path) -> None:
    more = ["--sweep.run.scope=full,site", "--num_runs=2"]
    one = campaign(place, tmp_path / "plain", *more, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", *more)
    same_tables(one, other)


def test_the_numbers_of_runs_at_the_site_are_those_of_plain_passes(at_site: tuple[Path, Path]) -> None:
    """All of them but what depends on who looks behind the site."""
    one, other = (table(folder / "runs.csv") for folder in at_site)
    for plain_row, fast_row in zip(one, other, strict=True):
        for name in ("run_id", "scope", "local_change", "local_max", "effective", "epsilon_margin", *EMPTY):
            assert plain_row[name] == fast_row[name], (name, plain_row["run_id"])
    assert executions(at_site[1])["rows"] > 70


def test_what_a_run_at_the_site_says(at_site: tuple[Path, Path]) -> None:
    rows = table(at_site[1] / "runs.csv")
    site = [row for row in rows if row["scope"] == "site"]
    assert {row["repeat"] for row in site} == {"1", "2", "4", "5"}
    assert {row["repeat"] for row in rows if row["scope"] == "full"} == {"0", "3", "6"}
    masked = [row for row in site if row["outcome"]]
    assert 0 < len(masked) < len(site)
    for row in site:
        assert row["baseline_loss"]
        unmoved = float(row["local_change"]) == 0.0 == float(row["local_max"])
        assert (row["outcome"] == "masked") == unmoved
        if unmoved:
            assert (row["injected_loss"], row["loss_diff"], row["top1_changed"]) == (row["baseline_loss"], "0.0", "0")
        else:
            assert [row[name] for name in EMPTY] == [""] * len(EMPTY)
    for row in rows:
        if row["scope"] == "full":
            assert (row["local_change"], row["local_max"]) == ("", "")
            assert row["outcome"]


def test_a_run_at_the_site_has_the_detections_of_its_layer(at_site: tuple[Path, Path]) -> None:
    for folder in at_site:
        layer = {row["run_id"]: row["layer"] for row in table(folder / "runs.csv") if row["scope"] == "site"}
        masked = {row["run_id"] for row in table(folder / "runs.csv") if row["outcome"] == "masked"}
        looked = [row for row in table(folder / "detections.csv") if row["run_id"] in layer]
        assert {row["run_id"] for row in looked} == set(layer)
        for row in looked:
            if row["run_id"] not in masked:
                assert row["layer"] == layer[row["run_id"]], row


# --------------------------------------------------------------------------------------------- refusals


def saved(name: str, folder: Path) -> str:
    path = folder / name
    ZOO[name].build().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("model", "more", "reason"),
    [
        ("gpt_neo", [], "transformer.h.0.attn.attention computes attention in its own forward"),
        ("bloom", [], "transformer.h.0.self_attention computes attention in its own forward"),
        (None, ["--detect.layers=all"], "detect.layers=all: detectors look at whole layers behind the fault"),
        (None, ["--data.seq_len=12"], "an input has fewer than 16 tokens"),
        (None, ['--detect.detectors=["ranger"]'], "detector ranger judges whole layers"),
    ],
    ids=["gpt_neo", "bloom", "layers", "short", "ranger"],
)
def test_fast_is_refused_where_it_would_not_be_exact(
    place: MicroPlace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str | None,
    more: list[str],
    reason: str,
) -> None:
    if model is not None:
        more = [f"--model.path={saved(model, tmp_path)}", "--data.source=synthetic"]
    output = tmp_path / "results"
    assert main(arguments(place, output, "--run.engine=fast", *more)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "run.engine" in line]
    assert f"run.engine: got 'fast', but it would not be exact here: {reason}" in line
    assert files_below(output) == []


def test_fast_without_its_baseline_is_bad_usage(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--run.engine=fast", "--run.reuse_baseline=false"]
    assert main(arguments(place, tmp_path / "results", *more)) == 2
    assert "run.engine: got 'fast', allowed auto or plain if run.reuse_baseline is false" in capsys.readouterr().err
    assert files_below(tmp_path / "results") == []


def test_a_model_that_cannot_be_packed_is_resumed(place: MicroPlace, tmp_path: Path) -> None:
    more = [f"--model.path={saved('gpt_neo', tmp_path)}", "--data.source=synthetic"]
    one = campaign(place, tmp_path / "plain", *more, "--run.engine=plain")
    other = campaign(place, tmp_path / "fast", *more)
    same_tables(one, other)
    assert executions(other) == {"resume": 36}
    assert "computes attention in its own forward" in str(facts(other)["rows"])


# --------------------------------------------------------------------------------------------- runs together


@pytest.mark.parametrize("most", [1, 3])
def test_how_many_runs_go_together_changes_nothing(place: MicroPlace, tmp_path: Path, fast: Path, most: int) -> None:
    other = campaign(place, tmp_path, f"--run.batch_runs={most}")
    assert numbers(other / "runs.csv") == numbers(fast / "runs.csv")
    assert (other / "detections.csv").read_text() == (fast / "detections.csv").read_text()
    assert executions(other) == executions(fast)


def test_few_runs_are_not_worth_a_proof(place: MicroPlace, tmp_path: Path) -> None:
    few = campaign(place, tmp_path / "auto", "--num_runs=1")
    assert executions(few) == {"plain": 12}
    assert facts(few) == "plain"
    asked = campaign(place, tmp_path / "fast", "--num_runs=1", "--run.engine=fast")
    assert "rows" in executions(asked)
    assert numbers(few / "runs.csv") == numbers(asked / "runs.csv")


def test_shards_make_the_whole(place: MicroPlace, tmp_path: Path, plain: Path) -> None:
    for shard in ("2/2", "1/2"):
        assert main([*arguments(place, tmp_path, "--run.engine=fast"), "--shard", shard]) == 0
    assert main(["merge", str(tmp_path / "micro")]) == 0
    same_tables(plain, tmp_path / "micro")
    assert executions(tmp_path / "micro")["rows"] > 18


def replayed(folder: Path, *options: str) -> int:
    return main(["replay", str(folder), *[row["run_id"] for row in table(folder / "runs.csv")], *options])


@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_runs_by_rows_are_replayed_otherwise(fast: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    assert replayed(fast, "--engine", engine) == 0
    assert capsys.readouterr().out.count("the same numbers") == 36


def test_a_row_that_is_wrong_is_told_by_a_replay(
    place: MicroPlace, tmp_path: Path, fast: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in table(fast / "runs.csv") if row["execution"] == "rows" and row["outcome"] == "benign")
    shard = next((fast / "shards").glob("[0-9]*[0-9].csv"))
    text = shard.read_text()
    try:
        shard.write_text(text.replace(row["kl_mean"], "0.125"))
        assert main(["replay", str(fast), row["run_id"], "--engine", "plain"]) == 1
    finally:
        shard.write_text(text)
    assert f"{row['run_id']}: kl_mean was 0.125, is {row['kl_mean']}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- kill and go on


def test_a_killed_campaign_goes_on_and_ends_the_same(place: MicroPlace, tmp_path: Path, plain: Path) -> None:
    given = arguments(place, tmp_path, "--run.engine=fast", "--run.batch_runs=1")
    folder = tmp_path / "micro"
    kills = sum(killed(given, folder, rows) for rows in (1, 20))
    assert kills == 2
    before = rows_on_disk(folder)
    assert main(given) == 0
    assert before <= rows_on_disk(folder) == 36
    same_tables(plain, folder)
    assert torch.get_num_threads() == 1
