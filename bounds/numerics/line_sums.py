"""Sums along the lines of a tensor, in float64, with the sums of the magnitudes.

    sums = line_sums(scores, columns=True)     # total and size (B, H, S, 1): one sum a column
    sums = line_sums(scores, width=32)         # (B, H, T, S / 32): one sum a tile of 32 neighbours

The tensor is converted block by block, so temporary memory is one block for any size of the layer. The bits of a sum
depend only on its own entries (``bounds.numerics.fixed_order``).

>>> stored = torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]])
>>> line_sums(stored, width=2).total.tolist(), line_sums(stored, columns=True).size[:, 0].tolist()
([[3.0, -3.0], [9.0, 6.0]], [5.0, 7.0, 9.0])
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.numerics.blocks import BLOCK_ELEMENTS, row_blocks
from bounds.numerics.fixed_order import folded, wide

LINE_ELEMENTS = 4 * BLOCK_ELEMENTS
"""Elements of one block here. These loops keep one float64 temporary alive and not six, so it may be larger: 1 MB.
At four sequences of twelve heads of 128 rows, 2**15 costs a quarter more than 2**17, and 2**17 5 % more than one
block for all."""

_FEW = 8


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
def line_sums(tensor: Tensor, width: int | None = None, *, columns: bool = False) -> LineSums:
    """Return the sums of neighbours along the last axis, and of their magnitudes, both (..., tiles).

    Args:
        tensor: (..., N), any float dtype and any strides.
        width: number of neighbours in a sum; the last tile may have fewer. None: the whole line is one tile.
        columns: whether the lines are the columns of a tensor (..., M, N): the sums are (..., N, tiles) then.
    """
    total = _empty(tensor, width, columns)
    size = torch.empty_like(total)
    for block, part in _parts(tensor, columns):
        total[block] = _tiles(part, width, columns)
        size[block] = _tiles(absolute(part, tensor), width, columns)
    return LineSums(total, size)


@torch.no_grad()
def line_totals(tensor: Tensor, width: int | None = None, *, columns: bool = False) -> Tensor:
    """Return the sums alone, (..., tiles) float64. Arguments as for ``line_sums``."""
    total = _empty(tensor, width, columns)
    for block, part in _parts(tensor, columns):
        total[block] = _tiles(part, width, columns)
    return total


def absolute(part: Tensor, source: Tensor) -> Tensor:
    """Return ``|part|``, in place if ``part``, a piece of ``source`` in float64, is a copy of it."""
    return part.abs() if source.dtype == torch.float64 else part.abs_()


def _parts(tensor: Tensor, columns: bool) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Yield index and values, in float64, of every block of lines."""
    lines = (*tensor.shape[:-2], tensor.shape[-1]) if columns else tuple(tensor.shape[:-1])
    length = tensor.shape[-2] if columns else tensor.shape[-1]
    for block in row_blocks(lines, length, LINE_ELEMENTS):
        yield block, tensor[*block[:-1], :, block[-1]].double() if columns else wide(tensor[block])


def _empty(tensor: Tensor, width: int | None, columns: bool) -> Tensor:
    length = tensor.shape[-2] if columns else tensor.shape[-1]
    lines = (*tensor.shape[:-2], tensor.shape[-1]) if columns else tensor.shape[:-1]
    tiles = -(-length // (width or max(length, 1)))
    return torch.empty((*lines, tiles), dtype=torch.float64, device=tensor.device)


def _tiles(values: Tensor, width: int | None, columns: bool) -> Tensor:
    axis = -2 if columns else -1
    length = values.shape[axis]
    if width is None or width >= length:
        return _whole(values, columns).unsqueeze(-1)
    whole = length // width * width
    parts = [_whole(values.narrow(axis, 0, whole).unflatten(axis, (whole // width, width)), columns)]
    if columns:
        parts[0] = parts[0].mT
    if whole < length:
        parts.append(_whole(values.narrow(axis, whole, length - whole), columns).unsqueeze(-1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _whole(values: Tensor, columns: bool) -> Tensor:
    if columns:
        return folded(values)
    if not 0 < values.shape[-1] <= _FEW:
        return values.sum(-1)
    # Adding slices is twice as fast as summing over so short an axis.
    total = values[..., 0]
    for entry in range(1, values.shape[-1]):
        total = total + values[..., entry]
    return total
