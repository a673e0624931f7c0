"""How far a fault moved the attention output of its own layer.

>>> import torch
>>> clean = torch.ones(1, 2, 1, 4)
>>> faulty = clean.clone(); faulty[0, 1, 0, 2] = 3.0
>>> local_changes(faulty, clean, torch.tensor([8.0]).sqrt().double())[0].largest
2.0
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LocalChange:
    """The change of the attention output of one sequence.

    Attributes:
        relative: L2 norm of the change, divided by the L2 norm of the fault-free output of all heads.
        largest: the largest absolute change of an element.
    """

    relative: float
    largest: float


def output_lengths(out: Tensor) -> Tensor:
    """Return the L2 norm of the attention output (B, T, H, d_v) of every sequence, (B,) float64."""
    return out.contiguous().double().square().flatten(2).sum(-1).sum(-1).sqrt()


def local_changes(out: Tensor, expected: Tensor, lengths: Tensor) -> list[LocalChange]:
    """Return the change of each of F outputs.

    Args:
        out: (F, T, G, d_v), the output of the group of heads that each fault hit.
        expected: the same output in the fault-free pass.
        lengths: (F,) float64, L2 norm of the fault-free output of all heads of the sequence.
    """
    change = (out.contiguous().double() - expected.contiguous().double()).flatten(2)
    moved = change.square().sum(-1).sum(-1).sqrt() / lengths
    largest = change.abs().flatten(1).amax(-1)
    return [LocalChange(*numbers) for numbers in zip(moved.tolist(), largest.tolist(), strict=True)]
