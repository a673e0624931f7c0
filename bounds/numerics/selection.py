"""Entries that no quantity may read are set to 0 by their bits, whatever they hold: 0 times Inf would be NaN.

    seen = selection(visible, logits.dtype)
    selected(logits, seen)                       # as torch.where(visible, logits, 0.0), in a quarter of the time

>>> seen = selection(torch.tensor([True, False, True]), torch.float32)
>>> selected(torch.tensor([1.5, float("nan"), -2.0]), seen).tolist()
[1.5, 0.0, -2.0]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def selection(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return integers as wide as ``dtype``, all of whose bits are set where ``visible`` is True, and none elsewhere."""
    return -visible.to(_INTEGERS[dtype.itemsize])


def selected(values: Tensor, seen: Tensor | None) -> Tensor:
    """Return ``values`` with 0 where ``seen``, broadcastable to it, has no bits; ``values`` itself for None."""
    return values if seen is None else (values.view(seen.dtype) & seen).view(values.dtype)


@dataclass(frozen=True, eq=False)
class Masks:
    """What hides the logits and weights of rows; all of their shape.

    Attributes:
        hidden: to be added to a logit: -Inf where it is hidden, else 0.
        logits, weights: ``selection`` for their formats.
    """

    hidden: Tensor
    logits: Tensor
    weights: Tensor

    @classmethod
    def of(cls, visible: Tensor, logits: Tensor, weights: Tensor) -> Masks:
        """Return the masks of ``visible``, broadcastable to ``logits`` and ``weights``, (..., T, S)."""
        hidden = torch.where(visible, 0.0, -math.inf).to(logits.dtype)
        masks = hidden, selection(visible, logits.dtype), selection(visible, weights.dtype)
        return cls(*(mask.expand(logits.shape) for mask in masks))

    def block(self, block: tuple[slice, ...]) -> Masks:
        """Return the masks of some of the rows."""
        return Masks(self.hidden[block], self.logits[block], self.weights[block])
