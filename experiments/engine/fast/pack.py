"""Packs: rows of many runs as one tensor, so that one call of a block serves all of them.

A *row* is a token position of the batch, numbered ``sequence * T + position``. A pack holds for every run in it the
rows that its fault can have changed, from the first to the end of the sequence (a *stretch*), and rows of a run
without a fault that fill the last tile: they must stay what they are in the fault-free pass.

>>> pack = Pack.of([Stretch(0, 0, 61), Stretch(1, 1, 60)], length=64)
>>> pack.rows.tolist()[:7], len(pack.rows), pack.owner.tolist()[:8]
([61, 62, 63, 124, 125, 126, 127], 16, [0, 0, 0, 1, 1, 1, 1, -1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.inputs.blocks import Arguments

TILE = 16
"""Rows of a pack are a multiple of this: the bits of a matrix product's row may differ in products of a few rows."""

CONTROL = -1
"""The run without a fault."""


@dataclass(frozen=True)
class Stretch:
    """The rows of one run: those of ``sequence`` from position ``start`` to its end."""

    run: int
    sequence: int
    start: int


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows of runs.

    Attributes:
        rows: (N,) int64, row numbers; N is a multiple of TILE.
        owner: (N,) int64, the run of each row.
        stretches: those the rows belong to, in order, the one of the control run last.
        ends: for each stretch, where its rows end.
    """

    rows: Tensor
    owner: Tensor
    stretches: tuple[Stretch, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, stretches: Sequence[Stretch], length: int, device: torch.device | str = "cpu") -> Pack:
        """Return the pack of some stretches of sequences of ``length`` tokens (at least TILE), filled up."""
        count = sum(length - stretch.start for stretch in stretches)
        filling = TILE - count % TILE
        every = (*stretches, Stretch(CONTROL, 0, length - filling))
        counts = torch.tensor([length - stretch.start for stretch in every])
        first = torch.tensor([stretch.sequence * length + stretch.start for stretch in every])
        ends = counts.cumsum(0)
        within = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
        owner = torch.tensor([stretch.run for stretch in every]).repeat_interleave(counts)
        rows = first.repeat_interleave(counts) + within
        return cls(rows.to(device), owner.to(device), every, tuple(ends.tolist()))

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each stretch, where its rows begin and end."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))


def tiled(rows: Tensor) -> Tensor:
    """Return (N, ...) rows as (N / TILE, TILE, ...): sequences of one length, for modules that expect some."""
    return rows.unflatten(0, (-1, TILE))


def packed_arguments(arguments: Arguments, rows: Tensor, shape: tuple[int, int]) -> Arguments:
    """Return the arguments of a block, as recorded for (B, T) tokens, for the rows of a pack.

    Tensors that have one entry a token (rotation tables, position numbers) are taken at the rows; all others stay. What
    should have been taken and was not, or the other way round, makes the start-up proof fail.
    """
    sequences, length = shape
    position, sequence = rows % length, rows // length

    def at_rows(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(at_rows(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        if value.dim() == 1 and value.shape[0] == length:
            return tiled(value[position])
        if value.dim() in (2, 3) and value.shape[0] in (1, sequences) and value.shape[1] == length:
            return tiled(value[sequence if value.shape[0] == sequences else 0, position])
        return value

    args, kwargs = arguments
    return tuple(at_rows(value) for value in args), {name: at_rows(value) for name, value in kwargs.items()}
