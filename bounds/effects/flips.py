"""One bit flipped in every element of a tensor, each separately, and the effect of each of these faults.

>>> flipped(torch.tensor([1.0, -2.0]), 31).tolist()
[-1.0, 2.0]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.effects.head_terms import HeadTerms
from fault_injection.numbers.bits import float_format


@dataclass(frozen=True, eq=False)
class Flips:
    """One bit flipped in every element of one tensor of one head, each alone; all tensors (rows, columns).

    Attributes:
        location: ``q k v scores weights masked weights out``.
        bit: which one.
        origin: batch and head of the tensor; a key/value head for k and v.
        before: the tensor in its own dtype.
        after: the same with the bit flipped.
        effect: float64, Frobenius norm of the predicted change of out, over all rows and heads it reaches.
        relative: largest change of a row in units of that row's length.
        noise_ratio: largest change of an element of out in units of the rounding bound of its clean evaluation (P4).
        loss: predicted change of the loss, first order.
        nonfinite: whether the flip gives NaN or Inf, or leaves a row without a finite logit (what then happens is up to
            the mask); the four numbers above then mean nothing.
        counted: whether the element belongs to the location (a visible score, for example).
    """

    location: str
    bit: int
    origin: tuple[int, int]
    before: Tensor
    after: Tensor
    effect: Tensor
    relative: Tensor
    noise_ratio: Tensor
    loss: Tensor
    nonfinite: Tensor
    counted: Tensor


def flipped(tensor: Tensor, bit: int) -> Tensor:
    """Return a copy of ``tensor`` with ``bit`` of every element flipped."""
    layout = float_format(tensor.dtype)
    return (tensor.contiguous().view(layout.integer) ^ layout.signed(1 << bit)).view(tensor.dtype)


def overflowed(scores: Tensor, limit: float) -> Tensor:
    """Return the scores as a format whose largest number is ``limit`` holds them: what is beyond it overflows."""
    return torch.where(scores.abs() > limit, scores.sign() * torch.inf, scores)


def group_of(readers: list[HeadTerms], before: Tensor) -> tuple[tuple[int, int], Tensor]:
    """Return batch and key/value head of a group of query heads, and which of its keys some query sees."""
    first = readers[0]
    seen = torch.stack([terms.view.visible.any(0) for terms in readers]).any(0)
    origin = first.batch, first.head // len(readers)
    return origin, seen[: before.shape[0], None].expand(before.shape)
