"""The base class of the detectors of the two matrix products: one equation per row, and when it can be judged."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck, RowDetector
from bounds.numerics.rounding import reduced_precision
from bounds.softmax.softmax_sums import visible_counts


class ProductDetector(RowDetector):
    """Base class: subclasses give the equation as a function of the state, whose result is kept with the state.

    Class attributes:
        operand: name of the tensor whose format decides in which precision the product ran.
    """

    per_group = True
    operand: ClassVar[str]

    @staticmethod
    @abstractmethod
    def equation(state: AttentionState) -> RowCheck:
        """Return residuals and tolerances of a state to which the equation applies."""

    def derive(self, state: AttentionState) -> None:
        """Compute residuals and tolerances."""
        if self.applicable(state) is None:
            state.derived(self.equation)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the product's rounding errors have no bound, or None when they have."""
        return super().applicable(state) or reduced_precision(getattr(state, self.operand))

    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return every row of the equation."""
        return state.derived(self.equation)


def required(state: AttentionState, name: str) -> Tensor:
    """Return an optional tensor of a state that must carry it. Raises ValueError when it does not."""
    tensor: Tensor | None = getattr(state, name)
    if tensor is None:
        raise ValueError(f"{name}: got None, allowed a state that carries it")
    return tensor


def key_counts(state: AttentionState) -> Tensor:
    """Return the number of keys each row may give mass to, (1 or B, 1 or H, 1 or T); all of them for an empty row."""
    counts = state.derived(visible_counts)
    return torch.where(counts > 0, counts, state.logits.shape[-1])


def value_product(state: AttentionState) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return mass and output, and which rows see any key, (1 or B, 1 or H, 1 or T); None where all do.

    Rows that see none are set to 0: softmax is undefined there, and what an implementation leaves may be NaN.
    """
    mass, out, seen = required(state, "mass"), state.out, state.derived(visible_counts) > 0
    if bool(seen.all()):
        return mass, out, None
    empty = ~seen[..., None]
    return mass.masked_fill(empty, 0.0), out.masked_fill(empty, 0.0), seen
