"""Bit patterns: every kernel against integer arithmetic, and its algebra as properties."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fault_injection import bit_field, bit_patterns, clear_bits, flip_bits, rewrite_bits, set_bits
from fault_injection.numbers.bits import bits_in_field, float_format
from fault_injection.numbers.formats import clearing, flipping, setting

# dtype, integer dtype of the same size, width, exponent bits, mantissa bits, the pattern of 1.0
FORMATS = [
    (torch.float64, torch.int64, 64, 11, 52, 0x3FF0_0000_0000_0000),
    (torch.float32, torch.int32, 32, 8, 23, 0x3F80_0000),
    (torch.bfloat16, torch.int16, 16, 8, 7, 0x3F80),
    (torch.float16, torch.int16, 16, 5, 10, 0x3C00),
    (torch.float8_e4m3fn, torch.int8, 8, 4, 3, 0x38),
    (torch.float8_e5m2, torch.int8, 8, 5, 2, 0x3C),
]
WIDTH = {dtype: width for dtype, _, width, _, _, _ in FORMATS}
INTEGER = {dtype: integer for dtype, integer, *_ in FORMATS}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in WIDTH]


def tensor_from(patterns: list[int], dtype: torch.dtype) -> Tensor:
    """Build a tensor from unsigned bit patterns without passing through floating-point arithmetic."""
    width = WIDTH[dtype]
    signed = [pattern - (1 << width) if pattern >= 1 << (width - 1) else pattern for pattern in patterns]
    return torch.tensor(signed, dtype=INTEGER[dtype]).view(dtype)


def patterns_in(tensor: Tensor) -> list[int]:
    """Read the patterns through NumPy, element by element in row-major order."""
    bits = tensor.detach().contiguous().view(INTEGER[tensor.dtype]).numpy()
    return [int(value) for value in bits.reshape(-1).view(f"uint{WIDTH[tensor.dtype]}")]


def special_patterns(dtype: torch.dtype) -> list[int]:
    """Zeros, the smallest subnormal, infinities or the largest numbers, NaNs with and without payload."""
    width, exponent, mantissa = next((w, e, m) for d, _, w, e, m, _ in FORMATS if d == dtype)
    all_ones, top = ((1 << exponent) - 1) << mantissa, 1 << (width - 1)
    positive = [0, 1, all_ones - 1, all_ones, all_ones | 1, all_ones | 1 << (mantissa - 1), (top - 1)]
    return positive + [pattern | top for pattern in positive]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[torch.dtype, list[int], int, list[int]]:
    """A dtype, patterns that favour the special ones, one position and some distinct bits."""
    dtype = draw(st.sampled_from(list(WIDTH)))
    any_pattern = st.integers(0, (1 << WIDTH[dtype]) - 1) | st.sampled_from(special_patterns(dtype))
    patterns = draw(st.lists(any_pattern, min_size=1, max_size=6))
    position = draw(st.integers(0, len(patterns) - 1))
    bits = draw(st.lists(st.integers(0, WIDTH[dtype] - 1), min_size=1, max_size=4, unique=True))
    return dtype, patterns, position, bits


# ---------------------------------------------------------------------------------------------- reading patterns


@pytest.mark.parametrize(("dtype", "integer", "width", "exponent", "mantissa", "one"), FORMATS, ids=str)
def test_format_is_that_of_the_standard(
    dtype: torch.dtype, integer: torch.dtype, width: int, exponent: int, mantissa: int, one: int
) -> None:
    layout = float_format(dtype)
    number = layout.number
    assert (layout.integer, layout.width, number.exponent, number.mantissa) == (integer, width, exponent, mantissa)
    assert 1 + exponent + mantissa == width
    assert bit_patterns(torch.tensor([1.0]).to(dtype)) == [one]
    assert bit_patterns(torch.tensor([-1.0]).to(dtype)) == [one | 1 << (width - 1)]
    assert bit_patterns(torch.tensor([-0.0]).to(dtype)) == [1 << (width - 1)]


@pytest.mark.parametrize(("dtype", "code"), [(torch.float64, "d"), (torch.float32, "f"), (torch.float16, "e")])
@given(value=st.floats(width=16))
def test_patterns_agree_with_struct(dtype: torch.dtype, code: str, value: float) -> None:
    if math.isnan(value):
        return
    expected = int.from_bytes(struct.pack(f"<{code}", value), "little")
    assert bit_patterns(torch.tensor([value], dtype=dtype)) == [expected]


@given(value=st.floats(width=16, allow_nan=False))
def test_bfloat16_patterns_are_the_upper_half_of_float32(value: float) -> None:
    narrow = torch.tensor([value], dtype=torch.bfloat16)
    upper = int.from_bytes(struct.pack("<f", float(narrow)), "little") >> 16
    assert bit_patterns(narrow) == [upper]


@given(case=tensors())
def test_patterns_come_back_as_written_with_nan_payloads(case: Any) -> None:
    dtype, patterns, _, _ = case
    assert bit_patterns(tensor_from(patterns, dtype)) == patterns


def test_patterns_are_read_in_row_major_order_whatever_the_strides() -> None:
    grid = torch.arange(6.0).reshape(2, 3)
    assert bit_patterns(grid.T) == bit_patterns(torch.tensor([0.0, 3.0, 1.0, 4.0, 2.0, 5.0]))
    assert bit_patterns(torch.tensor(1.0)) == [0x3F80_0000]
    assert bit_patterns(torch.empty(0)) == []


# ------------------------------------------------------------------------------------------------ known numbers


@pytest.mark.parametrize(
    ("dtype", "bit", "expected"),
    [
        (torch.float32, 30, math.inf),
        (torch.float32, 23, 0.5),
        (torch.float32, 31, -1.0),
        (torch.bfloat16, 14, math.inf),
        (torch.bfloat16, 15, -1.0),
        (torch.bfloat16, 7, 0.5),
        (torch.float16, 14, math.inf),
        (torch.float64, 62, math.inf),
        (torch.float8_e5m2, 6, math.inf),
        (torch.float8_e4m3fn, 6, 256.0),  # this format has no infinity
    ],
)
def test_one_with_a_flipped_bit(dtype: torch.dtype, bit: int, expected: float) -> None:
    assert float(flip_bits(torch.tensor([1.0]).to(dtype), 0, [bit]).to(torch.float64)) == expected


@pytest.mark.parametrize(("dtype", "integer", "width", "exponent", "mantissa", "one"), FORMATS, ids=str)
def test_each_bit_of_one_means_what_the_standard_says(
    dtype: torch.dtype, integer: torch.dtype, width: int, exponent: int, mantissa: int, one: int
) -> None:
    ones = torch.tensor([1.0]).to(dtype)
    for bit in range(width):
        value = float(flip_bits(ones, 0, [bit]).to(torch.float64))
        if bit < mantissa:
            assert (bit_field(dtype, bit), value) == ("mantissa", 1 + 2.0 ** (bit - mantissa))
        elif bit < width - 2:
            assert (bit_field(dtype, bit), value) == ("exponent", 2.0 ** -(2 ** (bit - mantissa)))
        elif bit == width - 2:
            assert bit_field(dtype, bit) == "exponent"
        else:
            assert (bit_field(dtype, bit), value) == ("sign", -1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_three_fields_partition_the_bits(dtype: torch.dtype) -> None:
    fields = {name: list(bits_in_field(dtype, name)) for name in ("mantissa", "exponent", "sign")}
    assert sorted(bit for bits in fields.values() for bit in bits) == list(range(WIDTH[dtype]))
    for name, bits in fields.items():
        assert {bit_field(dtype, bit) for bit in bits} == {name}


# ----------------------------------------------------------------------------------------------------- algebra


@given(case=tensors())
def test_flipping_twice_is_the_identity_on_patterns(case: Any) -> None:
    dtype, patterns, position, bits = case
    tensor = tensor_from(patterns, dtype)
    once = flip_bits(tensor, position, bits)
    assert patterns_in(once) != patterns
    assert patterns_in(flip_bits(once, position, bits)) == patterns
    assert patterns_in(tensor) == patterns, "the input was changed"


@pytest.mark.parametrize("rewrite", [set_bits, clear_bits])
@given(case=tensors())
def test_setting_and_clearing_are_idempotent(rewrite: Callable[..., Tensor], case: Any) -> None:
    dtype, patterns, position, bits = case
    once = rewrite(tensor_from(patterns, dtype), position, bits)
    assert patterns_in(rewrite(once, position, bits)) == patterns_in(once)


@given(case=tensors())
def test_flip_set_and_clear_agree_with_integer_arithmetic(case: Any) -> None:
    dtype, patterns, position, bits = case
    mask = sum(1 << bit for bit in bits)
    for rewrite, expected in (
        (flip_bits, patterns[position] ^ mask),
        (set_bits, patterns[position] | mask),
        (clear_bits, patterns[position] & ~mask),
    ):
        got = patterns_in(rewrite(tensor_from(patterns, dtype), position, bits))
        assert got == [*patterns[:position], expected, *patterns[position + 1 :]]


@given(case=tensors(), data=st.data())
def test_rewriting_many_elements_agrees_with_integer_arithmetic(case: Any, data: st.DataObject) -> None:
    dtype, patterns, _, _ = case
    mask = st.integers(0, (1 << WIDTH[dtype]) - 1)
    flat = data.draw(st.lists(st.integers(0, len(patterns) - 1), max_size=len(patterns), unique=True))
    keep, toggle = ([data.draw(mask) for _ in flat] for _ in range(2))
    expected = list(patterns)
    for position, kept, toggled in zip(flat, keep, toggle, strict=True):
        expected[position] = (expected[position] & kept) ^ toggled
    assert patterns_in(rewrite_bits(tensor_from(patterns, dtype), flat, keep, toggle)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_the_three_forms_of_one_rule(dtype: torch.dtype) -> None:
    everything = (1 << WIDTH[dtype]) - 1
    top = WIDTH[dtype] - 1
    mask = 1 | 1 << top
    layout = float_format(dtype).number
    pattern = layout.pattern([0, top])
    assert flipping(layout, pattern) == (everything, mask)
    assert setting(layout, pattern) == (everything & ~mask, mask)
    assert clearing(layout, pattern) == (everything & ~mask, 0)


# ----------------------------------------------------------------------------------------------------- layouts


def layouts() -> list[Any]:
    fused = torch.arange(2 * 3 * 12, dtype=torch.float32).reshape(2, 3, 12)
    return [
        pytest.param(fused, id="contiguous"),
        pytest.param(fused.transpose(1, 2), id="transposed"),
        pytest.param(fused[..., 4:8], id="slice of a fused tensor"),
        pytest.param(fused[..., 4:8].unflatten(-1, (2, 2)).transpose(1, 2), id="heads of a slice"),
        pytest.param(fused[:, ::2], id="every second row"),
        pytest.param(torch.arange(3.0).expand(2, 3), id="expanded"),
        pytest.param(torch.arange(3.0)[:, None, None].expand(3, 1, 1), id="axes of size 1"),
        pytest.param(torch.arange(6.0).unfold(0, 3, 1), id="overlapping windows"),
        pytest.param(torch.tensor(5.0), id="no dimension"),
    ]


@pytest.mark.parametrize("differentiable", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("tensor", layouts())
def test_only_the_chosen_element_changes_in_every_layout(tensor: Tensor, differentiable: bool) -> None:
    before = patterns_in(tensor)
    operand = tensor.detach().requires_grad_(differentiable)
    for position in range(tensor.numel()):
        after = patterns_in(flip_bits(operand, position, [31]))
        assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [position]
    assert patterns_in(tensor) == before, "the input was changed"


@pytest.mark.parametrize("differentiable", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("tensor", [case for case in layouts() if case.id not in ("expanded", "overlapping windows")])
def test_strides_are_kept(tensor: Tensor, differentiable: bool) -> None:
    operand = tensor.detach().requires_grad_(differentiable)
    faulty = flip_bits(operand, 0, [31])
    assert (faulty.shape, faulty.stride(), faulty.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


def test_the_copy_shares_no_memory_with_the_original() -> None:
    cache = torch.ones(2, 3)
    faulty = rewrite_bits(cache, [], [], [])
    faulty.fill_(7.0)
    assert torch.equal(cache, torch.ones(2, 3))


def test_a_tensor_made_in_inference_mode_can_be_rewritten() -> None:
    with torch.inference_mode():
        faulty = flip_bits(torch.ones(3), 1, [31])
    assert faulty.tolist() == [1.0, -1.0, 1.0]


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("dtype", "bit", "allowed"),
    [(torch.float32, 32, "0..31"), (torch.bfloat16, 16, "0..15"), (torch.float8_e5m2, -1, "0..7")],
)
def test_a_bit_that_does_not_exist_is_refused_with_the_range(dtype: torch.dtype, bit: int, allowed: str) -> None:
    name = str(dtype).removeprefix("torch.")
    tensor = torch.ones(1).to(dtype)
    for rewrite in (flip_bits, set_bits, clear_bits):
        with pytest.raises(ValueError, match=rf"bit: got {bit}, allowed {allowed} for {name}"):
            rewrite(tensor, 0, [bit])
    with pytest.raises(ValueError, match=rf"got {bit}, allowed {allowed}"):
        bit_field(dtype, bit)


def test_a_repeated_bit_is_refused() -> None:
    with pytest.raises(ValueError, match="bit: 3 is given twice"):
        flip_bits(torch.ones(1), 0, [3, 5, 3])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_other_dtypes_are_refused_with_the_allowed_ones(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"got {dtype}, allowed float64, float32, bfloat16, float16"):
        flip_bits(torch.ones(2).to(dtype), 0, [1])


@pytest.mark.parametrize("position", [3, -1])
def test_a_position_that_does_not_exist_is_refused(position: int) -> None:
    with pytest.raises(IndexError, match=rf"element {position} does not exist in a tensor of 3 elements"):
        flip_bits(torch.ones(3), position, [1])


def test_repeated_positions_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must be distinct"):
        rewrite_bits(torch.ones(3), [1, 1], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="got 2 positions, 1 keep masks, 2 toggle masks"):
        rewrite_bits(torch.ones(3), [0, 1], [0], [0, 0])


@pytest.mark.parametrize("mask", [1 << 32, (1 << 32) + 5, 1 << 60, -1])
def test_a_mask_wider_than_the_dtype_is_refused(mask: int) -> None:
    everything = (1 << 32) - 1
    for keep, toggle in ((mask, 0), (everything, mask)):
        with pytest.raises(ValueError, match="mask"):
            rewrite_bits(torch.ones(3), [1], [keep], [toggle])


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'fraction', allowed sign, exponent, mantissa"):
        bits_in_field(torch.float32, "fraction")


# --------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("bit", [0, 23, 30, 31])
def test_the_gradient_of_a_rewrite_is_the_identity(bit: int) -> None:
    clean = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    upstream = torch.tensor([5.0, 7.0, 11.0])
    faulty = flip_bits(clean, 1, [bit])
    faulty.backward(upstream)
    assert clean.grad is not None
    assert torch.equal(clean.grad, upstream)
    assert patterns_in(faulty)[1] == patterns_in(clean)[1] ^ 1 << bit


def test_the_gradient_reaches_what_lies_before_the_fault_even_through_a_nan() -> None:
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    faulty = rewrite_bits(weight * 3, [0], [0], [0x7FF8_0000_0000_0001])
    faulty.sum().backward()
    assert torch.isnan(faulty[0, 0])
    assert weight.grad is not None
    assert weight.grad.tolist() == [[3.0, 3.0]]


def test_no_graph_is_built_for_a_tensor_that_needs_none() -> None:
    assert not flip_bits(torch.ones(1), 0, [1]).requires_grad
    with torch.no_grad():
        assert not flip_bits(torch.ones(1, requires_grad=True), 0, [1]).requires_grad


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_rewrites_the_same_bits(dtype: torch.dtype) -> None:
    random = np.random.default_rng(1)
    patterns = [int.from_bytes(random.bytes(8), "little") % (1 << WIDTH[dtype]) for _ in range(40)]
    tensor = tensor_from(patterns, dtype).view(5, 8).T
    keep, toggle = [(1 << WIDTH[dtype]) - 2] * 3, [1 << (WIDTH[dtype] - 1)] * 3
    on_cpu = rewrite_bits(tensor, [0, 7, 39], keep, toggle)
    on_gpu = rewrite_bits(tensor.cuda(), [0, 7, 39], keep, toggle)
    assert on_gpu.stride() == on_cpu.stride()
    assert bit_patterns(on_gpu) == patterns_in(on_cpu)
