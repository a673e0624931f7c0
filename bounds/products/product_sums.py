"""The checksum lemma: sums of the entries of a product against the product of the sums.

If ``Y = A B`` then ``Y c = A (B c)`` for every vector c. With c = 1 on a tile of columns and 0 elsewhere, the sum of a
row of Y over the tile is one inner product of a row of A. Rounding moves it by at most the tolerance here
(docs/theory.md, T7 and F5), and a single wrong entry that is off by more than twice the tolerance cannot be missed.

    check = tile_check(query, key, scores)               # rows of the scores, (B, H, T, 1)
    check = tile_check(key, query, Transposed(scores))   # its columns, (B, H, S, 1)

>>> left, right = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)
>>> result = left @ right.mT
>>> result[0, 0, 1, 2] += 0.5                                                    # a fault
>>> tile_check(left, right, result, width=2).residual.tolist()
[[[[0.0, 0.0], [0.0, 0.5]]]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import row_blocks
from bounds.numerics.fixed_order import inner_products, wide
from bounds.numerics.line_sums import LINE_ELEMENTS, LineSums, absolute, line_sums, line_totals
from bounds.numerics.rounding import accumulation, gamma, storage


@dataclass(frozen=True, eq=False)
class Transposed:
    """A matrix whose transpose is stored: its lines are the columns of ``stored``, (B, H, N, M) for (B, H, M, N)."""

    stored: Tensor


Matrix = Tensor | Transposed


@torch.no_grad()
def tile_check(
    left: Matrix,
    right: Matrix,
    result: Matrix,
    *,
    width: int | None = None,
    factor: float = 1.0,
    addend: LineSums | None = None,
    terms: Tensor | None = None,
) -> RowCheck:
    """Return how far sums over tiles of a product's rows are from what its operands give, (B, H, M, tiles) (F5).

    Args:
        left: (B, H or H_kv, M, p) and
        right: (B, H_kv or H, N, p), the operands: head h of the result reads head h // (H / H_kv) of the smaller one.
        result: (B, H, M, N), what the product ``factor * left @ right.mT + addend`` returned.
        width: number of neighbouring entries in a sum; None: whole rows.
        factor: what the product multiplies by.
        addend: sums of the addend over the same tiles, broadcastable to (B, H, M, tiles).
        terms: broadcastable to (B, H, M): number of the p terms of a row's inner products that are not exactly 0, or an
            upper bound of it. None: all of them.
    """
    found, turned = _stored(result)
    columns = found.shape[-2 if turned else -1]
    count = columns if width is None else min(width, columns)
    summed, across = _stored(right)
    tiles = line_sums(summed, width, columns=not across)
    if storage(found.dtype).roundoff:
        sums = line_sums(found, width, columns=turned)
        sum_of_stored, stored = sums.total, storage(found.dtype).roundoff * sums.size
    else:
        sum_of_stored, stored = line_totals(found, width, columns=turned), None
    total, size = _products(left, tiles, count, flushed(found.dtype))
    if factor != 1:
        total, size = total * factor, size * abs(factor)
    if addend is not None:
        total, size = total + addend.total, size + addend.size
    length = tiles.total.shape[-2]
    lengths = torch.tensor(float(length)) if terms is None else terms[..., None].double()
    tolerance = product_tolerance(size, stored, dtype=found.dtype, length=lengths, count=count, factor=factor)
    return RowCheck((sum_of_stored - total).abs_(), tolerance)


def _stored(matrix: Matrix) -> tuple[Tensor, bool]:
    """Return a matrix as it is stored, and whether that is its transpose."""
    return (matrix.stored, True) if isinstance(matrix, Transposed) else (matrix, False)


def flushed(dtype: torch.dtype) -> float:
    """Return omega / u, by which the magnitudes of the operands of a product with results in ``dtype`` are raised.

    Some kernels read subnormal operands as zero (bfloat16 on x86 always does): an error of at most omega. The relative
    error u of the raised operand covers it (docs/theory.md, F5).
    """
    arithmetic = accumulation(dtype)
    return arithmetic.underflow / arithmetic.roundoff


def _products(left: Matrix, tiles: LineSums, count: int, raised: float) -> tuple[Tensor, Tensor]:
    """Return the products of every row with the sums of the other operand, and the same of the magnitudes.

    Args:
        left: (B, H_l, M, p).
        tiles: sums (B, H_r, p, tiles).
        count: number of lines in a sum.
        raised: by how much every magnitude is raised.

    Returns:
        Two float64 tensors (B, max(H_l, H_r), M, tiles).
    """
    stored, turned = _stored(left)
    batch, heads, length, rows = stored.shape if turned else stored.mT.shape
    group = max(1, tiles.total.shape[1] // heads)
    total, size = (_thin(sums, heads) for sums in (tiles.total, tiles.size + count * raised))
    least = raised * size.sum(-1)
    products = torch.empty((2, batch, heads, total.shape[2], rows), dtype=torch.float64, device=stored.device)
    for block in row_blocks((batch, heads, rows), length, LINE_ELEMENTS):
        head, row = block[:2], block[2]
        part = stored[*head, :, row].double() if turned else wide(stored[block])
        products[0][*head, :, row] = inner_products(total[head], part, turned=turned)
        products[1][*head, :, row] = inner_products(size[head], absolute(part, stored), turned=turned)
    # Every magnitude of the left operand is raised too: once for the whole line.
    products[1] += least.unsqueeze(-1)
    both = products.unflatten(3, (group, -1)).flatten(2, 3).mT
    return both[0], both[1]


def _thin(sums: Tensor, heads: int) -> Tensor:
    """Return (B, H_r, p, tiles) sums as rows (B, heads, H_r / heads * tiles, p): repeated, or joined, to ``heads``."""
    lines = sums.mT
    if lines.shape[1] < heads:
        return lines.repeat_interleave(heads // lines.shape[1], dim=1)
    return lines.unflatten(1, (heads, -1)).flatten(2, 3).contiguous()


def product_tolerance(
    magnitude: Tensor,
    stored: Tensor | None,
    *,
    dtype: torch.dtype,
    length: Tensor,
    count: int,
    factor: float = 1.0,
) -> Tensor:
    """Return the bound F5 on ``|sum of stored entries - sum of exact ones|``, the checker's own rounding included.

    Args:
        magnitude: float64, the sum of ``|factor| (|A| + omega/u)(|B| + omega/u) + |addend|`` over the entries.
        stored: float64, ``u_s`` times the sum of the magnitudes of the stored entries; None where u_s = 0.
        dtype: of the stored entries; it decides the arithmetic.
        length: number of terms of an inner product, float64, broadcastable to ``magnitude``.
        count: number of entries in the sum.
        factor: what the product multiplies by.
    """
    arithmetic, storing = accumulation(dtype), storage(dtype)
    # Two more roundings than terms, of the factor and the addend, and one to spare.
    relative = gamma(length + 3, arithmetic.roundoff) + 2.0**-52 * (2 * count + length + 16)
    absolute_error = count * (2 * (1 + abs(factor)) * (length + 3) * arithmetic.underflow + storing.absolute)
    tolerance = relative * magnitude + absolute_error
    return (tolerance if stored is None else tolerance + stored) * (1 + 2.0**-28)
