"""The score product ``S = factor Q K^T + addend``, checked by the sums of its rows, its columns and its tiles.

    check = row_sums(query, key, scores)          # sum_j s_ij = factor q_i . (sum_j k_j) + sum_j addend_ij
    check = column_sums(query, key, scores)       # sum_i s_ij = factor k_j . (sum_i q_i) + sum_i addend_ij

The sums run over *all* keys and *all* queries: the product computes every entry, masked ones included, so none needs a
mask or a prefix sum. Statements and proofs: docs/theory.md, T7, F5 and F6; ``length_bound`` is F7.

Shapes everywhere: query (B, H, T, d), key (B, H_kv, S, d) not repeated, scores (B, H, T, S) as the product returned
them (before scale, cap, bias and mask), addend broadcastable to scores. float64, float32, bfloat16 or float16; what is
returned is float64.

>>> query, key = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)
>>> scores = query @ key.mT
>>> scores[0, 0, 1, 2] += 0.5                                                    # a fault
>>> row_sums(query, key, scores).residual.tolist(), column_sums(query, key, scores).residual.tolist()
([[[0.0, 0.5]]], [[[0.0, 0.0, 0.5]]])
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import row_blocks
from bounds.numerics.fixed_order import wide
from bounds.numerics.line_sums import LINE_ELEMENTS, LineSums, line_sums
from bounds.numerics.rounding import accumulation, gamma, storage
from bounds.products.product_sums import Transposed, tile_check


@torch.no_grad()
def row_sums(query: Tensor, key: Tensor, scores: Tensor, factor: float = 1.0, addend: Tensor | None = None) -> RowCheck:
    """Return how far the sum of every row of the scores is from what the operands give, (B, H, T) (F6)."""
    check = tile_sums(query, key, scores, factor, addend, width=scores.shape[-1])
    return RowCheck(check.residual[..., 0], check.tolerance[..., 0])


@torch.no_grad()
def tile_sums(
    query: Tensor, key: Tensor, scores: Tensor, factor: float = 1.0, addend: Tensor | None = None, *, width: int = 32
) -> RowCheck:
    """Return the same for every tile of ``width`` neighbouring keys, (B, H, T, ceil(S / width)) (F6).

    The tolerance shrinks with the width: a tile finds small faults in long rows and in half formats.
    """
    added = None if addend is None else line_sums(addend.expand(*addend.shape[:-1], scores.shape[-1]), width)
    return tile_check(query, key, scores, width=width, factor=factor, addend=added)


@torch.no_grad()
def column_sums(
    query: Tensor, key: Tensor, scores: Tensor, factor: float = 1.0, addend: Tensor | None = None
) -> RowCheck:
    """Return how far the sum of every column of the scores is from what the operands give, (B, H, S) (F6)."""
    added = None if addend is None else _down(addend, scores.shape[-2])
    check = tile_check(key, query, Transposed(scores), factor=factor, addend=added)
    return RowCheck(check.residual[..., 0], check.tolerance[..., 0])


def _down(addend: Tensor, rows: int) -> LineSums:
    """Return the sums (..., S, 1) of an addend's columns; it may have no axis of queries, or one of length 1."""
    own = addend if addend.ndim > 1 else addend[None]
    sums, times = line_sums(own, columns=True), rows // own.shape[-2]
    return LineSums(sums.total * times, sums.size * times)


@torch.no_grad()
def length_bound(
    query: Tensor, key: Tensor, scores: Tensor, factor: float = 1.0, addend: Tensor | None = None
) -> RowCheck:
    """Return how far the scores of every row are beyond the lengths of query and key, (B, H, T) (F7).

    Cauchy and Schwarz: ``|s_ij| <= |factor| |q_i| |k_j| + |addend_ij|``. Residual and tolerance are in units of
    ``|factor| |q_i|``: the residual is the largest ``(|s_ij| - |addend_ij|) / |k_j|`` of the row, less that. The factor
    must not be 0.
    """
    channels, arithmetic, stored = query.shape[-1], accumulation(scores.dtype), storage(scores.dtype)
    flushed = 2 * (channels + 3) * (1 + abs(factor)) * arithmetic.underflow
    # Both lengths are raised by this, and the product of the two by more than every absolute error.
    least = math.sqrt((stored.absolute + flushed) / abs(factor))
    slope = (1 + gamma(channels + 3, arithmetic.roundoff)) / (1 - stored.roundoff) + 2.0**-51 * (channels + 16)
    reach = abs(factor) * (_lengths(query) + least)
    inverse = (1 / (_lengths(key) + least)).repeat_interleave(scores.shape[1] // key.shape[1], dim=1)[..., None, :]
    allowed = None if addend is None else (slope * addend.double().abs()).expand(scores.shape)
    longest = torch.empty(scores.shape[:-1], dtype=torch.float64, device=scores.device)
    for block in row_blocks(tuple(scores.shape[:-1]), scores.shape[-1], LINE_ELEMENTS):
        part = scores[block].double().abs()
        part = part if allowed is None else part.sub_(allowed[block])
        longest[block] = part.mul_(inverse[block[:2]]).amax(-1)
    return RowCheck(longest - reach, reach * (slope - 1))


def _lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wide(vectors), dim=-1)
