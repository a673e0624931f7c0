"""``propagation.csv`` and the epsilon columns: against hooks on a plain model, and the same bits from both engines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_campaigns import arguments, campaign, same_tables
from engine_places import opened_place, padded, small_bert, small_gpt2, small_llama, tokens
from micro_campaign import MicroPlace, table
from torch import Tensor, nn
from zoo import ZOO

from bounds import compute_attention_bounds
from experiments.command_line import main
from experiments.config import DetectConfig, ExperimentConfig, FaultConfig, IndexConfig, RunConfig
from experiments.runner import CompleteExperimentRunner
from experiments.runs.record import RunRecord
from experiments.tables.schema import UNREPEATABLE, ExperimentResult

EPSILON = ("epsilon", "epsilon_lower", "epsilon_upper")
S_W = DetectConfig(detectors=["finite", "s@w"])


def records(model: nn.Module, batches: Sequence[Any], family: str | None = None, **sections: Any) -> list[RunRecord]:
    config = ExperimentConfig(exp_name="x", injection_location="out", **sections)
    runner = CompleteExperimentRunner(config, family=family)
    runner.run_all(model, batches)
    return runner.records


def changes_of(record: RunRecord) -> list[tuple[int, float]]:
    assert {row.run_id for row in record.propagation} <= {record.result.run_id}
    return [(row.layer, row.relative_change) for row in record.propagation]


# --------------------------------------------------------------------------------------------- an independent oracle


class Hooked:
    """Plain passes of a GPT-2: what its blocks return, with one bit of what one attention gives flipped by hand."""

    def __init__(self, model: Any, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch

    def blocks(self, flip: tuple[int, tuple[int, int, int, int], int] | None = None) -> list[Any]:
        found: list[Any] = []

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found.append(hidden.detach().double().numpy().copy())

        blocks = self.model.transformer.h
        handles = [block.register_forward_hook(keep) for block in blocks]
        if flip is not None:
            layer, index, bit = flip
            handles.append(blocks[layer].attn.c_proj.register_forward_pre_hook(self._flipped(index, bit)))
        with torch.no_grad():
            self.model(**self.batch, use_cache=False)
        for handle in handles:
            handle.remove()
        return found

    def _flipped(self, index: tuple[int, int, int, int], bit: int) -> Callable[[nn.Module, Any], Any]:
        def flip(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            sequence, head, row, column = index
            merged = inputs[0].clone()
            channel = head * (merged.shape[-1] // self.model.config.n_head) + column
            merged.view(torch.int32)[sequence, row, channel] ^= 1 << bit
            return (merged,)

        return flip

    def changes(self, layer: int, index: tuple[int, int, int, int], bit: int) -> list[tuple[int, float]]:
        clean, faulty = self.blocks(), self.blocks((layer, index, bit))
        real = self.batch["attention_mask"].bool().numpy()
        pairs = enumerate(zip(clean, faulty, strict=True))
        norms = [(n, np.linalg.norm((b - a)[real]) / np.linalg.norm(a[real])) for n, (a, b) in pairs]
        assert all(norm == 0.0 for _, norm in norms[:layer])
        return [(number, float(norm)) for number, norm in norms[layer:]]


@pytest.mark.parametrize("engine", ["plain", "fast"])
@pytest.mark.parametrize(
    ("layer", "index", "bit"), [(1, (1, 2, 20, 3), 29), (0, (0, 0, 38, 7), 21), (2, (1, 3, 9, 0), 30)]
)
def test_the_change_behind_every_block_is_that_of_hooks_on_a_plain_model(
    engine: str, layer: int, index: tuple[int, int, int, int], bit: int
) -> None:
    model, batch = small_gpt2(), padded("right")
    expected = Hooked(model, dict(batch)).changes(layer, index, bit)
    fault = FaultConfig(
        location="out", bit=bit, layers=[layer], layer_mode="specific",
        index=IndexConfig(**dict(zip(("batch", "head", "row", "col"), index, strict=True))),
    )  # fmt: skip
    run = RunConfig(engine=engine, propagation=True)
    (record,) = records(model, [batch], fault=fault, run=run, detect=S_W, num_runs=1)
    found = changes_of(record)
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, change), (_, norm) in zip(found, expected, strict=True):
        assert norm > 0
        # Norms in float64 of the same bits: sums of some hundred squares.
        assert change == pytest.approx(norm, rel=1e-13)


# --------------------------------------------------------------------------------------------- both engines

MODELS: dict[str, Callable[[], tuple[Any, Any, str]]] = {
    "gpt2": lambda: (small_gpt2(), [padded("right"), {"input_ids": tokens(2)}], "causal"),
    "gpt2-bfloat16": lambda: (small_gpt2().bfloat16(), [padded("left")], "causal"),
    "llama": lambda: (small_llama(), [padded("left"), padded("right")], "causal"),
    "llama-bfloat16": lambda: (small_llama().bfloat16(), [padded("right")], "causal"),
    "bert": lambda: (small_bert(), [{**padded("right"), "labels": padded("right")["input_ids"]}], "masked"),
    "bert-bfloat16": lambda: (small_bert().bfloat16(), [{"input_ids": tokens(2), "labels": tokens(2)}], "masked"),
}


def both(name: str, **sections: Any) -> tuple[list[RunRecord], list[RunRecord]]:
    model, batches, family = MODELS[name]()
    found = [
        records(model, batches, family, run=RunConfig(engine=engine, propagation=True, **sections.get("run", {})),
                detect=S_W, **{key: value for key, value in sections.items() if key != "run"})
        for engine in ("plain", "fast")
    ]  # fmt: skip
    return found[0], found[1]


def reproducible(result: ExperimentResult) -> str:
    return repr({name: value for name, value in vars(result).items() if name not in UNREPEATABLE})


@pytest.mark.parametrize("name", MODELS)
def test_both_engines_record_the_same_bits(name: str) -> None:
    bits = [3, 14] if name.endswith("bfloat16") else [3, 30]
    locations = ["q", "k", "v", "scores", "weights", "out"]
    sweep = {"fault.location": locations, "fault.bit": bits}
    plain, fast = both(name, sweep=sweep, num_runs=3, injection_bit=bits[0])
    assert {record.result.execution for record in fast} >= {"rows"}
    for one, other in zip(plain, fast, strict=True):
        assert reproducible(one.result) == reproducible(other.result)
        assert repr(one.propagation) == repr(other.propagation)
        first = one.result.layer
        assert [layer for layer, _ in changes_of(one)] == list(range(first, 3))
    changes = [change for record in plain for _, change in changes_of(record)]
    assert any(math.isnan(change) or math.isinf(change) for change in changes)
    assert any(0 < change < 1 for change in changes)
    masked = [record for record in plain if record.result.outcome == "masked"]
    assert masked or name.startswith("bert")
    for record in masked:
        # A fault may be lost behind its own block.
        assert changes_of(record)[-1][1] == 0.0
    for record in plain:
        if record.result.epsilon is not None and math.isfinite(record.result.epsilon):
            assert_epsilon_fits(record.result)


def assert_epsilon_fits(result: ExperimentResult) -> None:
    epsilon, lower, upper = (getattr(result, name) for name in EPSILON)
    assert result.epsilon_margin is not None
    distance = min(epsilon - lower, upper - epsilon)
    # The margin is without the tolerance, which the bounds include.
    assert distance >= result.epsilon_margin * (1 - 1e-12) - 1e-12 * abs(epsilon)
    if "s@w" not in result.detectors.split(";"):
        assert lower <= epsilon <= upper


def test_a_fault_that_is_lost_moves_nothing_from_there_on() -> None:
    plain, fast = both("gpt2", sweep={"fault.location": ["k", "scores"]}, num_runs=12, injection_bit=0)
    assert repr([record.propagation for record in plain]) == repr([record.propagation for record in fast])
    lost = [changes_of(record) for record in plain if record.result.outcome == "masked"]
    assert lost
    for changes in lost:
        moved = [change > 0 for _, change in changes]
        assert moved == sorted(moved, reverse=True)


def test_faults_in_several_layers_are_followed_from_the_first() -> None:
    fault = FaultConfig(location="v", bit=25, layer_mode="all")
    plain, fast = both("llama", fault=fault, num_runs=2)
    assert [record.result.execution for record in fast] == ["resume", "resume"]
    for one, other in zip(plain, fast, strict=True):
        assert repr(one.propagation) == repr(other.propagation)
        assert [layer for layer, _ in changes_of(one)] == [0, 1, 2]


def test_runs_at_the_site_have_no_rows_but_those_that_are_propagated_all_the_same() -> None:
    run = {"scope": "site", "full_every": 2}
    plain, fast = both("gpt2", num_runs=5, injection_bit=20, run=run)
    for record in plain:
        assert bool(record.propagation) == (record.result.scope == "full")
    assert [record.result.scope for record in plain] == ["full", "site", "full", "site", "full"]
    assert repr([record.propagation for record in plain]) == repr([record.propagation for record in fast])


def test_without_being_asked_nothing_is_recorded_and_nothing_else_changes() -> None:
    model = small_gpt2()
    on, off = (
        records(model, [padded("left")], detect=S_W, num_runs=4, injection_bit=12, run=RunConfig(propagation=asked))
        for asked in (True, False)
    )
    assert [reproducible(record.result) for record in on] == [reproducible(record.result) for record in off]
    assert all(record.propagation for record in on)
    assert not any(record.propagation for record in off)


def test_a_repeated_baseline_is_followed_too() -> None:
    run = RunConfig(reuse_baseline=False, propagation=True)
    (record,) = records(small_gpt2(), [padded("left")], detect=S_W, num_runs=1, injection_bit=12, run=run)
    (other,) = records(
        small_gpt2(), [padded("left")], detect=S_W, num_runs=1, injection_bit=12, run=RunConfig(propagation=True)
    )
    assert repr(record.propagation) == repr(other.propagation)
    assert record.propagation


# --------------------------------------------------------------------------------------------- campaigns


@pytest.fixture(scope="module")
def fast(place: MicroPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign(place, tmp_path_factory.mktemp("fast"))


def test_the_table_of_a_campaign(fast: Path) -> None:
    rows, runs = table(fast / "propagation.csv"), table(fast / "runs.csv")
    expected = [(run["run_id"], str(layer)) for run in runs for layer in range(int(run["layer"]), 2)]
    assert [(row["run_id"], row["layer"]) for row in rows] == expected
    facts = json.loads((fast / "provenance.json").read_text())["contexts"].popitem()[1]
    assert facts["propagation"] == "behind every block"


def test_a_replay_compares_blocks_too(fast: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shard,) = (fast / "shards").glob("*.propagation.csv")
    row = next(row for row in table(shard) if float(row["relative_change"]) > 0)
    assert main(["replay", str(fast), row["run_id"], "--engine", "plain"]) == 0
    text = shard.read_text()
    try:
        wrong = ",".join(row.values()).replace(row["relative_change"], "0.125")
        shard.write_text(text.replace(",".join(row.values()), wrong))
        capsys.readouterr()
        assert main(["replay", str(fast), row["run_id"], "--engine", "plain"]) == 1
    finally:
        shard.write_text(text)
    expected = f"relative_change behind block {row['layer']} was 0.125, is {row['relative_change']}"
    assert expected in capsys.readouterr().out


def test_rows_of_a_run_that_does_not_count_are_written_again(place: MicroPlace, tmp_path: Path, fast: Path) -> None:
    given = arguments(place, tmp_path)
    assert main(given) == 0
    shard = tmp_path / "micro" / "shards" / "0001.csv"
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[:-3]))
    assert main(given) == 0
    same_tables(fast, tmp_path / "micro")
    blocks = [(row["run_id"], row["layer"]) for row in table(shard.with_suffix(".propagation.csv"))]
    assert len(blocks) == len(set(blocks))


def test_a_model_without_a_chain_of_blocks_has_no_rows_and_says_why(
    place: MicroPlace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.AlbertConfig(
        vocab_size=300, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AlbertModel(config).save_pretrained(tmp_path / "albert")
    folder = campaign(place, tmp_path, f"--model.path={tmp_path / 'albert'}", "--data.source=synthetic", "--num_runs=1")
    assert table(folder / "propagation.csv") == []
    assert len(table(folder / "runs.csv")) == 12
    facts = json.loads((folder / "provenance.json").read_text())["contexts"].popitem()[1]
    assert facts["propagation"] == "its blocks do not run once each, in order"
    (line,) = [message for message in caplog.messages if "run.propagation" in message]
    assert "propagation.csv stays empty, since its blocks do not run once each, in order" in line


def test_an_encoder_and_a_decoder_are_no_chain(caplog: pytest.LogCaptureFixture) -> None:
    model = ZOO["t5"].build()
    run = RunConfig(propagation=True)
    batch = dict(ZOO["t5"].inputs(model))
    del batch["decoder_input_ids"]
    batch["labels"] = batch["input_ids"]
    (record,) = records(model, [batch], run=run, detect=S_W, num_runs=1, injection_bit=20)
    assert record.propagation == ()
    assert "since its attention modules do not lie in one list of blocks" in caplog.text


def test_propagation_is_true_or_false(place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(place, tmp_path, "--run.propagation=some")) == 2
    assert "run.propagation: got some, allowed bool" in capsys.readouterr().err
    assert main(arguments(place, tmp_path, "--run.propagations=true")) == 2
    assert "run.propagation" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- epsilon


def test_epsilon_is_that_of_the_row_with_the_smallest_margin() -> None:
    """The columns of a run, and what clean passes say, from the bounds of all rows computed here."""
    with opened_place(small_llama(), [padded("left")], detectors=["s@w"], tolerance=0.25) as place:
        for (_, layer), verdict in place.baseline.verdicts.items():
            kept = place.opened.recording.attention[layer]
            assert verdict.tightest is not None
            epsilon, lower, upper = verdict.tightest
            expected = _tightest(kept, 0.25)
            assert (verdict.smallest_margin, epsilon, lower, upper) == pytest.approx(expected, rel=1e-9)
            assert lower + 0.25 <= epsilon <= upper - 0.25


def _tightest(kept: Any, tolerance: float) -> tuple[float, ...]:
    group = kept.query.shape[1] // kept.key.shape[1]
    scaling = kept.query.shape[-1] ** -0.5
    logits = kept.query @ kept.key.repeat_interleave(group, 1).mT * scaling
    visible = (kept.mask > -1e30).expand(logits.shape)
    weights = torch.softmax(logits.masked_fill(~visible, -math.inf).nan_to_num(0.0), -1)
    bounds = compute_attention_bounds(logits, weights, kept.query.shape[-1], visible)
    best: tuple[float, ...] | None = None
    for index in np.ndindex(*bounds.n.shape):
        if int(bounds.n[index]) < 3:
            continue
        epsilon, lower, upper, proved = (
            float(getattr(bounds, name)[index]) for name in ("epsilon", "lower", "upper", "tolerance")
        )
        margin = min(epsilon - lower, upper - epsilon)
        if best is None or margin < best[0]:
            best = margin, epsilon, lower - proved - tolerance, upper + proved + tolerance
    assert best is not None
    return best


def test_epsilon_is_empty_where_nobody_looked(place: MicroPlace, tmp_path: Path, fast: Path) -> None:
    other = campaign(place, tmp_path, '--detect.detectors=["finite","q@o","oracle_s@w"]', "--num_runs=1")
    for row in table(other / "runs.csv"):
        assert [row[name] for name in (*EPSILON, "epsilon_margin")] == [""] * 4
    for row in table(fast / "runs.csv"):
        assert all(row[name] for name in (*EPSILON, "epsilon_margin"))


def test_clean_rows_say_how_far_from_the_bounds_they_are(fast: Path) -> None:
    rows = table(fast / "clean.csv")
    margins = {row["detector"]: row["smallest_margin"] for row in rows}
    assert margins["s@w"]
    assert margins["finite"] == ""
    assert all(float(row["smallest_margin"]) > -1e-3 for row in rows if row["detector"] == "s@w")
