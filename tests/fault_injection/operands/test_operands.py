"""Where operands come from: measured on every architecture, recomputed by independent code, and never guessed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from projected_states import states_of
from torch import Tensor, nn
from zoo import ZOO, ZooEntry, zoo_parameters

from fault_injection import patched, tapped
from fault_injection.operands.finding import operand_sources
from fault_injection.operands.norms import recognised_norm
from fault_injection.operands.operand_recorder import OperandRecorder, RecordedOperand
from fault_injection.operands.operand_source import OperandSource
from fault_injection.operands.operand_tails import RotaryLayout, Tail

SHARED = "it has no {} of its own but reuses those of model.layers."
TOGETHER = "its {} are projected together with those of other calls"
UNRECOGNISED = "its {} pass through something that was not recognised"
PLAIN, TURNED = ("identity", "identity", "identity"), ("rotated", "rotated", "identity")
NORMED = "normed, rotated"

# What each architecture's queries, keys and values pass through; other cores than the first where they differ.
# fmt: off
EXPECTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys([
        "gpt2", "gpt2-padded", "gpt2-inverse-layer", "gpt2-upcast", "gpt2-upcast-inverse-layer", "distilbert", "bert",
        "bert-padded", "roberta", "t5", "t5-padded", "vit", "gpt_neo", "bloom", "bloom-padded", "falcon-alibi",
        "falcon-alibi-padded", "mpt", "mpt-padded",
    ], PLAIN),
    **dict.fromkeys([
        "gpt_neox", "llama", "llama-gqa", "llama-left-padded", "internlm3", "mistral", "qwen2", "gemma", "gemma2",
        "phi", "phi3", "starcoder2", "gpt_oss", "modernbert", "falcon-rotary", "falcon-new",
    ], TURNED),
    **dict.fromkeys(["opt", "whisper"], ("scaled", "identity", "identity")),
    **dict.fromkeys(["qwen3", "gemma3", "olmo2"], (NORMED, NORMED, "identity")),
    **dict.fromkeys(["gemma4", "gemma4-shared-kv"], (NORMED, NORMED, "normed")),
    **dict.fromkeys(
        ["deepseek_v2", "deepseek_v3"],
        ("rotated", "its keys were not recognised as features of one linear module", "identity"),
    ),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl"], tuple(map(TOGETHER.format, ("queries", "keys", "values")))),
    "gptj": (UNRECOGNISED.format("queries"), UNRECOGNISED.format("keys"), "identity"),
}
# fmt: on
OTHERS = {
    ("gemma4-shared-kv", 2): (NORMED, SHARED.format("keys") + "0.self_attn", SHARED.format("values") + "0.self_attn"),
    ("gemma4-shared-kv", 3): (NORMED, SHARED.format("keys") + "1.self_attn", SHARED.format("values") + "1.self_attn"),
    **{(name, core): TURNED for name in ("qwen2_vl", "qwen2_5_vl") for core in (2, 3)},
}


def kinds(found: dict[str, OperandSource | str]) -> tuple[str, ...]:
    return tuple(s.tail.kind if isinstance(s, OperandSource) else s for s in found.values())


@pytest.mark.parametrize("entry", zoo_parameters())
def test_the_coverage_of_every_architecture(entry: ZooEntry, zoo_model: Any) -> None:
    model = zoo_model(entry.name)
    for core, found in enumerate(operand_sources(model, entry.inputs(model)).values()):
        assert kinds(found) == OTHERS.get((entry.name, core), EXPECTED[entry.name])
        for source in found.values():
            if isinstance(source, OperandSource):
                assert isinstance(source.norm, str) == (entry.name == "olmo2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "opt", "qwen3", "phi", "falcon-new", "deepseek_v2", "gptj"])
def test_the_coverage_does_not_depend_on_the_format(name: str, dtype: torch.dtype, zoo_model: Any) -> None:
    model = zoo_model(name, dtype)
    assert {kinds(found) for found in operand_sources(model, ZOO[name].inputs(model)).values()} == {EXPECTED[name]}


@pytest.mark.parametrize("name", ["gpt2", "bloom", "falcon-new", "phi3", "t5", "deepseek_v3", "llama-gqa", "whisper"])
def test_what_is_recorded_is_what_the_weights_make_of_the_input(name: str, zoo_model: Any) -> None:
    model = zoo_model(name)
    inputs = ZOO[name].inputs(model)
    sources = operand_sources(model, inputs)
    for state in states_of(model, inputs):
        assert state.projected
        for operand, record in state.projected.items():
            source = sources[state.name][operand]
            assert isinstance(source, OperandSource)
            weight, bias = source.projection.weight().double().numpy(), source.projection.bias()
            expected = np.einsum("btd,fd->btf", record.hidden.double().numpy(), weight)
            expected += 0 if bias is None else bias.double().numpy()
            batch, rows, _ = expected.shape
            expected = expected.reshape(batch, rows, source.heads, -1).transpose(0, 2, 1, 3)
            np.testing.assert_allclose(record.projected.numpy(), expected, atol=1e-5)
            read = getattr(state, {"q": "query", "k": "key", "v": "value"}[operand])
            assert read.shape == record.projected.shape


def test_contiguous_features_are_a_view(zoo_model: Any) -> None:
    model = zoo_model("gpt2")
    state = states_of(model, ZOO["gpt2"].inputs(model))[0]
    assert state.projected is not None
    storages = {record.projected.untyped_storage().data_ptr() for record in state.projected.values()}
    assert len(storages) == 1


# --- tails ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 4])
def test_F16_rotation_against_complex_numbers(interleaved: bool, start: int) -> None:
    angles = torch.linspace(0, 9, 10, dtype=torch.float64).view(1, 5, 2)
    layout = RotaryLayout(start, 4, interleaved, "single")
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    found = Tail(rotation=layout).expected(x, (angles.cos(), angles.sin()), torch.float64)
    turned = x.numpy().copy()
    for pair in range(2):
        first = start + (2 * pair if interleaved else pair)
        second = first + (1 if interleaved else 2)
        z = (turned[..., first] + 1j * turned[..., second]) * np.exp(1j * angles[..., pair].numpy())
        turned[..., first], turned[..., second] = z.real, z.imag
    np.testing.assert_allclose(found.value.numpy(), turned, atol=1e-14)
    untouched = torch.ones(8, dtype=torch.bool)
    untouched[start : start + 4] = False
    assert bool((found.tolerance[..., untouched] == 0).all())
    assert layout.amplitude((angles.cos(), angles.sin())) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_F16_tolerance_holds_and_is_nearly_attained(dtype: torch.dtype, wide: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(2, 4, 200, 16, generator=generator) * 2.0 ** torch.randint(-9, 9, (200, 1))).to(dtype)
    angles = (torch.rand(1, 200, 16, generator=generator) * 6).to(dtype)
    cos, sin = angles.cos(), angles.sin()
    compute = x.float() if wide and dtype != torch.float64 else x
    half = torch.cat((-compute[..., 8:], compute[..., :8]), -1)
    rotated = (compute * cos[:, None].to(compute) + half * sin[:, None].to(compute)).to(dtype)
    found = Tail(rotation=RotaryLayout(0, 16, False, "halves")).expected(x, (cos, sin), dtype)
    ratio = float(((rotated.double() - found.value).abs() / found.tolerance).max())
    # In float64 the checker rounds just as what it checks; computing in float32 rounds less than is allowed.
    assert (0.0 if dtype == torch.float64 else 0.2 if wide else 0.8) <= ratio <= 1
    scaled = (x * 0.3).to(dtype)
    found = Tail(factor=0.3).expected(x, None, dtype)
    assert bool(((scaled.double() - found.value).abs() <= found.tolerance).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e3])
def test_F16_norms_hold_in_every_format(dtype: torch.dtype, scale: float) -> None:
    for module in (
        transformers.models.llama.modeling_llama.LlamaRMSNorm(64),
        transformers.models.gemma.modeling_gemma.GemmaRMSNorm(64),
        transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm(64),
    ):
        torch.manual_seed(1)
        nn.init.normal_(module.weight, std=2)
        module = module.to(dtype)
        x = (torch.randn(2, 4, 50, 64) * scale).to(dtype)
        with torch.no_grad():
            y = module(x)
        norm = recognised_norm(module, x, y)
        assert norm is not None
        assert norm.unit_gain == (1.0 if "Gemma" in type(module).__name__ else 0.0)
        found = Tail(norm=norm).expected(x, None, dtype)
        assert bool(((y.double() - found.value).abs() <= found.tolerance).all())


def test_a_rotation_that_is_missing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rotation: got None, allowed \(cos, sin\)"):
        Tail(rotation=RotaryLayout(0, 4, False, "single")).expected(torch.ones(1, 1, 1, 4), None, torch.float32)


# --- norms ---------------------------------------------------------------------------------------------------------


def test_norms_are_recognised_by_what_they_compute() -> None:
    x = torch.randn(3, 5, 32) + 2
    layer = nn.LayerNorm(32)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    norm = recognised_norm(layer, x, layer(x))
    assert norm is not None
    assert norm.centred
    expected = norm.normalised(x.double()) * norm.gain() + norm.offset()
    torch.testing.assert_close(expected, layer(x).double(), atol=1e-5, rtol=1e-5)
    assert recognised_norm(layer, x, layer(x) * 1.01) is None
    assert recognised_norm(layer, x, x) is None
    assert recognised_norm(nn.Dropout(), x, x) is None


# --- toys: nothing is guessed --------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two heads of width 4; ``alter`` is applied to the queries on their way."""

    def __init__(self, alter: Any = lambda queries: queries) -> None:
        super().__init__()
        self.attention = ToyAttention(alter)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(x)
        assert isinstance(out, Tensor)
        return out


class ToyAttention(nn.Module):
    def __init__(self, alter: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = 0.3
        self.inner = nn.LayerNorm(4)
        self.alter = alter

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q = self.inner(q) if self.alter == "normed" else self.alter(q)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return (weights @ v).transpose(1, 2).flatten(2)


def toy_kinds(alter: Any, positions: int = 5) -> tuple[str, ...]:
    torch.manual_seed(0)
    return kinds(operand_sources(Toy(alter), {"x": torch.randn(2, positions, 8)})["attention"])


def test_factors_are_measured() -> None:
    assert toy_kinds(lambda q: q) == PLAIN
    assert toy_kinds(lambda q: q * 0.3) == ("scaled", "identity", "identity")
    assert toy_kinds(lambda q: q / 2) == ("scaled", "identity", "identity")


@pytest.mark.parametrize(
    "alter",
    [
        lambda q: q.clamp(-300, 300),
        lambda q: q * 0.31,
        lambda q: q + 1e-3,
        lambda q: -q,
        lambda q: q.flip(-1) + q,
        lambda q: torch.where(q.abs() < 1e-2, 0.0, q),
        "normed",
    ],
    ids=["clipped", "other factor", "shifted", "negated", "mixed", "thresholded", "layer norm"],
)
def test_what_is_altered_has_a_reason(alter: Any) -> None:
    assert toy_kinds(alter) == (UNRECOGNISED.format("queries"), "identity", "identity")


def test_one_position_proves_nothing() -> None:
    assert "one position only" in toy_kinds(lambda q: q, positions=1)[0]


def test_quantised_weights_have_a_reason() -> None:
    model = Toy()
    weight = model.attention.q_proj.weight.detach()

    class Quantised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).t()

    model.attention.q_proj = Quantised(8, 8)
    model.attention.q_proj.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)
    found = operand_sources(model, {"x": torch.randn(2, 5, 8)})["attention"]["q"]
    assert found == "the projection of its queries is quantised (torch.int8)"


# --- the model is left as it was; nothing is kept -------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[Any]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, m.__dict__.get("forward"))
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "falcon-new"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = ZOO[name].build()
    inputs = ZOO[name].inputs(model)
    before, versions = hooks_of(model), [p._version for p in model.parameters()]
    found = operand_sources(model, inputs)
    assert operand_sources(model) is found
    assert operand_sources(model, inputs) is not found
    assert hooks_of(model) == before
    assert [p._version for p in model.parameters()] == versions
    with pytest.raises((TypeError, ValueError)):
        operand_sources(model, {**inputs, "nonsense": 1, "input_ids": "text"})
    assert hooks_of(model) == before


def test_the_result_does_not_keep_the_model() -> None:
    model = ZOO["gpt2"].build()
    operand_sources(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


class Tap:
    """Calls ``on_out(call)`` when the output of an attention call is there."""

    locations = frozenset({"out"})
    layers = None

    def __init__(self, on_out: Any) -> None:
        self.on_out = on_out

    def on(self, location: str, tensor: Tensor, call: Any) -> None:
        self.on_out(call)


def test_the_recorder_forgets_after_every_call_and_unhooks_after_an_exception(zoo_model: Any) -> None:
    model = zoo_model("llama")
    inputs = ZOO["llama"].inputs(model)
    recorder = OperandRecorder(model, operand_sources(model, inputs))
    kept: list[weakref.ref[Tensor]] = []
    cores: list[Any] = []

    def look(call: Any) -> None:
        record = recorder.recorded(call.core)
        assert set(record) == {"q", "k", "v"}
        assert isinstance(record["q"], RecordedOperand)
        assert record["q"].rotation is not None
        kept.append(weakref.ref(record["q"].hidden.untyped_storage()))
        cores.append(call.core)
        raise KeyError("stop")

    before = hooks_of(model)
    with patched(model), torch.no_grad():
        hooked = hooks_of(model)
        with recorder, tapped(model, Tap(look)):
            with pytest.raises(KeyError, match="stop"):
                model(**inputs)
            assert recorder.recorded(cores[0]) == {}
        assert hooks_of(model) == hooked
    assert hooks_of(model) == before


def test_cached_keys_are_longer_than_what_was_projected(zoo_model: Any) -> None:
    model = zoo_model("llama-gqa")
    recorder = OperandRecorder(model, operand_sources(model, ZOO["llama-gqa"].inputs(model)))
    lengths: list[tuple[int, int]] = []

    def look(call: Any) -> None:
        record = recorder.recorded(call.core)
        lengths.append((record["q"].projected.shape[2], record["k"].projected.shape[2]))

    with patched(model), torch.no_grad(), recorder, tapped(model, Tap(look)):
        model.generate(torch.arange(3, 9)[None], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert lengths == [(6, 6), (6, 6), (1, 1), (1, 1)]
