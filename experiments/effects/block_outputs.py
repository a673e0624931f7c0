"""How far faults move what the blocks of a model return: the residual stream behind each of them.

    outputs = BlockOutputs.of(hidden, real)                      # of the fault-free pass, once for each input
    outputs.changes(3, rows, values, runs, num_runs=8)           # behind block 3, of 8 runs together

Rows (b, t) that a fault leaves bitwise as they are contribute nothing, so the rows alone that differ are computed with.
A number has the same bits whichever runs are measured with it (``experiments.effects.row_kernels``).

Public name: ``BlockOutputs``.

>>> outputs = BlockOutputs.of([torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])], torch.tensor([True, True]))
>>> outputs.changes(0, torch.tensor([1]), torch.tensor([[0.0, 5.0]]), torch.tensor([1]), num_runs=2)
[0.0, 0.2]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.effects.row_kernels import Array, as_array, as_tensor, joined, pieces, quiet, row_norms


@dataclass(frozen=True, eq=False)
class BlockOutputs:
    """What the blocks return in one fault-free pass of B sequences of T tokens; rows are numbered ``b * T + t``.

    Attributes:
        rows: by block, (B * T, D), of the model's dtype.
        real: (B * T,) bool, False at padding, which does not count.
        sizes: by block, the L2 norm of all rows that count; NaN where they are not finite.
    """

    rows: tuple[Tensor, ...]
    real: Tensor
    sizes: tuple[float, ...]

    @classmethod
    @quiet
    def of(cls, hidden: Sequence[Tensor], real: Tensor) -> BlockOutputs:
        """Keep (references to) what blocks returned.

        Args:
            hidden: by block, (B, T, D).
            real: (B * T,) bool.
        """
        rows = tuple(each.flatten(0, 1) for each in hidden)
        return cls(rows, real, tuple(_size(each, real) for each in rows))

    @quiet
    def changes(self, number: int, rows: Tensor, values: Tensor, runs: Tensor, num_runs: int) -> list[float]:
        """Return the L2 change of what a block returns, relative to the L2 norm of the fault-free one.

        Both norms are those of the whole batch without padding, as ``Effect.relative_change`` takes them.

        Args:
            number: Of the block.
            rows: (N,) int64, the rows that are not bitwise the fault-free ones; each at most once a run.
            values: (N, D), what they are.
            runs: (N,) int64, whose they are, ``0 .. num_runs - 1``, in any order.
            num_runs: R.

        Returns:
            One for each run; exactly 0 without a change, infinite or NaN where the run is not finite or there was
            nothing but zeros, and NaN where the fault-free pass is not finite.
        """
        table = torch.zeros((num_runs, len(self.real)), dtype=torch.float64, device=values.device)
        table[runs, rows] = as_tensor(_norms(values, self.rows[number], rows))
        table.masked_fill_(~self.real, 0.0)
        lengths = as_tensor(row_norms(as_array(table)))
        relative: list[float] = torch.where(lengths == 0.0, 0.0, lengths / self.sizes[number]).tolist()
        return relative


def _size(rows: Tensor, real: Tensor) -> float:
    norms = as_tensor(joined([row_norms(as_array(rows[piece].double())) for piece in pieces(*rows.shape)]))
    size = float(row_norms(as_array(norms.where(real, 0.0).unsqueeze(0)))[0])
    return size if math.isfinite(size) else math.nan


def _norms(values: Tensor, clean: Tensor, rows: Tensor) -> Array:
    """Return the Euclidean norms of the changes of rows, (N,) float64."""

    def change(piece: slice) -> Array:
        return as_array(values[piece].double() - clean.index_select(0, rows[piece]).double())

    return joined([row_norms(change(piece)) for piece in pieces(*values.shape)])
