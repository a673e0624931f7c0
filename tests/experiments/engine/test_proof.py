"""The start-up proof: what it finds exact, and that it finds what is not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from engine_places import LENGTH, integer_view, opened_place, padded, runner_of, small_gpt2, small_llama, tokens
from registrations import registrations_undone
from torch import Tensor, nn

from bounds import AttentionState, Detector, Verdict, register_detector
from experiments.config import DetectConfig, ExperimentConfig, RunConfig
from experiments.engine import pairs as paired_run
from experiments.engine.fast import engine as fast_engine
from experiments.engine.fast.wide_linear import WideLinear
from experiments.engine.proof import Proof, prove
from experiments.errors import CheckRefusedError
from experiments.machine.environment import set_determinism
from experiments.passes.subject import Subject
from experiments.runner import CompleteExperimentRunner
from experiments.tables.schema import UNREPEATABLE, ExperimentResult
from fault_injection import LOCATIONS

BATCH = {"input_ids": tokens(2, 24)}
FEW = {"detectors": ["lite"]}


@pytest.fixture(autouse=True)
def _few_runs_are_worth_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired_run, "WORTH_A_PROOF", 1)


@contextmanager
def opened_runner(model: Any, batch: Any = BATCH, family: str = "causal") -> Iterator[Any]:
    with Subject(model, family) as subject:
        yield runner_of(subject, [batch])


def proof_of(model: Any, batch: Any = BATCH, family: str = "causal", **detect: Any) -> Proof:
    config = ExperimentConfig(injection_location="q", detect=DetectConfig(**{**FEW, **detect}))
    with opened_runner(model, batch, family) as pairs:
        return prove(pairs.context, config)


def campaign(model: Any, engine: str, batches: Any = (BATCH,), **changes: Any) -> list[ExperimentResult]:
    config = ExperimentConfig(
        num_runs=2, sweep={"fault.location": list(LOCATIONS)},
        **{"injection_bit": 29, "detect": DetectConfig(**FEW), "run": RunConfig(engine=engine), **changes},
    )  # fmt: skip
    return CompleteExperimentRunner(config).run_all(model, list(batches))


def reproducible(results: list[ExperimentResult]) -> list[dict[str, str]]:
    rows = map(dataclasses.asdict, results)
    return [{key: repr(value) for key, value in row.items() if key not in UNREPEATABLE} for row in rows]


def assert_same_campaign(model: Any, executions: set[str], **changes: Any) -> None:
    fast = campaign(model, "auto", **changes)
    assert {result.execution for result in fast} == executions
    assert reproducible(fast) == reproducible(campaign(model, "plain", **changes))


# --------------------------------------------------------------------------------------------- what is exact


def test_what_is_exact_is_said_so() -> None:
    proof = proof_of(small_llama())
    assert (proof.resume, proof.rows, proof.head, proof.faults) == (None, None, None, 2 * len(LOCATIONS) + 3)
    facts = proof.facts()
    assert (facts["resume"], facts["rows"], facts["head"]) == ("exact", "exact", "exact")
    assert (facts["faults_compared"], facts["threads"]) == (15, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": "all"}, "detect.layers=all"),
        ({"certificate": True}, "detect.certificate and detect.correct need whole layers"),
        ({"correct": True}, "detect.certificate and detect.correct need whole layers"),
        ({"detectors": ["ranger"]}, "detector ranger"),
    ],
)
def test_what_needs_whole_layers_is_resumed(changes: dict[str, Any], reason: str) -> None:
    proof = proof_of(small_gpt2(), **changes)
    assert proof.chain is not None
    assert proof.resume is None
    assert reason in str(proof.rows)
    assert proof.head == proof.rows


def test_models_and_inputs_that_cannot_be_packed() -> None:
    short = proof_of(small_gpt2(), {"input_ids": tokens(2, 12)})
    assert (short.resume, short.rows) == (None, "an input has fewer than 16 tokens")
    half = proof_of(small_gpt2().half())
    assert half.resume is None
    assert "float16 overflows" in str(half.rows)
    config = transformers.GPTNeoConfig(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=8,
    )  # fmt: skip
    wrapped = proof_of(transformers.GPTNeoForCausalLM(config).eval())
    assert wrapped.resume is None
    assert "computes attention in its own forward" in str(wrapped.rows)
    config = transformers.AlbertConfig(
        vocab_size=300, embedding_size=16, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    shared = proof_of(transformers.AlbertForMaskedLM(config).eval(), {**BATCH, "labels": BATCH["input_ids"]}, "masked")
    assert (shared.chain, shared.resume, shared.rows) == (None, *["its blocks do not run once each, in order"] * 2)


# --------------------------------------------------------------------------------------------- cross-row operations


class Mixing(nn.Module):
    """Does something to the rows that an own module returns for (B, T, D)."""

    def __init__(self, own: nn.Module, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.own, self.mix = own, mix

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mix(self.own(hidden))


def statistics_of_the_batch(channels: int = 32) -> Callable[[Tensor], Tensor]:
    norm = nn.BatchNorm1d(channels, track_running_stats=False)
    return lambda rows: norm(rows.flatten(0, 1)).view_as(rows)


def experts_with_capacity(channels: int = 32) -> Callable[[Tensor], Tensor]:
    gate = torch.randn(channels, 4, generator=torch.Generator().manual_seed(1))

    def mix(rows: Tensor) -> Tensor:
        tokens_of = torch.nn.functional.one_hot((rows.flatten(0, 1) @ gate).argmax(-1), 4)
        place = (tokens_of.cumsum(0) * tokens_of).amax(-1)
        kept = place <= len(place) // 5
        return rows * kept.view(rows.shape[:2]).unsqueeze(-1)

    return mix


def mean_over_tokens() -> Callable[[Tensor], Tensor]:
    return lambda rows: rows + rows.mean(1, keepdim=True)


MIXTURES = {
    "batch-norm": statistics_of_the_batch,
    "capacity": experts_with_capacity,
    "mean": mean_over_tokens,
}


def mixing_gpt2(mixture: str, block: int) -> Any:
    model = small_gpt2(layers=2)
    model.transformer.h[block].mlp = Mixing(model.transformer.h[block].mlp, MIXTURES[mixture]()).eval()
    return model


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_operation_across_rows_is_found(mixture: str, block: int) -> None:
    proof = proof_of(mixing_gpt2(mixture, block))
    assert proof.resume is None
    assert proof.rows is not None
    assert proof.rows.startswith(("rows without a fault changed in ", "a fault in "))
    assert "in front of block" in proof.rows or "in block" in proof.rows or "instead of" in proof.rows
    assert proof.head == proof.rows


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_campaign_across_rows_equals_the_plain_one(mixture: str) -> None:
    assert_same_campaign(mixing_gpt2(mixture, 1), {"resume"})


@pytest.mark.parametrize("mixture", ["mean"])
def test_fast_alone_is_refused_across_rows(mixture: str) -> None:
    with pytest.raises(CheckRefusedError, match=r"run\.engine: got 'fast', but it would not be exact here: "):
        campaign(mixing_gpt2(mixture, 1), "fast")


def test_a_resumed_pass_that_is_not_exact_is_found() -> None:
    """What the last block adds depends on whether the first one was computed in this pass."""
    model, computed = small_gpt2(), [False]
    model.register_forward_pre_hook(lambda *_: computed.__setitem__(0, False))
    model.transformer.h[0].ln_1.register_forward_hook(lambda *_: computed.__setitem__(0, True))
    model.lm_head.register_forward_hook(lambda module, args, output: output + float(not computed[0]))
    proof = proof_of(model)
    assert proof.chain is None
    assert re.match(r"a fault in \w+ of layer [12]: .*output", str(proof.resume))
    assert_same_campaign(model, {"plain"})


def test_rows_that_change_while_runs_are_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the proof did not see: the runs of that pass are executed one by one."""
    plain = reproducible(campaign(small_gpt2(), "plain"))
    own, calls = fast_engine.FastEngine._logits, [0]

    def logits(engine: Any, wave: Any, rows: Tensor, hidden: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > 3:
            raise fast_engine.EngineMismatchError("rows without a fault changed in the head")
        return own(engine, wave, rows, hidden)

    proofs: list[Proof] = []
    real = prove

    def proved(*args: Any) -> Proof:
        calls[0] = -(10**6)
        proofs.append(real(*args))
        calls[0] = 3
        return proofs[-1]

    monkeypatch.setattr(fast_engine.FastEngine, "_logits", logits)
    monkeypatch.setattr("experiments.engine.proofs.prove", proved)
    results = campaign(small_gpt2(), "auto")
    assert proofs[0].rows is None
    assert {result.execution for result in results} == {"resume"}
    assert reproducible(results) == plain


# --------------------------------------------------------------------------------------------- found wanting


def shared_among_blocks() -> Any:
    """Return a model whose last block reads what the first one left in a mapping, as keys that layers share."""
    model, left = small_gpt2(), dict[str, Tensor]()

    def keep(rows: Tensor) -> Tensor:
        left["rows"] = rows
        return rows

    model.register_forward_pre_hook(lambda *_: left.clear())
    model.transformer.h[0].mlp = Mixing(model.transformer.h[0].mlp, keep).eval()
    model.transformer.h[2].mlp = Mixing(model.transformer.h[2].mlp, lambda rows: rows + left["rows"]).eval()
    return model


def test_blocks_that_read_more_than_the_one_before() -> None:
    model = shared_among_blocks()
    proof = proof_of(model)
    assert proof.chain is None
    assert "KeyError" in str(proof.resume)
    assert_same_campaign(model, {"plain"})


class InMapping(nn.Module):
    """A block whose hidden state comes and goes in a mapping."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return {"rows": self.own(hidden["rows"] if isinstance(hidden, dict) else hidden, *args, **kwargs)}


def test_blocks_whose_hidden_state_is_no_tensor() -> None:
    model = small_gpt2(layers=2)
    model.transformer.h = nn.ModuleList([InMapping(block) for block in model.transformer.h])
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: (args[0]["rows"],))
    proof = proof_of(model)
    assert proof.chain is None
    assert "a block was given dict" in str(proof.resume)
    assert_same_campaign(model, {"plain"})


def test_a_later_input_that_is_too_short() -> None:
    batches = [{"input_ids": tokens(1, 24)}, {"input_ids": tokens(1, 12)}]
    model = small_gpt2(layers=2)
    fast = campaign(model, "auto", batches, run=RunConfig(batch_runs=1))
    assert reproducible(fast) == reproducible(campaign(model, "plain", batches))


def test_inputs_of_several_lengths() -> None:
    batches = [{"input_ids": tokens(1, 24)}, {"input_ids": tokens(2, 17)}, padded("left", 31)]
    model = small_gpt2(layers=2)
    fast = campaign(model, "auto", batches=batches, injection_bit=20)
    # The proof finds out for each length whether changed rows alone are exact: the products of this machine decide.
    assert {result.execution for result in fast} <= {"rows", "resume"}
    assert reproducible(fast) == reproducible(
        campaign(small_gpt2(layers=2), "plain", batches=batches, injection_bit=20)
    )


# --------------------------------------------------------------------------------------------- the head


def test_a_head_in_pieces_that_is_not_exact_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_gpt2(layers=2, vocab_size=9000)
    assert proof_of(model).head is None
    own = WideLinear._pieces

    def off(self: WideLinear, *args: Any) -> Tensor:
        output = own(self, *args)
        integer_view(output)[..., 8999] ^= 1
        return output

    monkeypatch.setattr(WideLinear, "_pieces", off)
    proof = proof_of(model)
    assert (proof.resume, proof.rows) == (None, None)
    assert proof.head is not None
    assert "rows without a fault changed in the head" in proof.head
    assert_same_campaign(model, {"rows"}, injection_bit=20)


def test_a_head_that_is_not_exact_in_rows_without_control_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_gpt2(layers=2, vocab_size=9000)
    own = WideLinear._pieces

    def off(self: WideLinear, given_rows: Tensor, *args: Any) -> Tensor:
        output = own(self, given_rows, *args)
        output.flatten(0, -2)[0] += 0.5
        return output

    monkeypatch.setattr(WideLinear, "_pieces", off)
    proof = proof_of(model)
    assert proof.rows is None
    assert "instead of" in str(proof.head)


# --------------------------------------------------------------------------------------------- detectors of users


@pytest.fixture
def _registry() -> Iterator[None]:
    with registrations_undone():
        yield


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, "detector mine judges whole layers"),
        ({"proved": False, "per_group": True}, "detector mine looks behind the fault"),
    ],
)
def test_a_detector_of_a_user_sees_whole_layers(attributes: dict[str, Any], reason: str) -> None:
    class Mine(Detector):
        name, needs, statement, cost = "mine", frozenset({"out"}), "outputs are below 3", "d"

        def judge(self, state: AttentionState, baseline: Any) -> Verdict:
            return Verdict(self.name, state.out.shape[2], int((state.out.abs() > 3).any(-1).any(1).sum()))

    for name, value in attributes.items():
        setattr(Mine, name, value)
    register_detector(Mine)
    detect = {"detectors": ["mine", "finite"]}
    proof = proof_of(small_gpt2(), **detect)
    assert proof.resume is None
    assert str(proof.rows).startswith(reason)
    assert_same_campaign(small_gpt2(), {"resume"}, detect=DetectConfig(**detect))


@pytest.mark.usefixtures("_registry")
def test_a_detector_that_wrongly_claims_to_judge_groups_is_found() -> None:
    @register_detector
    class Wrong(Detector):
        name, needs, statement, cost = "wrong", frozenset({"out"}), "the heads of a call sum to little", "d"
        per_group = True

        def judge(self, state: AttentionState, baseline: Any) -> Verdict:
            return Verdict(self.name, 1, 0, largest_ratio=float(state.out.double().sum().abs()))

    proof = proof_of(small_gpt2(), detectors=["wrong"])
    assert proof.resume is None
    assert "detector wrong in layer 0 says" in str(proof.rows)


# --------------------------------------------------------------------------------------------- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_proof_on_a_gpu_is_right(dtype: torch.dtype) -> None:
    """Whatever is exact there, the proof says so: what it allows is equal, and what it does not is resumed."""
    set_determinism(1)
    model = small_llama().to("cuda", dtype)
    batch = {name: tensor.cuda() for name, tensor in padded("right", LENGTH).items()}
    proof = proof_of(model, batch)
    assert proof.chain is not None, proof.resume
    if proof.rows is None:
        with opened_place(model, [batch], **FEW) as place:
            place.compare([fault for location in LOCATIONS for fault in place.draw(location, 10)])
    executions = {"rows", "resume"} if proof.rows is None else {"resume"}
    fast = campaign(model, "auto", [batch])
    assert {result.execution for result in fast} <= executions
    assert reproducible(fast) == reproducible(campaign(model, "plain", [batch]))
