"""Fingerprints: equal exactly when everything that determines a result is equal, bit by bit."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from monitoring.cache.fingerprints import (
    canonical_json,
    digest,
    input_fingerprint,
    params_fingerprint,
    short,
    tensor_digest,
    view_id,
)
from monitoring.cache.model_fingerprints import (
    bump_generation,
    execution_flags,
    generation,
    model_fingerprint,
    weight_digests,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.config = {"layers": 1}


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def flip_one_bit(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.view(torch.int32).view(-1)[0] ^= 1


# ------------------------------------------------------------------------------------------- canonical JSON

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_canonical_json_reads_back_to_the_same_value(value: object) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.floats(), st.floats())
def test_floats_are_never_rounded(x: float, y: float) -> None:
    same = x.hex() == y.hex()  # all NaNs print alike
    assert (canonical_json(x) == canonical_json(y)) == same


def test_canonical_json_ignores_order_and_keeps_types_apart() -> None:
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})
    assert canonical_json({3, 1, 2}) == canonical_json({2, 3, 1})
    texts = [canonical_json(value) for value in (1, 1.0, True, "1", {1: 0}, {"1": 0}, torch.float32, "torch.float32")]
    assert len(set(texts)) == len(texts)


def test_canonical_json_refuses_what_has_no_text() -> None:
    with pytest.raises(TypeError, match="got object, allowed are JSON values"):
        canonical_json({"a": object()})


def test_dataclass_params_count_by_their_fields() -> None:
    @dataclasses.dataclass(frozen=True)
    class Collected:
        layers: tuple[int, ...]
        dtype: torch.dtype

    one = params_fingerprint({"what": Collected((0, 1), torch.float32)})
    assert one == params_fingerprint({"what": Collected((0, 1), torch.float32)})
    assert one != params_fingerprint({"what": Collected((0, 1), torch.float16)})
    assert one != params_fingerprint({"what": Collected((0, 2), torch.float32)})


# ------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensor_digest_sees_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype)
    seen = {tensor_digest(tensor)}
    bytes_ = tensor.clone().view(torch.uint8)
    for index in range(bytes_.numel()):
        for bit in range(8):
            changed = bytes_.clone()
            changed[index] ^= 1 << bit
            seen.add(tensor_digest(changed.view(dtype)))
    assert len(seen) == 1 + 8 * bytes_.numel()


def test_tensor_digest_is_of_values_in_order_not_of_strides() -> None:
    tensor = torch.randn(4, 3)
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(tensor.reshape(3, 4)) != tensor_digest(tensor)
    assert tensor_digest(torch.zeros(1)) != tensor_digest(-torch.zeros(1))
    assert tensor_digest(torch.zeros(0, 3)) != tensor_digest(torch.zeros(3, 0))
    assert tensor_digest(torch.tensor(True)) != tensor_digest(torch.tensor(False))


def test_tensor_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="on meta with layout"):
        tensor_digest(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="sparse_coo"):
        tensor_digest(torch.eye(2).to_sparse())


# -------------------------------------------------------------------------------------------------- inputs


def test_input_fingerprint_sees_ids_mask_positions_shape_and_composition() -> None:
    ids = torch.arange(8).reshape(2, 4)
    mask = torch.ones_like(ids)
    variants = [
        input_fingerprint({"input_ids": ids}),
        input_fingerprint({"input_ids": ids, "attention_mask": mask}),
        input_fingerprint({"input_ids": ids, "position_ids": mask}),
        input_fingerprint({"input_ids": ids, "attention_mask": mask.bool()}),
        input_fingerprint({"input_ids": ids, "attention_mask": mask.tril()}),
        input_fingerprint({"input_ids": ids.reshape(1, 8)}),
        input_fingerprint({"input_ids": ids.repeat(2, 1)}),
        input_fingerprint({"input_ids": ids.int()}),
        input_fingerprint({"input_ids": ids}, (8, 4)),
        input_fingerprint({"input_ids": ids}, (2, 16)),
        input_fingerprint("0 1 2 3"),
        input_fingerprint("0 1 2 3", (8, 4)),
    ]
    assert len(set(variants)) == len(variants)
    assert all(len(variant) == 32 for variant in variants)


def test_input_fingerprint_ignores_order_and_absent_entries() -> None:
    ids, mask = torch.ones(1, 2), torch.zeros(1, 2)
    one = input_fingerprint({"a": ids, "b": mask, "c": None})
    assert one == input_fingerprint({"b": mask.clone(), "a": ids.clone()})
    assert one != input_fingerprint({"a": mask, "b": ids})


def test_input_fingerprint_refuses_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="'input_ids' is list, allowed are tensors"):
        input_fingerprint({"input_ids": [1, 2]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="without a tensor"):
        input_fingerprint({"mask": None})


# --------------------------------------------------------------------------------------------------- views


def test_view_ids_are_exact() -> None:
    assert view_id() == "base"
    assert view_id(null=42) == "null:42"
    assert view_id(kv="K<-V", adapter="a/b") == "kv:K<-V+adapter:a/b"
    assert view_id(fault={"bit": 3, "layer": 1}) == view_id(fault={"layer": 1, "bit": 3})
    assert view_id(fault={"bit": 3}) != view_id(fault={"bit": 4})


@given(st.floats(), st.floats())
def test_scaled_views_never_collide(x: float, y: float) -> None:
    assert (view_id(scaled=x) == view_id(scaled=y)) == (x.hex() == y.hex())
    assert "+" not in view_id(scaled=x)


def test_view_id_refuses_ambiguous_parts() -> None:
    with pytest.raises(TypeError, match="got falut, allowed are null, scaled, fault, kv, adapter"):
        view_id(falut=1)
    with pytest.raises(ValueError, match=r"adapter='a\+b' must be non-empty and without '\+'"):
        view_id(adapter="a+b")


# -------------------------------------------------------------------------------------------------- models


def test_model_fingerprint_changes_with_any_weight_bit_and_comes_back(model: Small) -> None:
    seen = [model_fingerprint(model)]
    for tensor in (*model.parameters(), model.kept, model.passing):
        flip_one_bit(tensor)
        seen.append(model_fingerprint(model))
        flip_one_bit(tensor)
        assert model_fingerprint(model) == seen[0]
    assert len(set(seen)) == 5


def test_model_fingerprint_depends_on_content_not_on_the_object(model: Small) -> None:
    torch.manual_seed(0)
    assert model_fingerprint(Small().eval()) == model_fingerprint(model)


def test_model_fingerprint_sees_everything_but_weights(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [model_fingerprint(model)]
    model.config = {"layers": 2}
    seen.append(model_fingerprint(model))
    model.linear.train()
    seen.append(model_fingerprint(model))
    model.double()
    seen.append(model_fingerprint(model))
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    seen.append(model_fingerprint(model))
    torch.use_deterministic_algorithms(True)
    try:
        seen.append(model_fingerprint(model))
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", torch.bfloat16):
        seen.append(model_fingerprint(model))
    assert len(set(seen)) == len(seen)


def test_attention_implementation_is_part_of_the_fingerprint() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(**size, attn_implementation="eager")).eval()
    eager = model_fingerprint(gpt2)
    gpt2.set_attn_implementation("sdpa")
    assert model_fingerprint(gpt2) != eager
    gpt2.set_attn_implementation("eager")
    assert model_fingerprint(gpt2) == eager


def test_unchanged_weights_are_not_read_again(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weight_digests(model)
    read: list[int] = []

    def counting(tensor: torch.Tensor) -> str:
        read.append(tensor.numel())
        return tensor_digest(tensor)

    monkeypatch.setattr("monitoring.cache.model_fingerprints.tensor_digest", counting)
    assert weight_digests(model) == first
    assert read == []
    flip_one_bit(model.linear.bias)
    changed = weight_digests(model)
    assert read == [2]
    assert [name for name in first if first[name] != changed[name]] == ["linear.bias"]
    model_fingerprint(model, refresh=True)
    assert len(read) == 1 + 4


def test_replaced_parameters_are_read_again(model: Small) -> None:
    before = model_fingerprint(model)
    old = model.linear.weight.detach().clone()
    model.linear.weight = nn.Parameter(old + 1)
    assert model_fingerprint(model) != before
    model.linear.weight = nn.Parameter(old.clone())
    assert model_fingerprint(model) == before
    # Same address and version counter as the tensor before it, so only the identity tells them apart.
    model.linear.weight.data[0, 0] += 1
    model.linear.weight = nn.Parameter(model.linear.weight.data)
    assert model_fingerprint(model) != before
    model.linear.weight.data = old.clone()
    assert model_fingerprint(model) == before


def test_writes_that_torch_does_not_count_need_a_bump_or_a_refresh(model: Small) -> None:
    before = model_fingerprint(model)
    model.linear.weight.data[0, 0] += 1
    assert model_fingerprint(model, refresh=True) != before
    changed, digests = model_fingerprint(model), weight_digests(model)
    model.linear.weight.data[0, 0] += 1
    assert generation(model) == 0
    assert bump_generation(model) == 1 == generation(model)
    assert model_fingerprint(model) not in (before, changed)
    assert weight_digests(model) != digests


def test_a_bumped_generation_misses_even_with_equal_weights(model: Small) -> None:
    before = model_fingerprint(model)
    bump_generation(model)
    assert model_fingerprint(model) != before


def test_inference_tensors_are_always_read() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        before = model_fingerprint(model)
        model.weight[0, 0] += 1
        assert model_fingerprint(model) != before


def test_execution_flags_are_plain_and_name_the_versions() -> None:
    flags = execution_flags()
    assert json.loads(canonical_json(flags))["torch"] == torch.__version__
    assert flags["threads"] == torch.get_num_threads()
    assert math.isfinite(float(str(flags["threads"])))


def test_digest_keeps_its_parts_apart() -> None:
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", "")}) == 4
    assert digest("a") == digest(b"a")


def test_short_form() -> None:
    assert short("0123456789abcdef") == "0123456789ab"
