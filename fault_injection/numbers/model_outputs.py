"""Compare what two forward passes of a model returned, bit by bit.

>>> import torch
>>> bitwise_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
True
>>> bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
False
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fault_injection.numbers.bits import float_format


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output in order; caches and other objects are left out."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in output_tensors(value)]
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in output_tensors(value)]
    return []


def bitwise_equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bit patterns (NaN equals the same NaN, 0.0 is not -0.0)."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    integer = float_format(left.dtype).integer
    return torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))


def bitwise_equal_outputs(left: Any, right: Any) -> bool:
    """Whether two outputs hold the same tensors, at least one, bitwise and in the same order."""
    lefts, rights = output_tensors(left), output_tensors(right)
    return 0 < len(lefts) == len(rights) and all(bitwise_equal(a, b) for a, b in zip(lefts, rights, strict=True))
