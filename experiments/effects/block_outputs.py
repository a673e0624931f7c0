"""How far faults move the outputs of a model's blocks: the residual stream after each block.

    outputs = BlockOutputs.of(hidden, real)                      # of the fault-free pass, once for each input
    outputs.changes(3, rows, values, runs, num_runs=8)           # after block 3, of 8 runs together

Rows (b, t) that a fault leaves bitwise unchanged contribute nothing, so only the rows that differ enter the
computation. The bits of a run's result do not depend on the other runs (``experiments.effects.row_kernels``).

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
    """The outputs of the blocks in one fault-free pass of B sequences of T tokens; rows are numbered ``b * T + t``.

    Attributes:
        rows: for each block, (B * T, D), of the model's dtype.
        real: (B * T,) bool, False at padding, which does not count.
        sizes: for each block, the L2 norm of all rows that count; NaN if they are not finite.
    """

    rows: tuple[Tensor, ...]
    real: Tensor
    sizes: tuple[float, ...]

    @classmethod
    @quiet
    def of(cls, hidden: Sequence[Tensor], real: Tensor) -> BlockOutputs:
        """Return the outputs of blocks; keep references, not copies.

        Args:
            hidden: for each block, (B, T, D).
            real: (B * T,) bool.
        """
        rows = tuple(each.flatten(0, 1) for each in hidden)
        return cls(rows, real, tuple(_size(each, real) for each in rows))

    @quiet
    def changes(self, number: int, rows: Tensor, values: Tensor, runs: Tensor, num_runs: int) -> list[float]:
        """Return the L2 change of a block's output, relative to the L2 norm of the fault-free output.

        Both norms are taken over the whole batch without padding, as in ``Effect.relative_change``.

        Args:
            number: The number of the block.
            rows: (N,) int64, the rows that differ bitwise from the fault-free ones; each at most once per run.
            values: (N, D), the values of these rows.
            runs: (N,) int64, the run of each row, ``0 .. num_runs - 1``, in any order.
            num_runs: R.

        Returns:
            One number for each run: exactly 0 without a change, infinite or NaN if the run is not finite or the
            fault-free output is all zeros, and NaN if the fault-free pass is not finite.
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
