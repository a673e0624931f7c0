from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import lambertw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from zoo import ZooEntry, zoo_parameters

from monitoring.performance.flops import (
    AttentionShape,
    attention_flops,
    attention_formula_gap,
    attention_shape,
    batch_shape,
    bounds_flops,
    counted_forward_flops,
    epsilon_chain_flops,
    forward_flops,
    forward_formula_gap,
    linear_flops,
    projection_flops,
)

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 50}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WITHOUT_FORMULA = ["gemma4", "deepseek_v2", "deepseek_v3", "gpt_oss", "t5", "whisper", "vit", "qwen2_vl", "qwen2_5_vl"]
SHAPE = AttentionShape(layers=3, batch=2, heads=4, kv_heads=2, queries=5, keys=7, head_dim=8, value_dim=6, hidden=20)


def gpt2(**kwargs: Any) -> nn.Module:
    return GPT2LMHeadModel._from_config(GPT2Config(**SMALL, **SPECIAL), attn_implementation="eager", **kwargs)


def llama(implementation: str = "eager") -> nn.Module:
    config = LlamaConfig(**SMALL, **SPECIAL, num_key_value_heads=2, intermediate_size=48, head_dim=16)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation)


def bert(model: Any = BertForMaskedLM) -> nn.Module:
    config = BertConfig(**SMALL, pad_token_id=2, intermediate_size=48)
    return model._from_config(config, attn_implementation="eager")


def token_ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def counted(model: nn.Module, ids: torch.Tensor) -> dict[str, dict[Any, int]]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_flop_counts()


def batched_products(counts: dict[str, dict[Any, int]]) -> int:
    """The matmuls of two activations; products with a weight are mm and addmm."""
    return sum(flops for operation, flops in counts["Global"].items() if "bmm" in str(operation))


@pytest.mark.parametrize("build", [gpt2, llama, bert], ids=["gpt2", "llama-gqa", "bert"])
def test_attention_and_forward_formulas_agree_with_the_counter(build: Any) -> None:
    model, ids = build(), token_ids()
    counts = counted(model, ids)
    shape = attention_shape(model, ids)
    assert batched_products(counts) > 0
    assert attention_flops(shape) == pytest.approx(batched_products(counts), rel=0.01)
    assert forward_flops(model, ids) == pytest.approx(sum(counts["Global"].values()), rel=0.01)
    assert counted_forward_flops(model, {"input_ids": ids}) == sum(counts["Global"].values())


@pytest.mark.parametrize("build", [gpt2, llama], ids=["gpt2", "llama-gqa"])
def test_projection_formula_agrees_with_the_counter(build: Any) -> None:
    model, ids = build(), token_ids()
    cores = [name for name, _ in model.named_modules() if name.endswith((".attn", ".self_attn"))]
    counts = counted(model, ids)
    in_cores = sum(sum(counts[f"{type(model).__name__}.{name}"].values()) for name in cores)
    shape = attention_shape(model, ids)
    assert len(cores) == shape.layers
    assert projection_flops(shape) == pytest.approx(in_cores - attention_flops(shape), rel=0.01)


@pytest.mark.parametrize("entry", zoo_parameters())
def test_every_architecture_has_the_right_number_or_a_stated_reason(entry: ZooEntry) -> None:
    model = entry.build()
    inputs = entry.inputs(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    if attention_formula_gap(model) is None and entry.kind != "vision":
        shape = attention_shape(model, inputs)
        assert attention_flops(shape) == pytest.approx(batched_products(counter.get_flop_counts()), rel=0.01)
    if forward_formula_gap(model) is None:
        assert forward_flops(model, inputs) == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (forward_formula_gap(model) is not None) == (entry.name.split("-")[0] in WITHOUT_FORMULA)


def test_pooler_is_charged_one_row_a_sequence() -> None:
    model, ids = bert(BertModel), token_ids()
    assert forward_flops(model, ids) == pytest.approx(counted_forward_flops(model, ids), rel=0.01)
    pooler = 2 * model.pooler.dense.weight.numel()
    assert linear_flops(model, 24) - linear_flops(model, 24, sequences=2) == 22 * pooler


def test_formula_with_a_cache_counts_all_keys() -> None:
    model, ids = llama(), token_ids()
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache)
    formula = forward_flops(model, ids[:, -1:], keys=ids.shape[1])
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_by_hand() -> None:
    rectangle = 2 * 4 * 5 * 7
    assert attention_flops(SHAPE) == 3 * (2 * rectangle * 8 + 2 * rectangle * 6)
    by_head = 2 * (2 * 5) * 20 * (4 * 8 + 2 * 8 + 2 * 6 + 4 * 6)
    assert projection_flops(SHAPE) == 3 * by_head
    assert attention_flops(dataclasses.replace(SHAPE, layers=0)) == 0


class Counted:
    """A number that counts the operations done to it: the oracle of the epsilon chain's formula."""

    operations = 0

    def __init__(self, value: float) -> None:
        self.value = value

    def _combine(self, other: Counted | float, operation: Any) -> Any:
        Counted.operations += 1
        result = operation(self.value, other.value if isinstance(other, Counted) else other)
        return result if isinstance(result, bool) else Counted(result)

    def __add__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: a / b)

    def __gt__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: a > b)

    def __le__(self, other: Any) -> Any:
        return self._combine(other, lambda a, b: a <= b)

    def exp(self) -> Counted:
        Counted.operations += 1
        return Counted(math.exp(self.value))


def epsilon_chain_scalar(a: list[Counted], w: list[Counted]) -> tuple[list[float], float, list[float]]:
    """T2 on one row, one operation at a time: lower bounds, E, upper bounds."""
    n = len(a)
    top = 0
    for j in range(1, n):
        if a[j] > a[top]:
            top = j
    rest = [a[j] for j in range(n) if j != top]
    second = rest[0]
    for value in rest[1:]:
        if value > second:
            second = value
    mean = functools.reduce(operator.add, a) / n
    total = functools.reduce(operator.add, [weight * value for weight, value in zip(w, a, strict=True)])
    epsilon, gap = a[top] - total, a[top] - second
    growth = gap.exp()
    lower, middle = gap / (growth + 1.0), gap * (1.0 - w[top])
    upper = a[top] - mean
    lambert = float(lambertw((n - 1) / math.e).real)  # from a table
    near = gap <= lambert + 1.0
    spread = (Counted(1.0) / growth) * (n - 1.0)
    far = (spread * gap) / (spread + 1.0)
    upper_two = Counted(lambert) if near else far
    _ = lower <= epsilon, middle <= epsilon, epsilon <= upper, epsilon <= upper_two
    return [lower.value, middle.value], epsilon.value, [upper.value, upper_two.value]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
def test_epsilon_chain_formula_counts_a_scalar_evaluation(logits: list[float]) -> None:
    exponentials = [math.exp(value) for value in logits]
    weights = [value / sum(exponentials) for value in exponentials]
    Counted.operations = 0
    lower, epsilon, upper = epsilon_chain_scalar(list(map(Counted, logits)), list(map(Counted, weights)))
    assert Counted.operations == epsilon_chain_flops(rows=1, keys=len(logits))
    assert max(lower) - 1e-12 <= epsilon <= min(upper) + 1e-12  # what was counted is the chain


def test_bounds_flops_is_the_chain_on_every_row() -> None:
    assert bounds_flops(SHAPE) == epsilon_chain_flops(3 * 2 * 4 * 5, 7)
    assert bounds_flops(SHAPE) == 3 * 2 * 4 * 5 * (5 * 7 + 14)


@pytest.mark.parametrize("held", ["input_ids", "decoder_input_ids"])
def test_batch_shape_of_mappings(held: str) -> None:
    assert batch_shape({held: token_ids(3, 4)}) == (3, 4)
    assert batch_shape({"input_ids": None, "inputs_embeds": torch.zeros(3, 4, 8)}) == (3, 4)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \['labels'\], allowed: .* mapping with 'input_ids' or"):
        batch_shape({"labels": token_ids()})
    with pytest.raises(ValueError, match=r"got torch.Size\(\[12\]\), allowed"):
        batch_shape(token_ids()[0])
    with pytest.raises(TypeError, match=r"got Linear without a .config"):
        attention_shape(nn.Linear(2, 2), token_ids())
    with pytest.raises(ValueError, match=r"keys: got 0, allowed: an integer >= 1"):
        dataclasses.replace(SHAPE, keys=0)
    with pytest.raises(ValueError, match=r"head_dim: got 8.0, allowed: an integer"):
        dataclasses.replace(SHAPE, head_dim=8.0)
    with pytest.raises(ValueError, match=r"kv_heads: got 3, allowed: a divisor of heads=4"):
        dataclasses.replace(SHAPE, kv_heads=3)
    with pytest.raises(ValueError, match=r"rows=-1, keys=4, allowed: rows >= 0"):
        epsilon_chain_flops(-1, 4)
    with pytest.raises(ValueError, match=r"got attention implementation 'sdpa'.*allowed: 'eager'"):
        counted_forward_flops(llama("sdpa"), token_ids())


def test_architectures_without_a_formula_are_refused_not_miscounted() -> None:
    small = {**SMALL, "intermediate_size": 48}
    experts = MixtralForCausalLM(MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2, **SPECIAL))
    assert attention_formula_gap(experts) is None
    with pytest.raises(ValueError, match=r"forward_flops: model.layers.0.mlp.* is a weight of Mixtral"):
        forward_flops(experts, token_ids())
    shared = AlbertModel(AlbertConfig(**small, embedding_size=8, **SPECIAL))
    assert forward_formula_gap(shared) == "2 layers share the weights of 1"
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 2, "num_layers": 1, "d_ff": 16, "vocab_size": 50}
    pair = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match=r"an encoder-decoder has self and cross attention"):
        attention_shape(pair, token_ids())
    hybrid = llama()
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"layers of type 'linear_attention' are not plain attention"):
        attention_shape(hybrid, token_ids())
