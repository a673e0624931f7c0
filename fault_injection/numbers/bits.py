"""Bit patterns of floating-point tensors, and how faults change them.

A fault on one element is ``new = (old & keep) ^ toggle`` on its IEEE bit pattern. That one form covers flips
(``keep`` all ones), stuck-at-0 and stuck-at-1, zeroing and replacement, keeps NaN payloads, and never passes
through floating-point arithmetic.

Bit 0 is the least significant mantissa bit, the highest bit is the sign (IEEE 754 numbering); the formats themselves
are rows of ``fault_injection.numbers.formats``.

>>> import torch
>>> one = torch.tensor([1.0])
>>> [float(flip_bits(one, 0, [bit])) for bit in (30, 23, 31)]
[inf, 0.5, -1.0]
>>> bit_field(torch.bfloat16, 14)
'exponent'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fault_injection.numbers.formats import FORMATS, NumberFormat, clearing, flipping, setting


@dataclass(frozen=True)
class FloatFormat:
    """Layout of one floating-point dtype of torch.

    Attributes:
        dtype: the dtype.
        integer: the signed integer dtype of the same width.
        number: its row in the table of formats.
    """

    dtype: torch.dtype
    integer: torch.dtype
    number: NumberFormat

    @property
    def width(self) -> int:
        """The number of bits of a number."""
        return self.number.bits

    @property
    def all_bits(self) -> int:
        """The pattern with every bit set, as a non-negative integer."""
        return self.number.all_bits

    def signed(self, pattern: int) -> int:
        """Return ``pattern`` as the two's-complement value of the signed integer view."""
        return pattern - (1 << self.width) if pattern >> (self.width - 1) else pattern


def float_format(dtype: torch.dtype) -> FloatFormat:
    """Return the layout of ``dtype``; ``ValueError`` names the supported dtypes for any other."""
    name = str(dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise ValueError(f"bit faults need a floating-point dtype: got {dtype}, allowed {', '.join(FORMATS.names())}")
    number = FORMATS[name]
    return FloatFormat(dtype, getattr(torch, f"int{number.bits}"), number)


def bit_field(dtype: torch.dtype, bit: int) -> str:
    """Return the field of ``bit``: ``sign``, ``exponent`` or ``mantissa``; raise ``ValueError`` if out of range."""
    return float_format(dtype).number.field_of(bit)


def bits_in_field(dtype: torch.dtype, field: str) -> range:
    """Return the bit numbers of a field of ``dtype`` (``sign``, ``exponent``, ``mantissa``)."""
    return float_format(dtype).number.bits_of(field)


def check_bits(bits: Iterable[int], dtype: torch.dtype) -> None:
    """Raise ``ValueError`` with the allowed range unless every bit exists in ``dtype`` and none is repeated."""
    float_format(dtype).number.check(bits)


def bit_patterns(tensor: Tensor) -> list[int]:
    """Return the bit pattern of every element, in order, as non-negative integers."""
    layout = float_format(tensor.dtype)
    flat = tensor.detach().contiguous().view(layout.integer).flatten().tolist()
    return [int(value) & layout.all_bits for value in flat]


def rewrite_bits(tensor: Tensor, flat_index: Sequence[int], keep: Sequence[int], toggle: Sequence[int]) -> Tensor:
    """Return a copy of ``tensor`` with ``(old & keep) ^ toggle`` applied to the pattern of the chosen elements.

    Args:
        tensor: any shape, a floating-point dtype of this module; it is not changed.
        flat_index: distinct positions in the row-major flattening of ``tensor``.
        keep: for each position, the mask of bits that survive (non-negative integers).
        toggle: for each position, the mask of bits that are then flipped (exclusive or).

    Returns:
        A tensor of the same shape, dtype and strides: the bits of a matrix product can depend on the memory layout of
        its factors, and a fault must change nothing else. Gradients flow through unchanged elements, and through
        changed ones as the identity (straight-through): a bit flip has no derivative of its own.

    Raises:
        ValueError: the dtype has no known layout, positions are repeated, or the lengths differ.
        IndexError: a position does not exist.
    """
    layout = float_format(tensor.dtype)
    if not len(flat_index) == len(keep) == len(toggle):
        raise ValueError(f"got {len(flat_index)} positions, {len(keep)} keep masks, {len(toggle)} toggle masks")
    if len(set(flat_index)) != len(flat_index):
        raise ValueError("the positions of one fault must be distinct")
    for mask in (*keep, *toggle):
        if not 0 <= mask <= layout.all_bits:
            raise ValueError(f"mask: got {mask:#x}, allowed 0..{layout.all_bits:#x} for {tensor.dtype}")
    for position in flat_index:
        if not 0 <= position < tensor.numel():
            raise IndexError(f"element {position} does not exist in a tensor of {tensor.numel()} elements")
    faulty = _clone_with_strides(tensor.detach())
    patterns = faulty.view(layout.integer)
    flat = torch.tensor(flat_index, dtype=torch.int64, device=tensor.device)
    where = torch.unravel_index(flat, tensor.shape) if tensor.dim() else ()
    kept = torch.tensor([layout.signed(m) for m in keep], dtype=layout.integer, device=tensor.device)
    toggled = torch.tensor([layout.signed(m) for m in toggle], dtype=layout.integer, device=tensor.device)
    patterns[where] = (patterns[where] & kept) ^ toggled
    if not tensor.requires_grad:
        return faulty
    straight: Tensor = _StraightThrough.apply(tensor, faulty)  # type: ignore[no-untyped-call]
    return straight


def _clone_with_strides(tensor: Tensor) -> Tensor:
    if _may_overlap(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)
    clone = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return clone.copy_(tensor)


def _may_overlap(tensor: Tensor) -> bool:
    """Return whether two elements may share memory (expanded or windowed views): one rewrite would change both."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


class _StraightThrough(torch.autograd.Function):
    """The faulty value forward, the identity backward; it is exact, while ``clean + (faulty - clean)`` would round."""

    @staticmethod
    def forward(ctx: object, clean: Tensor, faulty: Tensor) -> Tensor:
        return _clone_with_strides(faulty)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def flip_bits(tensor: Tensor, flat_index: int, bits: Iterable[int]) -> Tensor:
    """Return a copy of ``tensor`` with ``bits`` of one element flipped; twice is the identity."""
    return _rewritten(tensor, flat_index, bits, flipping)


def set_bits(tensor: Tensor, flat_index: int, bits: Iterable[int]) -> Tensor:
    """Return a copy of ``tensor`` with ``bits`` of one element set to 1 (stuck-at-1)."""
    return _rewritten(tensor, flat_index, bits, setting)


def clear_bits(tensor: Tensor, flat_index: int, bits: Iterable[int]) -> Tensor:
    """Return a copy of ``tensor`` with ``bits`` of one element cleared to 0 (stuck-at-0)."""
    return _rewritten(tensor, flat_index, bits, clearing)


def _rewritten(
    tensor: Tensor, flat_index: int, bits: Iterable[int], masks: Callable[[NumberFormat, int], tuple[int, int]]
) -> Tensor:
    layout = float_format(tensor.dtype).number
    keep, toggle = masks(layout, layout.pattern(bits))
    return rewrite_bits(tensor, [flat_index], [keep], [toggle])
