"""Sums along the lines of a tensor, in float64, with the sums of the magnitudes.

    sums = line_sums(scores.mT)                # total and size (B, H, S, 1): one sum a column
    sums = line_sums(scores, width=32)         # (B, H, T, S / 32): one sum a tile of 32 neighbours

The tensor is converted block by block: what is temporary is one block, whatever the size of the layer.

Public names: ``LineSums``, ``line_sums``, ``line_totals``, ``absolute``, ``LINE_ELEMENTS``.

>>> stored = torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]])
>>> line_sums(stored, width=2).total.tolist(), line_sums(stored.mT).size[:, 0].tolist()
([[3.0, -3.0], [9.0, 6.0]], [5.0, 7.0, 9.0])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.blocks import BLOCK_ELEMENTS, row_blocks

LINE_ELEMENTS = 4 * BLOCK_ELEMENTS
"""Elements of one block here. These loops keep one float64 temporary alive and not six, so it may be larger: 1 MB.
At four sequences of twelve heads of 128 rows, 2**15 costs a quarter more than 2**17, and 2**17 5 % more than one
block for all."""


@dataclass(frozen=True, eq=False)
class LineSums:
    """Sums of the entries of lines, or of parts of lines.

    Attributes:
        total: float64.
        size: float64, the same sums of the magnitudes.
    """

    total: Tensor
    size: Tensor


@torch.no_grad()
def line_sums(tensor: Tensor, width: int | None = None) -> LineSums:
    """Return the sums of neighbours along the last axis, and of their magnitudes, both (..., tiles).

    Args:
        tensor: (..., N), any float dtype and any strides: pass a transposed tensor for the sums of its columns.
        width: number of neighbours in a sum; the last tile may have fewer. None: the whole line is one tile.
    """
    width = width or max(tensor.shape[-1], 1)
    total = _empty(tensor, width)
    size = torch.empty_like(total)
    for block in row_blocks(tuple(tensor.shape[:-1]), tensor.shape[-1], LINE_ELEMENTS):
        part = tensor[block].double()
        total[block] = _tiles(part, width)
        size[block] = _tiles(absolute(part, tensor), width)
    return LineSums(total, size)


@torch.no_grad()
def line_totals(tensor: Tensor, width: int | None = None) -> Tensor:
    """Return the sums alone, (..., tiles) float64. Arguments as for ``line_sums``."""
    width = width or max(tensor.shape[-1], 1)
    total = _empty(tensor, width)
    for block in row_blocks(tuple(tensor.shape[:-1]), tensor.shape[-1], LINE_ELEMENTS):
        total[block] = _tiles(tensor[block].double(), width)
    return total


def absolute(part: Tensor, source: Tensor) -> Tensor:
    """Return ``|part|``, in place if ``part``, a piece of ``source`` in float64, is a copy of it."""
    return part.abs() if source.dtype == torch.float64 else part.abs_()


def _empty(tensor: Tensor, width: int) -> Tensor:
    shape = (*tensor.shape[:-1], -(-tensor.shape[-1] // width))
    return torch.empty(shape, dtype=torch.float64, device=tensor.device)


def _tiles(values: Tensor, width: int) -> Tensor:
    length = values.shape[-1]
    if width == length:
        return values.sum(-1, keepdim=True)
    whole = length // width * width
    total = values[..., :whole].unflatten(-1, (whole // width, width)).sum(-1)
    return total if whole == length else torch.cat([total, values[..., whole:].sum(-1, keepdim=True)], -1)
