"""Fault specifications and the faults drawn from them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fault_injection import (
    KINDS,
    LOCATIONS,
    ElementIndex,
    Fault,
    FaultSpec,
    Site,
    bit_patterns,
    draw_fault,
    rewrite_bits,
)
from fault_injection.numbers.bits import bits_in_field

SHAPE = (2, 2, 3, 4)
SIZE = math.prod(SHAPE)
CAUSAL = torch.ones(3, 4, dtype=torch.bool).tril(1)[None, None]
WIDTHS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}


def key(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def site(dtype: torch.dtype = torch.float32, location: str = "scores", **changes: Any) -> Site:
    visible = CAUSAL if location in ("scores", "weights") else None
    plain = Site(3, "h.3.attn", location, SHAPE, SHAPE[-1], dtype, visible)
    return dataclasses.replace(plain, **changes)


def spec(**options: Any) -> FaultSpec:
    return FaultSpec(**{"location": "scores", **options})


def apply(fault: Fault, tensor: torch.Tensor) -> torch.Tensor:
    return rewrite_bits(
        tensor,
        [element.flat for element in fault.elements],
        [element.keep for element in fault.elements],
        [element.toggle for element in fault.elements],
    )


# ----------------------------------------------------------------------------------------------- specifications


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"location": "score"}, r"fault\.location: got 'score', allowed q, k, v, scores, .*; did you mean 'scores'\?"),
        ({"location": "querys"}, r"fault\.location: got 'querys', allowed q, k, v, .*; did you mean 'query'\?"),
        ({"kind": "bit_flip"}, r"fault\.kind: got 'bit_flip', allowed bitflip, .*; did you mean 'bitflip'\?"),
        ({"bits": ()}, r"fault\.bit: got an empty list; leave it out to draw any bit"),
        ({"bits": (64,)}, r"bit: got 64, allowed 0\.\.63"),
        ({"bits": (-1,)}, r"bit: got -1"),
        ({"bits": (3, 3)}, r"bit: 3 is given twice"),
        ({"bits": "exponents"}, r"fault\.bit: got 'exponents', .*sign, exponent, mantissa; did you mean 'exponent'\?"),
        ({"kind": "zero", "bits": (3,)}, r"fault\.bit: kind 'zero' has no use for a bit, got \(3,\)"),
        ({"kind": "random_value", "bits": "sign"}, r"fault\.bit: kind 'random_value' has no use for a bit"),
        ({"kind": "bit_error_rate", "bits": (3,), "rate": 0.1}, r"fault\.bit: kind 'bit_error_rate' has no use"),
        ({"kind": "bit_error_rate"}, r"fault\.rate: kind 'bit_error_rate' needs a rate, got None"),
        ({"rate": 0.1}, r"fault\.rate: kind 'bitflip' has no use for a rate, got 0\.1"),
        ({"kind": "bit_error_rate", "rate": 0.0}, r"fault\.rate: got 0\.0, allowed: above 0, at most 1"),
        ({"kind": "bit_error_rate", "rate": 1.01}, r"fault\.rate: got 1\.01"),
        ({"kind": "bit_error_rate", "rate": float("nan")}, r"fault\.rate: got nan"),
    ],
)
def test_bad_specifications_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**options)


def test_specifications_are_hashable_and_frozen() -> None:
    assert len({spec(bits=(1,)), spec(bits=(1,)), spec(bits=(2,))}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().kind = "zero"  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------- single draws


def any_spec(kind: str) -> FaultSpec:
    return spec(kind=kind, rate=0.05 if kind == "bit_error_rate" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_key_determines_the_fault(kind: str) -> None:
    drawn = [draw_fault(any_spec(kind), site(), key(seed)) for seed in range(200)]
    assert drawn == [draw_fault(any_spec(kind), site(), key(seed)) for seed in range(200)]
    # `zero` has one fault an element; the others nearly always differ.
    assert len(set(drawn)) >= (12 if kind == "zero" else 150)


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_fault_says_whose_it_is(location: str) -> None:
    fault = draw_fault(FaultSpec(location, bits=(5, 2)), site(location=location), key(1))
    assert (fault.location, fault.layer, fault.module, fault.kind) == (location, 3, "h.3.attn", "bitflip")
    assert (fault.shape, fault.bits, fault.call) == (SHAPE, (5, 2), 0)
    assert fault.index is not None
    assert fault.elements[0].flat == int(np.ravel_multi_index(fault.index, SHAPE))


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("bitflip", lambda old, mask: old ^ mask),
        ("stuck_at_0", lambda old, mask: old & ~mask),
        ("stuck_at_1", lambda old, mask: old | mask),
    ],
)
def test_kinds_with_bits_do_what_they_say_to_one_element(dtype: torch.dtype, kind: str, rule: Any) -> None:
    tensor = torch.randn(SHAPE, dtype=torch.float64).to(dtype)
    bits = (0, 3, WIDTHS[dtype] - 1)
    fault = draw_fault(spec(kind=kind, bits=bits), site(dtype), key(2))
    expected = bit_patterns(tensor)
    expected[fault.elements[0].flat] = rule(expected[fault.elements[0].flat], sum(1 << bit for bit in bits))
    assert bit_patterns(apply(fault, tensor)) == expected


def test_zero_writes_positive_zero() -> None:
    fault = draw_fault(spec(kind="zero", include_masked=True), site(), key(3))
    patterns = bit_patterns(apply(fault, torch.full(SHAPE, -float("nan"))))
    assert [i for i, pattern in enumerate(patterns) if pattern == 0] == [fault.elements[0].flat]
    assert fault.bits == ()


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_a_random_value_is_a_uniform_pattern_that_ignores_the_old_one(dtype: torch.dtype) -> None:
    width = WIDTHS[dtype]
    random = key(4)
    faults = [draw_fault(spec(kind="random_value"), site(dtype), random) for _ in range(2000)]
    for fault in faults[:5]:
        flat = fault.elements[0].flat
        values = {
            bit_patterns(apply(fault, old))[flat]
            for old in (torch.zeros(SHAPE, dtype=dtype), torch.randn(SHAPE).to(dtype))
        }
        assert values == {fault.elements[0].toggle}
    for bit in range(width):
        ones = sum(fault.elements[0].toggle >> bit & 1 for fault in faults)
        assert abs(ones - 1000) < 5 * 500**0.5, bit
    assert max(fault.elements[0].toggle for fault in faults) < 1 << width


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_any_bit_of_the_native_dtype_is_drawn_uniformly(dtype: torch.dtype) -> None:
    random = key(5)
    counts = Counter(draw_fault(spec(), site(dtype), random).bits for _ in range(3200))
    width = WIDTHS[dtype]
    assert set(counts) == {(bit,) for bit in range(width)}
    statistic = sum((counts[bit,] - 3200 / width) ** 2 / (3200 / width) for bit in range(width))
    assert statistic < width + 6 * (2 * width) ** 0.5


@pytest.mark.parametrize("field", ["sign", "exponent", "mantissa"])
def test_a_field_stands_for_any_of_its_bits(field: str) -> None:
    random = key(6)
    drawn = {draw_fault(spec(bits=field), site(torch.bfloat16), random).bits[0] for _ in range(300)}
    assert drawn == set(bits_in_field(torch.bfloat16, field))


@pytest.mark.parametrize(("dtype", "bit"), [(torch.float32, 32), (torch.bfloat16, 30), (torch.float16, 16)], ids=str)
@pytest.mark.parametrize("kind", ["bitflip", "stuck_at_0", "stuck_at_1"])
def test_a_bit_that_the_native_dtype_lacks_is_refused(dtype: torch.dtype, bit: int, kind: str) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"bit: got {bit}, allowed 0\.\.{WIDTHS[dtype] - 1} for {name}"):
        draw_fault(spec(kind=kind, bits=(bit,)), site(dtype), key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_are_left_out_unless_asked_for(kind: str) -> None:
    random = key(7)
    plain = [draw_fault(any_spec(kind), site(), random) for _ in range(300)]
    assert not any(fault.masked_position for fault in plain)
    assert all(flat_is_visible(element.flat) for fault in plain for element in fault.elements)
    asked = dataclasses.replace(any_spec(kind), include_masked=True)
    drawn = [draw_fault(asked, site(), random) for _ in range(300)]
    assert {fault.masked_position for fault in drawn} == {True, False}
    for fault in drawn:
        assert fault.masked_position == (fault.index is not None and not flat_is_visible(fault.elements[0].flat))


def flat_is_visible(flat: int) -> bool:
    _, _, row, col = np.unravel_index(flat, SHAPE)
    return bool(col <= row + 1)


def test_an_index_on_a_hidden_key_is_kept_and_recorded() -> None:
    fault = draw_fault(spec(bits=(1,), index=ElementIndex(1, 0, 0, 3)), site(), key(8))
    assert (fault.index, fault.masked_position) == ((1, 0, 0, 3), True)
    drawn = {draw_fault(spec(bits=(1,), index=ElementIndex(row=0, col=3)), site(), key(seed)) for seed in range(60)}
    assert {fault.index for fault in drawn} == {(b, h, 0, 3) for b in range(2) for h in range(2)}
    assert all(fault.masked_position for fault in drawn)


@pytest.mark.parametrize("location", ["q", "k", "v", "out"])
def test_only_scores_and_weights_have_masked_positions(location: str) -> None:
    faults = [draw_fault(FaultSpec(location), site(location=location), key(seed)) for seed in range(400)]
    assert {fault.index for fault in faults} == {tuple(int(i) for i in where) for where in np.ndindex(SHAPE)}
    assert not any(fault.masked_position for fault in faults)


@pytest.mark.parametrize("kind", KINDS)
def test_a_partial_index_is_respected(kind: str) -> None:
    asked = dataclasses.replace(any_spec(kind), index=ElementIndex(batch=1, row=2))
    random = key(9)
    hit = {element.flat for _ in range(400) for element in draw_fault(asked, site(), random).elements}
    assert hit == {int(np.ravel_multi_index((1, head, 2, col), SHAPE)) for head in range(2) for col in range(4)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("axis", "size"), list(zip(("batch", "head", "row", "col"), SHAPE, strict=True)))
def test_a_coordinate_that_does_not_exist_is_refused(kind: str, axis: str, size: int) -> None:
    asked = dataclasses.replace(any_spec(kind), index=ElementIndex(**{axis: size}))
    with pytest.raises(
        IndexError, match=rf"fault\.index\.{axis}: got {size}, allowed 0\.\.{size - 1} for scores of layer 3"
    ):
        draw_fault(asked, site(), key(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_of_another_location_is_refused(kind: str) -> None:
    # Shape, native dtype and mask would be those of the wrong tensor.
    with pytest.raises(ValueError, match=r"scores.*weights|weights.*scores"):
        draw_fault(any_spec(kind), site(location="weights"), key(0))


# ------------------------------------------------------------------------------------------------ bit error rates


def test_the_number_of_flips_is_binomial() -> None:
    rate, visible = 0.02, 2 * 2 * (2 + 3 + 4)
    trials = visible * 16
    random = key(10)
    counts = []
    for _ in range(1500):
        fault = draw_fault(spec(kind="bit_error_rate", rate=rate), site(torch.bfloat16), random)
        counts.append(sum(element.toggle.bit_count() for element in fault.elements))
    mean, variance = trials * rate, trials * rate * (1 - rate)
    assert abs(np.mean(counts) - mean) < 5 * (variance / len(counts)) ** 0.5
    assert abs(np.var(counts) / variance - 1) < 0.25


def test_every_bit_of_every_candidate_flips_equally_often() -> None:
    random = key(11)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(3000):
        fault = draw_fault(spec(kind="bit_error_rate", rate=0.03), site(torch.float16), random)
        counts.update((e.flat, bit) for e in fault.elements for bit in range(16) if e.toggle >> bit & 1)
    cells = 2 * 2 * (2 + 3 + 4) * 16
    assert len(counts) == cells
    expected = sum(counts.values()) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert abs(statistic - cells) < 6 * (2 * cells) ** 0.5


def test_elements_are_distinct_in_order_and_flip_only_what_exists() -> None:
    fault = draw_fault(spec(kind="bit_error_rate", rate=0.3), site(torch.bfloat16), key(12))
    positions = [element.flat for element in fault.elements]
    assert positions == sorted(set(positions))
    assert {element.keep for element in fault.elements} == {0xFFFF}
    assert all(0 < element.toggle <= 0xFFFF for element in fault.elements)
    assert fault.index == tuple(int(i) for i in np.unravel_index(positions[0], SHAPE))
    assert fault.bits == ()


def test_a_rate_of_one_flips_every_bit_of_every_candidate() -> None:
    fault = draw_fault(spec(kind="bit_error_rate", rate=1.0, index=ElementIndex(batch=0)), site(), key(13))
    assert [element.flat for element in fault.elements] == [flat for flat in range(SIZE // 2) if flat_is_visible(flat)]
    assert {element.toggle for element in fault.elements} == {0xFFFF_FFFF}


def test_a_rate_that_hits_nothing_is_a_fault_without_elements() -> None:
    fault = draw_fault(spec(kind="bit_error_rate", rate=1e-12), site(), key(14))
    assert (fault.elements, fault.index, fault.masked_position) == ((), None, False)
    tensor = torch.randn(SHAPE)
    assert torch.equal(apply(fault, tensor), tensor)
    assert Fault.from_json(fault.to_json()) == fault


def test_a_rate_never_hits_a_learned_sink() -> None:
    sink = site(columns=3, visible=CAUSAL[..., :3])
    random = key(15)
    drawn = [draw_fault(spec(kind="bit_error_rate", rate=0.2, include_masked=True), sink, random) for _ in range(50)]
    hit = {element.flat for fault in drawn for element in fault.elements}
    assert hit == {flat for flat in range(SIZE) if flat % 4 != 3}


def test_a_rate_on_nothing_but_hidden_keys_is_kept_and_recorded_as_masked() -> None:
    asked = spec(kind="bit_error_rate", rate=0.5, index=ElementIndex(row=0, col=3))
    fault = draw_fault(asked, site(), key(0))
    assert fault.index is not None
    assert fault.index[2:] == (0, 3)
    assert fault.masked_position


# ------------------------------------------------------------------------------------------------------- JSON


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS), location=st.sampled_from(LOCATIONS))
def test_faults_survive_json_and_are_hashable(seed: int, kind: str, location: str) -> None:
    asked = dataclasses.replace(any_spec(kind), location=location, include_masked=True)
    fault = dataclasses.replace(draw_fault(asked, site(location=location), key(seed)), call=seed % 3)
    again = Fault.from_json(fault.to_json())
    assert again == fault
    assert hash(again) == hash(fault)
    assert again.to_json() == fault.to_json()


def test_json_is_canonical_and_exact() -> None:
    fault = draw_fault(spec(bits=(63,)), site(torch.float64), key(16))
    text = fault.to_json()
    data = json.loads(text)
    assert text == json.dumps(data, sort_keys=True, separators=(",", ":"))
    assert data["elements"][0]["toggle"] == 1 << 63
    assert data["elements"][0]["keep"] == (1 << 64) - 1


@pytest.mark.parametrize("change", [{"unknown": 1}, {"shape": None}])
def test_json_that_is_no_fault_is_refused(change: dict[str, Any]) -> None:
    data = json.loads(draw_fault(spec(bits=(1,)), site(), key(17)).to_json()) | change
    with pytest.raises((TypeError, ValueError)):
        Fault.from_json(json.dumps(data))
