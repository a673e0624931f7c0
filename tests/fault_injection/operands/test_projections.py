"""The layouts that are measured, against what the projections compute, and everything put back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import ZOO, ZooEntry, logits_of, zoo_parameters
from zoo_configs import SPECIES

from fault_injection import AttentionCall, monkey_patch_model, patched, tapped, unpatch_model
from fault_injection.attention.instrument import is_patched
from fault_injection.operands.projections import KeyValueProjections, Projection, _SparseCode, discover_projections

# Where keys are normalised (or, for gpt_oss, scaled with the rotation), the sites are no plain rows of the weight.
NORMALISED_KEYS = {"qwen3", "gemma3", "gemma4", "gemma4-shared-kv", "olmo2", "gpt_oss"}
NORMALISED_VALUES = {"gemma4", "gemma4-shared-kv"}
FUSED = ["gpt2", "gpt_neox", "bloom", "falcon-rotary", "falcon-alibi", "falcon-new", "mpt", "modernbert", "phi3"]


class FirstTokens:
    """Keeps k and v at position 0 of the first call of every core: (core name, location) -> (head, channel)."""

    locations = frozenset({"k", "v"})
    layers = None

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Tensor] = {}

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        self.seen.setdefault((call.core.name, location), tensor[0, :, 0].clone())


def sites(model: nn.Module, inputs: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    tap = FirstTokens()
    with torch.no_grad(), tapped(model, tap):
        model(**inputs)
    return tap.seen


def pairs_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, KeyValueProjections]:
    found = discover_projections(model, inputs)
    return {name: pair for name, pair in found.items() if isinstance(pair, KeyValueProjections)}


def source_of(model: nn.Module, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the vector that ``module`` is given first, (inputs,)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[0]


def rows_of(found: dict[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    return {name: (pair.key.rows.tolist(), pair.value.rows.tolist()) for name, pair in found.items()}


@pytest.mark.parametrize("entry", zoo_parameters())
def test_the_rows_compute_the_keys_and_values_of_the_attention(entry: ZooEntry) -> None:
    model = entry.build()
    inputs = entry.inputs(model)
    found = discover_projections(model, inputs)
    assert len(found) == entry.cores
    with patched(model, example_inputs=inputs):
        seen = sites(model, inputs)
        for name, pair in pairs_of(model, inputs).items():
            for location, projection in (("k", pair.key), ("v", pair.value)):
                if entry.name in {"k": NORMALISED_KEYS, "v": NORMALISED_VALUES}[location]:
                    continue
                # Repeated heads are the same vector.
                site = torch.unique_consecutive(seen[name, location], dim=0).flatten()
                bias = projection.bias()
                expected = projection.weight() @ source_of(model, projection.module, inputs)
                torch.testing.assert_close(site.float(), expected if bias is None else expected + bias)


@pytest.mark.parametrize("name", [name for name in ZOO if "padded" not in name and "deepseek" not in name])
def test_a_row_of_the_weight_changes_its_own_channel_alone(name: str) -> None:
    model = ZOO[name].build()
    inputs = ZOO[name].inputs(model)
    with patched(model, example_inputs=inputs):
        core, pair = list(pairs_of(model, inputs).items())[-1]
        before = sites(model, inputs)
        for location, projection in (("k", pair.key), ("v", pair.value)):
            row = len(projection.rows) // 3
            one = Projection(projection.module, projection.rows[row : row + 1])
            weight, bias = one.weight(), one.bias()
            one.write(weight + 1.0, bias)
            after = sites(model, inputs)
            one.write(weight, bias)
            for other in ("k", "v"):
                heads = [torch.unique_consecutive(s[core, other], dim=0).flatten() for s in (before, after)]
                changed = torch.nonzero(heads[0] != heads[1]).flatten().tolist()
                if other != location:
                    assert changed == []
                elif name in {"k": NORMALISED_KEYS, "v": NORMALISED_VALUES}[location] - {"gpt_oss"}:
                    assert row in changed
                else:
                    assert changed == [row]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_the_layout_does_not_depend_on_the_dtype(name: str, dtype: torch.dtype) -> None:
    model = ZOO[name].build()
    expected = rows_of(discover_projections(model, ZOO[name].inputs(model)))
    model = model.to(dtype)
    assert rows_of(discover_projections(model, ZOO[name].inputs(model))) == expected


def test_known_layouts() -> None:
    first = {name: next(iter(rows_of(discover_projections(ZOO[name].build())).values())) for name in FUSED}
    assert first["gpt2"] == first["mpt"] == first["modernbert"] == ([*range(32, 64)], [*range(64, 96)])
    assert first["phi3"] == ([*range(32, 48)], [*range(48, 64)])
    interleaved = [[start + channel for start in range(8 * at, 96, 24) for channel in range(8)] for at in (1, 2)]
    assert first["gpt_neox"] == first["bloom"] == first["falcon-alibi"] == tuple(interleaved)
    assert first["falcon-rotary"] == ([*range(32, 40)], [*range(40, 48)])
    assert first["falcon-new"] == ([*range(16, 24), *range(48, 56)], [*range(24, 32), *range(56, 64)])


def variant(name: str, model_class: str | None = None, **changes: Any) -> nn.Module:
    species = SPECIES[name]
    config = getattr(transformers, species.config)(**{**species.options, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class or species.model)._from_config(config, attn_implementation="eager")
    assert isinstance(model, nn.Module)
    return model.eval()


def test_cross_attention_of_gpt2_has_two_blocks() -> None:
    model = variant("gpt2", add_cross_attention=True)
    inputs = {"input_ids": torch.arange(3, 10)[None], "encoder_hidden_states": torch.randn(1, 5, 32)}
    rows = rows_of(discover_projections(model, inputs))
    assert rows["transformer.h.1.attn"] == ([*range(32, 64)], [*range(64, 96)])
    assert rows["transformer.h.1.crossattention"] == ([*range(32)], [*range(32, 64)])


def test_scaled_rotations_and_clipping_are_no_obstacle() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8, **factors}
    model = variant("phi3", max_position_embeddings=64, rope_parameters=longrope, original_max_position_embeddings=8)
    scalings = [m.attention_scaling for m in model.modules() if hasattr(m, "attention_scaling")]
    assert [scaling > 1 for scaling in scalings] == [True]
    assert rows_of(discover_projections(model))["model.layers.0.self_attn"][0] == [*range(32, 48)]
    assert [m.attention_scaling for m in model.modules() if hasattr(m, "attention_scaling")] == scalings
    clipped = variant("mpt", attn_config=transformers.models.mpt.configuration_mpt.MptAttentionConfig(clip_qkv=6.0))
    assert rows_of(discover_projections(clipped))["transformer.blocks.0.attn"][0] == [*range(32, 64)]


def test_gemma4_with_one_projection_for_both() -> None:
    model = variant("gemma4", attention_k_eq_v=True)
    pairs = pairs_of(model, {"input_ids": torch.arange(3, 10)[None]})
    sliding, full = pairs.values()
    assert sliding.key.module is not sliding.value.module
    assert full.key.module is full.value.module
    assert full.key.rows.tolist() == full.value.rows.tolist()


class ToyAttention(nn.Module):
    """Two heads of width 4 from one fused module; ``alter`` is applied to the keys on their way."""

    def __init__(self, alter: Callable[[Tensor], Tensor] = lambda keys: keys) -> None:
        super().__init__()
        self.fused = nn.Linear(8, 24)
        self.alter = alter

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.fused(x).chunk(3, -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(x))
        weights = torch.softmax(q @ self.alter(k).transpose(-1, -2) / 2, -1)
        return (weights @ v).transpose(1, 2).flatten(2)


class ToySeparate(ToyAttention):
    """Projections under names that nobody knows; ``shift`` is added to what the keys are made of."""

    def __init__(self, shift: float = 0.0, linear: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.fused = nn.Identity()
        self.alpha, self.beta, self.gamma = (linear(8, 8) for _ in range(3))
        self.shift = shift

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.alpha(x), self.beta(x + self.shift), self.gamma(x)


class ToyNamed(ToyAttention):
    """Known names around a normalisation that no code survives; the keys may have one head for two."""

    def __init__(self, key_heads: int) -> None:
        super().__init__()
        self.fused = nn.Identity()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4 * key_heads), nn.Linear(8, 8)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        keys = self.k_proj(x).unflatten(-1, (-1, 4))
        keys = nn.functional.layer_norm(keys, (4,)).repeat_interleave(2 // keys.shape[-2], -2)
        return self.q_proj(x), keys.flatten(-2), self.v_proj(x)


class Int8Linear(nn.Linear):
    """Stores its weight in eight bits."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__(inputs, features)
        self.weight = nn.Parameter((self.weight.detach() * 100).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.dtype).t() / 100 + self.bias


class Toy(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(x)
        assert isinstance(out, Tensor)
        return out


def discover_toy(attention: nn.Module) -> KeyValueProjections | str:
    torch.manual_seed(0)
    return discover_projections(Toy(attention), {"x": torch.randn(2, 5, 8)})["attention"]


def test_unknown_architectures_are_measured() -> None:
    fused = discover_toy(ToyAttention())
    assert isinstance(fused, KeyValueProjections)
    assert (fused.key.rows.tolist(), fused.value.rows.tolist()) == ([*range(8, 16)], [*range(16, 24)])
    attention = ToySeparate()
    separate = discover_toy(attention)
    assert isinstance(separate, KeyValueProjections)
    assert (separate.key.module, separate.value.module) == (attention.beta, attention.gamma)


ALTERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "doubled": lambda keys: keys * 2,
    "halved": lambda keys: keys / 2,
    "shifted": lambda keys: keys + 1 / 256,
    "negated": lambda keys: -keys,
    "normalised": lambda keys: nn.functional.layer_norm(keys, keys.shape[-1:]),
    "mixed": lambda keys: keys + keys.flip(-1),
    "complemented": lambda keys: 129 / 256 - keys,
    "lost": lambda keys: keys * float("nan"),
    "one for all": lambda keys: keys[:, :1].expand_as(keys),
}


@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS.keys())
def test_what_arrives_altered_is_never_guessed(alter: Callable[[Tensor], Tensor]) -> None:
    found = discover_toy(ToyAttention(alter))
    assert found == "its key and value projections were not recognised among its linear modules ['fused']"


def test_keys_and_values_from_different_inputs_are_not_compared() -> None:
    assert discover_toy(ToySeparate(shift=0.5)) == "its keys and values are projected from different inputs"


def test_names_are_believed_behind_a_normalisation_if_the_shapes_agree() -> None:
    attention = ToyNamed(key_heads=2)
    found = discover_toy(attention)
    assert isinstance(found, KeyValueProjections)
    assert (found.key.module, found.value.module) == (attention.k_proj, attention.v_proj)
    assert "not recognised among its linear modules ['q_proj', 'k_proj', 'v_proj']" in str(discover_toy(ToyNamed(1)))


def test_quantised_projections_are_not_compared() -> None:
    assert discover_toy(ToySeparate(linear=Int8Linear)) == "its projections are quantised (torch.int8)"


def test_reasons_of_the_zoo() -> None:
    latent = discover_projections(ZOO["deepseek_v3"].build())
    assert set(latent.values()) == {"D_k != D_v (10 and 6 channels)"}
    shared = discover_projections(ZOO["gemma4-shared-kv"].build())
    name = "model.layers.{}.self_attn".format
    assert shared[name(2)] == f"it has no keys and values of its own but reuses those of {name(0)}"
    assert shared[name(3)] == f"it has no keys and values of its own but reuses those of {name(1)}"
    assert isinstance(shared[name(1)], KeyValueProjections)


def test_a_tower_that_the_inputs_do_not_reach() -> None:
    entry = ZOO["qwen2_vl"]
    model = entry.build()
    with patched(model, example_inputs=entry.inputs(model)):
        found = discover_projections(model)
        everything = discover_projections(model, entry.inputs(model))
    unreached = [name for name, pair in found.items() if isinstance(pair, str)]
    assert unreached == [name for name in everything if "visual" in name]
    assert "do not reach it; pass example_inputs=" in str(found[unreached[0]])
    assert all(isinstance(pair, KeyValueProjections) for pair in everything.values())


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_oss", "falcon-new", "whisper", "qwen2_5_vl"])
@pytest.mark.parametrize("is_patched_before", [False, True])
def test_the_model_is_left_as_it_was(name: str, is_patched_before: bool) -> None:
    model = ZOO[name].build()
    inputs = ZOO[name].inputs(model)
    context: AbstractContextManager[Any] = patched(model, example_inputs=inputs) if is_patched_before else nullcontext()
    with torch.no_grad(), context:
        expected = logits_of(model(**inputs))
        model.train()
        next(m for m in model.modules() if isinstance(m, nn.Linear)).eval()
        before, random_state = state_of(model), torch.get_rng_state()
        discover_projections(model, inputs)
        assert state_of(model) == before
        assert torch.equal(torch.get_rng_state(), random_state)
        with pytest.raises((TypeError, ValueError)):
            discover_projections(model, {**inputs, "nonsense": 1, "input_ids": "text"})  # type: ignore[dict-item]
        assert state_of(model) == before
        assert torch.equal(logits_of(model.eval()(**inputs)), expected)


def state_of(model: nn.Module) -> list[Any]:
    state: list[Any] = [is_patched(model)]
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        config = getattr(module, "config", None)
        scalings = [value for key, value in vars(module).items() if key.endswith("attention_scaling")]
        own_forward = id(module.__dict__.get("forward"))
        selected = getattr(config, "_attn_implementation", None)
        state.append((name, module.training, hooks, scalings, own_forward, selected))
    state.extend((name, parameter.data_ptr(), parameter._version) for name, parameter in model.named_parameters())
    return state


def test_a_model_with_another_implementation_keeps_it() -> None:
    model = variant("llama")
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    assert len(pairs_of(model, {"input_ids": torch.arange(3, 10)[None]})) == 2
    assert model.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_patching_after_discovery_still_works() -> None:
    model = ZOO["gpt2"].build()
    discover_projections(model)
    assert not is_patched(model)
    unpatch_model(monkey_patch_model(model))


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@settings(max_examples=40, deadline=None)
@given(features=st.lists(st.integers(1, 300), min_size=1, max_size=5), dtype=DTYPES)
def test_the_code_survives_every_dtype(features: list[int], dtype: torch.dtype) -> None:
    modules = [nn.Linear(1, count) for count in features]
    code = _SparseCode(modules)
    for module, count in zip(modules, features, strict=True):
        values = [code.values(module, digit) for digit in range(code.digits)]
        assert all(bool(((value > 0) & (value <= 0.5)).all()) for value in values)
        numbers = sum(code.weighted_digit(value.to(dtype), digit) for digit, value in enumerate(values))
        assert isinstance(numbers, Tensor)
        found = code.projection(numbers.tolist())
        assert found is not None
        assert (found.module, found.rows.tolist()) == (module, list(range(count)))
    assert code.base**code.digits >= code.base * sum(features)


def test_the_code_refuses_repetitions_and_strangers() -> None:
    code = _SparseCode([nn.Linear(1, 4), nn.Linear(1, 4)])
    numbers = code._numbers.tolist()
    stranger = next(n for n in range(1000) if n not in numbers)
    assert code.projection([*numbers[:4]]) is not None
    assert code.projection([numbers[0], numbers[0]]) is None
    assert code.projection([numbers[0], stranger]) is None
    assert code.projection([numbers[3], numbers[4]]) is None
    assert code.projection([numbers[0], float("nan")]) is None


def test_writing_a_projection_of_a_transposed_weight() -> None:
    module = transformers.pytorch_utils.Conv1D(6, 3)
    projection = Projection(module, torch.tensor([4, 1]))
    before = module.weight.detach().clone()
    assert torch.equal(projection.weight(), before.t()[[4, 1]])
    projection.write(torch.ones(2, 3), torch.tensor([5.0, 7.0]))
    assert torch.equal(module.weight[:, [4, 1]], torch.ones(3, 2))
    assert torch.equal(module.weight[:, [0, 2, 3, 5]], before[:, [0, 2, 3, 5]])
    assert module.bias.tolist() == [0, 7, 0, 0, 5, 0]
    projection.write(torch.ones(2, 3), None)
    assert module.bias.tolist() == [0] * 6
