"""Checks of the zoo itself: what its entries claim about each model, measured on the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import AttentionInterface
from zoo import ZOO, ZooEntry, logits_of, zoo_parameters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ARCHITECTURES = {
    *(
        "bert",
        "bloom",
        "deepseek_v2",
        "deepseek_v3",
        "distilbert",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
    ),
    *("gemma4_text", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "internlm3", "llama", "mistral"),
    *(
        "modernbert",
        "mpt",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3",
        "roberta",
    ),
    *("starcoder2", "t5", "vit", "whisper"),
}


class SoftmaxRecord(TorchFunctionMode):
    """Notes every attention softmax: the innermost module that runs it, the logits and the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        # The softmax of a router is over (tokens, experts), two dimensions.
        if getattr(function, "__name__", "") == "softmax" and args[0].dim() > 2:
            self.seen.append((self.running[-1], args[0], out))
        return out

    def enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self.running.append(name)

    def leave(self, *_: Any) -> None:
        self.running.pop()


@contextmanager
def recorded(model: nn.Module) -> Iterator[SoftmaxRecord]:
    record = SoftmaxRecord()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(record.enter(name)).remove)
            stack.callback(module.register_forward_hook(record.leave).remove)
        stack.enter_context(record)
        yield record


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs))


def configurations(model: nn.Module) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def decoders() -> list[Any]:
    return [parameter for parameter in zoo_parameters(kind="decoder") if "padded" not in str(parameter.id)]


def test_every_architecture_of_the_coverage_table_is_there() -> None:
    assert len(ZOO) >= 34
    models: list[Any] = [entry.build() for entry in ZOO.values()]
    assert {model.config.model_type for model in models} == ARCHITECTURES


@pytest.mark.parametrize("entry", zoo_parameters())
def test_the_model_is_eager_float32_and_in_eval_mode(entry: ZooEntry) -> None:
    model = entry.build()
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {config._attn_implementation for config in configurations(model)} == {"eager"}


@pytest.mark.parametrize("entry", zoo_parameters())
def test_cores_and_calls_are_those_that_evaluate_a_softmax(entry: ZooEntry) -> None:
    model = entry.build()
    with recorded(model) as record:
        forward(model, entry.inputs(model))
    assert len(Counter(name for name, _, _ in record.seen)) == entry.cores
    assert len(record.seen) == entry.calls


@pytest.mark.parametrize("entry", zoo_parameters())
def test_path_a_dispatches_every_call_and_path_r_none(entry: ZooEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatched: list[nn.Module] = []
    original = AttentionInterface.get_interface

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attention = original(self, name, default)

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            dispatched.append(module)
            return attention(module, *args, **kwargs)

        return counted

    monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)
    model = entry.build()
    forward(model, entry.inputs(model))
    expected = {"A": (entry.cores, entry.calls), "R": (0, 0)}[entry.path]
    assert (len(set(dispatched)), len(dispatched)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entry", zoo_parameters())
def test_outputs_are_finite_repeatable_and_native_in_every_dtype(entry: ZooEntry, dtype: torch.dtype) -> None:
    model = entry.build().to(dtype)
    inputs = entry.inputs(model)
    first, second = forward(model, inputs), forward(model, entry.inputs(model))
    assert first.dtype == dtype
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert {value.dtype for value in inputs.values() if value.is_floating_point()} <= {dtype}


@pytest.mark.parametrize("entry", zoo_parameters())
def test_attention_weights_are_neither_uniform_nor_one_hot(entry: ZooEntry) -> None:
    model = entry.build()
    with recorded(model) as record:
        forward(model, entry.inputs(model))
    for name, logits, weights in record.seen:
        visible = logits > torch.finfo(logits.dtype).min / 2
        kept = torch.where(visible, logits, torch.nan)
        deviation = (kept - kept.nanmean(-1, keepdim=True))[visible & (visible.sum(-1, keepdim=True) > 1)].std()
        assert 0.5 < deviation < 3.5, (name, deviation)
        assert (weights.max(-1).values < 0.9).float().mean() > 0.3, name


@pytest.mark.parametrize("entry", zoo_parameters())
def test_weights_depend_on_nothing_but_the_name(entry: ZooEntry) -> None:
    torch.manual_seed(1)
    first = entry.build()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "building moved the global generator"
    torch.manual_seed(2)
    second = entry.build()
    for tensors in ("named_parameters", "named_buffers"):
        again = dict(getattr(second, tensors)())
        for name, tensor in getattr(first, tensors)():
            assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("entry", decoders())
def test_decoders_are_causal(entry: ZooEntry) -> None:
    model = entry.build()
    inputs = entry.inputs(model)
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 1) % 80
    before, after = forward(model, inputs), forward(model, changed)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith("padded")])
def test_padding_is_invisible_to_the_tokens(name: str) -> None:
    model = ZOO[name].build()
    inputs = ZOO[name].inputs(model)
    hidden = inputs["attention_mask"] == 0
    assert 0 < int(hidden.sum()) < hidden.numel()
    changed = inputs | {"input_ids": inputs["input_ids"].masked_fill(hidden, 50)}
    before, after = forward(model, inputs), forward(model, changed)
    # The outputs of an encoder-decoder belong to other positions, none of them padding.
    seen = torch.ones(before.shape[:2], dtype=torch.bool) if "decoder_input_ids" in inputs else ~hidden
    torch.testing.assert_close(before[seen], after[seen])


def test_zoo_parameters_selects_by_path_and_kind() -> None:
    assert len(zoo_parameters("A")) + len(zoo_parameters("R")) == len(ZOO) == len(zoo_parameters())
    assert {parameter.values[0].kind for parameter in zoo_parameters(kind="encoder")} == {"encoder"}
