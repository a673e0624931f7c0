from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from micro_campaign import micro_gpt2
from torch import Tensor, nn

from experiments.config import ExperimentConfig
from experiments.errors import CheckRefusedError
from experiments.passes.baseline import compute_baseline
from experiments.passes.gate import control_run, equivalence_gate
from experiments.passes.subject import Subject
from experiments.runner import CompleteExperimentRunner
from fault_injection import LOCATIONS, is_patched
from fault_injection.attention import instrument
from fault_injection.attention.discovery import eager_function
from fault_injection.faults import injector

TOKENS = torch.arange(3, 23).view(2, 10)


@pytest.fixture
def subject() -> Iterator[Subject]:
    with Subject(micro_gpt2(layers=3), "causal") as subject:
        yield subject


def batch_of(subject: Subject) -> dict[str, Tensor]:
    return subject.to_device({"input_ids": TOKENS})


def run_control(subject: Subject) -> None:
    batch = batch_of(subject)
    baseline = compute_baseline(subject, batch, [])
    control_run(subject, batch, baseline.evaluation, baseline.sites)


def disturb(monkeypatch: pytest.MonkeyPatch, layers: set[int], change: Callable[[Tensor], Tensor]) -> None:
    """Let the attention of some layers come out otherwise when, and only when, it goes through the patch."""

    def disturbed(module: nn.Module) -> Callable[..., Any] | None:
        function = eager_function(module)
        if function is None or module.layer_idx not in layers:
            return function

        def other(*args: Any, **kwargs: Any) -> Any:
            out, weights = function(*args, **kwargs)
            return change(out), weights

        return other

    monkeypatch.setattr(instrument, "eager_function", disturbed)


def one_ulp(out: Tensor) -> Tensor:
    return torch.nextafter(out, torch.tensor(torch.inf))


# ------------------------------------------------------------------------------------------------- gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_sound_patch_passes_and_the_model_is_as_before(dtype: torch.dtype) -> None:
    with Subject(micro_gpt2().to(dtype), "causal") as subject:
        batch = batch_of(subject)
        before = subject.forward(batch).output
        equivalence_gate(subject, batch)
        run_control(subject)
        assert torch.equal(subject.forward(batch).output, before)
        assert not any(module._forward_hooks for module in subject.model.modules())


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_ulp_in_one_layer_is_refused_and_the_layer_is_named(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    disturb(monkeypatch, {layer}, one_ulp)
    with pytest.raises(
        CheckRefusedError, match=rf"the first layer that differs is transformer\.h\.{layer}\.attn\. The"
    ):
        equivalence_gate(subject, batch_of(subject))


def test_of_several_layers_that_differ_the_first_is_named(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, {1, 2}, one_ulp)
    with pytest.raises(CheckRefusedError, match=r"the first layer that differs is transformer\.h\.1\.attn"):
        equivalence_gate(subject, batch_of(subject))


def test_one_wrong_bit_in_one_number_is_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(out: Tensor) -> Tensor:
        changed = out.clone()
        changed.view(torch.int32)[..., 0, 0, 0] ^= 1 << 20
        return changed

    disturb(monkeypatch, {2}, flip)
    with pytest.raises(CheckRefusedError, match=r"transformer\.h\.2\.attn"):
        equivalence_gate(subject, batch_of(subject))


def test_nan_in_the_patched_pass_alone_is_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, {1}, lambda out: out * torch.nan)
    with pytest.raises(CheckRefusedError, match=r"transformer\.h\.1\.attn"):
        equivalence_gate(subject, batch_of(subject))


def test_a_difference_behind_the_attention_is_told_as_such(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = itertools.cycle([0.0, 1e-3])
    subject.model.lm_head.register_forward_hook(lambda module, inputs, output: output + next(passes))
    with pytest.raises(CheckRefusedError, match="none of the attention layers"):
        equivalence_gate(subject, batch_of(subject))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_clean_model_that_is_not_finite_is_refused(value: float) -> None:
    model = micro_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = value
    with (
        Subject(model, "causal") as subject,
        pytest.raises(CheckRefusedError, match=r"fault-free output of GPT2LMHeadModel in torch\.float32 is not finite"),
    ):
        equivalence_gate(subject, batch_of(subject))


def test_the_gate_leaves_no_hooks_and_the_patch_in_place_when_it_refuses(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(monkeypatch, {0}, one_ulp)
    with pytest.raises(CheckRefusedError):
        equivalence_gate(subject, batch_of(subject))
    monkeypatch.undo()
    assert is_patched(subject.model)
    assert not any(module._forward_hooks for module in subject.model.modules())
    equivalence_gate(subject, batch_of(subject))


# ------------------------------------------------------------------------------------------------- control run


@pytest.mark.parametrize("location", LOCATIONS)
def test_an_injection_that_changes_more_than_its_bits_is_refused(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    real = injector.Injector.on

    def leaky(self: Any, at: str, tensor: Tensor, call: Any) -> Tensor | None:
        out = real(self, at, tensor, call)
        return out if out is None or at != location else one_ulp(out)

    monkeypatch.setattr(injector.Injector, "on", leaky)
    with pytest.raises(CheckRefusedError, match=f"control run: a fault in {location} that changes no bit changed"):
        run_control(subject)


def test_a_difference_that_is_not_in_the_loss_is_refused_too(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = injector.Injector.on

    def leaky(self: Any, at: str, tensor: Tensor, call: Any) -> Tensor | None:
        out = real(self, at, tensor, call)
        if out is None or call.core.index != 2 or at != "out":
            return out
        # The last position predicts a token that is not in the window.
        return torch.cat([out[..., :-1, :], one_ulp(out[..., -1:, :])], dim=-2)

    monkeypatch.setattr(injector.Injector, "on", leaky)
    with pytest.raises(CheckRefusedError, match="control run: a fault in out"):
        run_control(subject)


def test_a_rewriting_of_bits_that_disturbs_is_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = injector.rewrite_bits
    monkeypatch.setattr(injector, "rewrite_bits", lambda tensor, *masks: real(tensor, *masks) * (1 + 2**-20))
    with pytest.raises(CheckRefusedError, match="control run: a fault in q "):
        run_control(subject)


def test_an_injection_that_makes_nan_is_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    real = injector.rewrite_bits
    monkeypatch.setattr(injector, "rewrite_bits", lambda tensor, *masks: real(tensor, *masks) * torch.nan)
    with pytest.raises(CheckRefusedError, match="control run"):
        run_control(subject)


def test_a_pass_that_does_not_repeat_is_refused(subject: Subject) -> None:
    noise = torch.Generator().manual_seed(0)
    subject.model.lm_head.register_forward_hook(
        lambda module, inputs, output: output + 1e-3 * torch.randn((), generator=noise)
    )
    with pytest.raises(CheckRefusedError, match="control run"):
        run_control(subject)


def test_every_location_of_every_layer_is_controlled(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, int]] = []
    real = injector.Injector.on

    def noted(self: Any, at: str, tensor: Tensor, call: Any) -> Tensor | None:
        out = real(self, at, tensor, call)
        met.extend([(at, call.core.index)] if out is not None else [])
        return out

    monkeypatch.setattr(injector.Injector, "on", noted)
    run_control(subject)
    assert sorted(met) == sorted((location, layer) for location in LOCATIONS for layer in range(3))


# ------------------------------------------------------------------------------------------------- before any run


@pytest.mark.parametrize("broken", ["gate", "control"])
def test_nothing_runs_and_the_model_is_given_back_when_a_check_refuses(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model = micro_gpt2()
    if broken == "gate":
        disturb(monkeypatch, {1}, one_ulp)
        # The patch itself is checked when it is made, and refuses first if it can.
        monkeypatch.setattr(instrument, "bitwise_equal_outputs", lambda *_: True)
    else:
        real = injector.rewrite_bits
        monkeypatch.setattr(injector, "rewrite_bits", lambda tensor, *masks: one_ulp(real(tensor, *masks)))
    runner = CompleteExperimentRunner(ExperimentConfig(num_runs=2))
    with pytest.raises(CheckRefusedError, match="equivalence gate" if broken == "gate" else "control run"):
        runner.run_all(model, [TOKENS])
    assert runner.records == []
    assert not is_patched(model)


def test_masked_and_encoder_models_pass_too() -> None:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    torch.manual_seed(0)
    batches = {"masked": {"input_ids": TOKENS, "labels": TOKENS}, "encoder": {"input_ids": TOKENS}}
    models = {"masked": transformers.BertForMaskedLM(config), "encoder": transformers.BertModel(config)}
    for family, model in models.items():
        with Subject(model.eval(), family) as subject:
            batch = subject.to_device(batches[family])
            equivalence_gate(subject, batch)
            baseline = compute_baseline(subject, batch, [])
            control_run(subject, batch, baseline.evaluation, baseline.sites)
