"""K = V: what the check says, against NumPy; what forcing changes, and that it is undone bit for bit."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, ZooEntry, logits_of, zoo_parameters

from fault_injection import (
    AttentionCall,
    KVConsistency,
    check_kv_consistency,
    force_kv_consistent,
    monkey_patch_model,
    patched,
    tapped,
    unpatch_model,
)
from fault_injection.numbers.model_outputs import bitwise_equal
from fault_injection.operands.kv_consistency import MODES

UNDEFINED = {"deepseek_v2", "deepseek_v3", "gemma4-shared-kv"}
# No rotation, normalisation or scaling lies between the projections and the attention.
PLAIN = ["gpt2", "gpt2-upcast", "bert", "distilbert", "opt", "t5", "whisper", "vit", "bloom", "falcon-alibi", "mpt"]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_bitwise(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert bitwise_equal(parameter.detach(), expected[name]), name


def build(name: str) -> Any:
    return ZOO[name].build()


def first(model: nn.Module) -> KVConsistency:
    return next(iter(check_kv_consistency(model).values()))


def numbers_of(layer: KVConsistency) -> tuple[float, float]:
    assert layer.relative_difference is not None
    assert layer.bias_difference is not None
    return layer.relative_difference, layer.bias_difference


def test_numbers_of_gpt2_against_numpy() -> None:
    model = build("gpt2")
    layers = check_kv_consistency(model)
    assert list(layers) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    for block, layer in zip(model.transformer.h, layers.values(), strict=True):
        weight, bias = (
            p.detach().numpy().astype(np.float64) for p in (block.attn.c_attn.weight, block.attn.c_attn.bias)
        )
        keys, values = weight[:, 32:64], weight[:, 64:]
        expected = np.linalg.norm(keys - values) / np.linalg.norm(keys)
        np.testing.assert_allclose(numbers_of(layer), (expected, np.linalg.norm(bias[32:64] - bias[64:])), rtol=1e-12)
        assert (layer.kv_equal, layer.bias_equal, layer.reason) == (False, False, None)
        assert (layer.k_shape, layer.v_shape) == ((32, 32), (32, 32))


def test_numbers_of_grouped_heads_without_bias_against_numpy() -> None:
    model = build("llama-gqa").to(torch.bfloat16)
    layer = first(model)
    attention = model.model.layers[0].self_attn
    keys, values = (m.weight.detach().double().numpy() for m in (attention.k_proj, attention.v_proj))
    expected = np.linalg.norm(keys - values) / np.linalg.norm(keys)
    assert layer.relative_difference == pytest.approx(expected, rel=1e-12)
    assert (layer.kv_equal, layer.k_shape, layer.v_shape) == (False, (16, 32), (16, 32))
    assert (layer.bias_equal, layer.bias_difference) == (None, None)


def test_a_missing_bias_counts_as_zero() -> None:
    model = build("whisper")
    attention = model.model.encoder.layers[0].self_attn
    with torch.no_grad():
        attention.v_proj.weight.copy_(attention.k_proj.weight)
    layer = first(model)
    assert (layer.kv_equal, layer.bias_equal, layer.relative_difference) == (False, False, 0.0)
    assert layer.bias_difference == pytest.approx(np.linalg.norm(attention.v_proj.bias.detach().double().numpy()))
    with torch.no_grad():
        attention.v_proj.bias.zero_()
    assert first(model) == dataclasses.replace(layer, kv_equal=True, bias_equal=True, bias_difference=0.0)


def test_one_changed_bit_in_any_interleaved_row_is_seen() -> None:
    model = build("gpt_neox")
    fused = model.gpt_neox.layers[0].attention.query_key_value
    with torch.no_grad():
        blocks = fused.weight.view(4, 3, 8, 32), fused.bias.view(4, 3, 8)
        for block in blocks:
            block[:, 2] = block[:, 1]
        assert first(model).kv_equal
        blocks[0][3, 2, 7, 31] = torch.nextafter(blocks[0][3, 2, 7, 31], torch.tensor(9.0))
        layer = first(model)
        assert (layer.kv_equal, layer.bias_equal) == (False, True)
        assert 0 < numbers_of(layer)[0] < 1e-6
        blocks[0][3, 2, 7, 31] = blocks[0][3, 1, 7, 31]
        blocks[1][2, 2, 0] += 0.25
        layer = first(model)
        assert (layer.kv_equal, layer.bias_equal, layer.relative_difference) == (False, False, 0.0)
        assert layer.bias_difference == pytest.approx(0.25, rel=1e-6)


def test_zero_and_nan_weights() -> None:
    model = build("llama")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.zero_()
        assert (first(model).kv_equal, first(model).relative_difference) == (False, math.inf)
        attention.v_proj.weight.zero_().neg_()
        assert (first(model).kv_equal, first(model).relative_difference) == (True, 0.0)
        attention.k_proj.weight[0, 0] = attention.v_proj.weight[0, 0] = math.nan
        layer = first(model)
        assert layer.kv_equal
        assert layer.relative_difference is not None
        assert math.isnan(layer.relative_difference)
        attention.v_proj.weight[0, 0] = 0.0
        assert first(model).kv_equal is False


@pytest.mark.parametrize("entry", zoo_parameters())
def test_patched_and_unpatched_agree(entry: ZooEntry) -> None:
    model = entry.build()
    inputs = entry.inputs(model)
    before = parameters(model)
    layers = check_kv_consistency(model, example_inputs=inputs)
    assert len(layers) == entry.cores
    with patched(model, example_inputs=inputs):
        assert check_kv_consistency(model, example_inputs=inputs) == layers
    if entry.name not in UNDEFINED:
        assert {layer.kv_equal for layer in layers.values()} == {False}
    assert_bitwise(model, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", [p for p in zoo_parameters() if p.id not in UNDEFINED])
def test_forcing_is_seen_by_the_check_and_undone_bitwise(entry: ZooEntry, mode: str) -> None:
    model = entry.build()
    if entry.name == "whisper" and mode == "K<-V":
        pytest.skip("its keys have no bias: see test_a_bias_that_has_no_place_to_go")
    inputs = entry.inputs(model)
    before = parameters(model)
    with force_kv_consistent(model, mode, example_inputs=inputs):
        layers = check_kv_consistency(model, example_inputs=inputs)
        assert [layer.kv_equal for layer in layers.values()] == [True] * entry.cores
        assert {layer.relative_difference for layer in layers.values()} == {0.0}
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert len(changed) >= entry.cores
    assert_bitwise(model, before)


class KeysAndValues:
    locations = frozenset({"k", "v"})
    layers = None

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], Tensor] = {}

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        self.seen[call.core.name, location] = tensor.clone()


@pytest.mark.parametrize("name", PLAIN)
def test_forced_keys_and_values_are_equal_at_the_attention(name: str) -> None:
    model = build(name)
    inputs = ZOO[name].inputs(model)
    tap = KeysAndValues()
    with torch.no_grad(), patched(model, example_inputs=inputs):
        clean = logits_of(model(**inputs))
        with force_kv_consistent(model), tapped(model, tap):
            forced = logits_of(model(**inputs))
        assert torch.equal(logits_of(model(**inputs)), clean)
    assert not torch.equal(forced, clean)
    for core in {core for core, _ in tap.seen}:
        torch.testing.assert_close(tap.seen[core, "k"], tap.seen[core, "v"])


def test_the_mode_says_which_projection_stays() -> None:
    model = build("bert")
    attention = model.bert.encoder.layer[1].attention.self
    key, value = attention.key.weight.detach().clone(), attention.value.weight.detach().clone()
    with force_kv_consistent(model):
        assert torch.equal(attention.key.weight, key)
        assert torch.equal(attention.value.weight, key)
    with force_kv_consistent(model, "K<-V"):
        assert torch.equal(attention.key.weight, value)
        assert torch.equal(attention.value.weight, value)
        assert torch.equal(attention.key.bias, attention.value.bias)


def test_queries_of_a_fused_projection_are_untouched() -> None:
    model = build("falcon-new")
    weight = model.transformer.h[0].self_attention.query_key_value.weight
    before = weight.detach().clone().view(2, 4, 8, 32)
    with force_kv_consistent(model):
        now = weight.detach().view(2, 4, 8, 32)
        assert torch.equal(now[:, :3], before[:, :3])
        assert torch.equal(now[:, 3], before[:, 2])


def raise_after_seeing_it(model: Any, before: dict[str, Tensor]) -> None:
    assert not torch.equal(model.transformer.h[0].attn.c_attn.weight, before["transformer.h.0.attn.c_attn.weight"])
    raise ZeroDivisionError


def test_undone_after_an_exception_and_bit_for_bit() -> None:
    model = build("gpt2")
    with torch.no_grad():
        patterns = model.transformer.h[1].attn.c_attn.weight.view(torch.int32)
        patterns[0, 95], patterns[1, 95] = 0x7FC12345, -0x80000000  # a NaN with a payload; -0.0
    before = parameters(model)
    with pytest.raises(ZeroDivisionError), force_kv_consistent(model):
        raise_after_seeing_it(model, before)
    assert_bitwise(model, before)


def test_forcing_through_a_patch_lasts_as_long_as_the_patch() -> None:
    model = build("gpt2")
    before = parameters(model)
    monkey_patch_model(model, force_kv_equal=True)
    assert all(layer.kv_equal for layer in check_kv_consistency(model).values())
    unpatch_model(model)
    assert_bitwise(model, before)
    with pytest.raises(KeyError), patched(model, force_kv_equal=True):
        raise KeyError
    assert_bitwise(model, before)


@pytest.mark.parametrize("name", sorted(UNDEFINED))
def test_undefined_layers_have_a_reason_and_cannot_be_forced(name: str) -> None:
    model = build(name)
    before = parameters(model)
    layers = check_kv_consistency(model)
    undefined = {core: layer for core, layer in layers.items() if layer.kv_equal is None}
    core, layer = next(iter(undefined.items()))
    assert layer == KVConsistency(kv_equal=None, reason=layer.reason)
    assert "D_k != D_v" in str(layer.reason) or "reuses those of model.layers.0" in str(layer.reason)
    with pytest.raises(ValueError, match=r"K = V cannot be forced on " + core + r": .* \(and 1 more layers\)"):
        force_kv_consistent(model).__enter__()
    assert_bitwise(model, before)


def test_gemma4_shared_layers_leave_the_others_comparable() -> None:
    layers = list(check_kv_consistency(build("gemma4-shared-kv")).values())
    assert [layer.kv_equal for layer in layers] == [False, False, None, None]


def test_a_bias_that_has_no_place_to_go() -> None:
    model = build("whisper")
    before = parameters(model)
    with pytest.raises(ValueError, match=r"model\.encoder\.layers\.0\.self_attn: mode 'K<-V' has a bias to copy"):
        force_kv_consistent(model, "K<-V").__enter__()
    assert_bitwise(model, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("v_proj.bias"):
                parameter.zero_()
    before = parameters(model)
    with force_kv_consistent(model, "K<-V"):
        assert all(layer.kv_equal for layer in check_kv_consistency(model).values())
    assert_bitwise(model, before)


def test_the_overwritten_bias_becomes_zero_where_the_source_has_none() -> None:
    model = build("whisper")
    with force_kv_consistent(model):
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            assert not layer.self_attn.v_proj.bias.any()
            assert layer.self_attn.q_proj.bias.any()


def test_layers_that_share_their_parameters() -> None:
    model = build("llama")
    one, other = (layer.self_attn for layer in model.model.layers)
    other.k_proj.weight, other.v_proj.weight = one.k_proj.weight, one.v_proj.weight
    before = parameters(model)
    with force_kv_consistent(model):
        assert all(layer.kv_equal for layer in check_kv_consistency(model).values())
    assert_bitwise(model, before)


def test_parameters_tied_so_that_equality_cannot_be_had() -> None:
    model = build("llama")
    one, other = (layer.self_attn for layer in model.model.layers)
    # Overwriting the second layer's values changes the first layer's keys.
    other.v_proj.weight = one.k_proj.weight
    before = parameters(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn: copying did not make K = V"):
        force_kv_consistent(model).__enter__()
    assert_bitwise(model, before)


def test_parameters_that_are_computed_cannot_be_forced() -> None:
    model = build("llama")
    nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.v_proj)
    before = parameters(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn: copying did not make K = V"):
        force_kv_consistent(model).__enter__()
    assert_bitwise(model, before)


def test_forcing_keeps_the_parameters_themselves() -> None:
    model = build("gpt_neox")
    identities = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    with force_kv_consistent(model):
        loss = logits_of(model(**ZOO["gpt_neox"].inputs(model))).sum()
        loss.backward()
    assert {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == identities


def test_forced_twice_is_forced_once() -> None:
    model = build("phi3")
    before = parameters(model)
    with force_kv_consistent(model):
        inside = parameters(model)
        with force_kv_consistent(model, "K<-V"):
            assert_bitwise(model, inside)
        assert_bitwise(model, inside)
    assert_bitwise(model, before)


@pytest.mark.parametrize(("mode", "hint"), [("V<-k", "did you mean 'V<-K'"), ("K->V", ""), ("", "got ''")])
def test_unknown_modes_are_refused(mode: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"mode: got '{mode}', allowed 'V<-K', 'K<-V'") as error:
        force_kv_consistent(build("gpt2"), mode).__enter__()
    assert hint in str(error.value)


def test_the_result_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        first(build("gpt2")).kv_equal = True  # type: ignore[misc]
