"""Sums and products in float64 with bits that depend only on their own terms.

A library may add the same terms in another order if the tensor has more columns or matrices, if its memory is aligned
differently, or if the process has more threads. The verdict on one sequence must not depend on the other sequences of
the batch, so sums across rows and matrix products that feed a verdict use this module.

    wide(tensor).sum(-1)                  # rows
    folded(tensor.double())               # columns
    inner_products(lines, rows)           # (b, h, L, p) and (b, h, M, p) -> (b, h, L, M)

>>> folded(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])).tolist()
[9.0, 12.0]
>>> ones = torch.ones(1, 1, 2, 3, dtype=torch.float64)
>>> inner_products(ones, 2 * ones).tolist()
[[[[6.0, 6.0], [6.0, 6.0]]]]
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_FEW_LINES = 4
_CACHE_LINE = 64


def wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float64 with the entries of a row side by side: other rows are summed in another order."""
    converted = tensor.double()
    return converted if converted.stride(-1) == 1 else converted.contiguous()


def folded(values: Tensor) -> Tensor:
    """Return the sums over the axis before the last one, (..., M, N) -> (..., N), half added to half.

    ``torch.sum`` over that axis adds in an order that depends on how many columns there are, and on the threads.
    """
    rows = values.shape[-2]
    if not rows:
        return values.sum(-2)
    while rows > 1:
        half = rows // 2
        upper = values[..., :half, :] + values[..., half : 2 * half, :]
        if rows % 2:
            upper[..., :1, :] += values[..., -1:, :]
        values, rows = upper, half
    return values[..., 0, :]


def inner_products(lines: Tensor, rows: Tensor, *, turned: bool = False) -> Tensor:
    """Return the inner products of every line with every row, (b, h, L, M).

    Args:
        lines: (b, h, L, p) float64.
        rows: (b, h, M, p) float64 with stride 1 along p; if ``turned`` (b, h, p, M), any strides.
        turned: see above.
    """
    if lines.shape[2] <= _FEW_LINES:
        if turned:
            return torch.stack([folded(rows * line.unsqueeze(-1)) for line in lines.unbind(2)], 2)
        return torch.stack([(rows * line.unsqueeze(-2)).sum(-1) for line in lines.unbind(2)], 2)
    rows = rows.mT if turned else rows
    batch, heads, count, length = lines.shape
    # With rows of whole cache lines every matrix of a new tensor begins at one.
    missing = -length % (_CACHE_LINE // rows.element_size())
    lines, rows = (torch.nn.functional.pad(part, (0, missing)).contiguous() for part in (lines, rows))
    inner = lines.new_empty(batch, heads, count, rows.shape[2])
    for place in itertools.product(range(batch), range(heads)):
        inner[place] = product(lines[place], rows[place].mT)
    return inner


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product of (L, p) and (p, M), float64; the bits depend on the shapes and the number of threads.

    A batch of such products is to be made one by one.
    """
    return _at_cache_line(left) @ _at_cache_line(right)


def _at_cache_line(matrix: Tensor) -> Tensor:
    # A new tensor begins at one.
    return matrix if matrix.data_ptr() % _CACHE_LINE == 0 else matrix.clone()
