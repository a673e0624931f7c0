"""If keys and values are equal, the output determines a mean of the scores: ``q_i . o_i = sum_j w_ij s_ij / factor``.

    check = identity(query, key, scores, mass, out)

Both sides are ``sum_j w_ij q_i . k_j``. One equation ties the score product, the value product and the equality of key
and value; the scores are those before mask, cap and bias, so that none of these matters. Statement and proof:
docs/theory.md, T6 and F10.

>>> query, key = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.eye(2).view(1, 1, 2, 2)
>>> scores, mass = query @ key.mT, torch.tensor([0.25, 0.75]).view(1, 1, 1, 2)
>>> [float(identity(query, key, scores, mass, out).residual) for out in (mass @ key, query)]
[0.0, 3.25]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import row_blocks
from bounds.numerics.line_sums import LINE_ELEMENTS
from bounds.numerics.rounding import accumulation, gamma, storage
from bounds.products.product_sums import flushed


@torch.no_grad()
def identity(
    query: Tensor,
    key: Tensor,
    scores: Tensor,
    mass: Tensor,
    out: Tensor,
    factor: float = 1.0,
    keys: Tensor | None = None,
) -> RowCheck:
    """Return how far the two sides are apart, (B, H, T), in units of q.k (F10).

    Args:
        query: (B, H, T, d).
        key: (B, H_kv, S, d), which equals the values in a correct pass.
        scores: (B, H, T, S), ``factor * Q K^T`` as the product returned it.
        mass: (B, H, T, S), what the values were multiplied by.
        out: (B, H, T, d).
        factor: not 0.
        keys: broadcastable to (B, H, T), number of keys a row gives any mass to, or an upper bound of it. None: all.
    """
    channels, length = query.shape[-1], key.shape[2]
    sums, products = accumulation(out.dtype), accumulation(scores.dtype)
    stored_out, stored = storage(out.dtype), storage(scores.dtype)
    terms = query.double() * out.double()
    mean, size = _weighted_scores(mass, scores)
    lengths = _raised_lengths(key, out.dtype)
    magnitude, total = _mass_sums(mass, lengths)
    missed_mass = lengths.sum(-1).repeat_interleave(out.shape[1] // key.shape[1], dim=1) * flushed(out.dtype)
    reach = _raised_lengths(query, out.dtype) * (magnitude + missed_mass[..., None])
    count = torch.tensor(float(length)) if keys is None else keys.double()
    # The two products, whose magnitudes are the same where keys and values are.
    relative = gamma(count + 3, sums.roundoff) + gamma(channels + 3, products.roundoff)
    relative = relative + 2.0**-50 * (length + channels + 16)
    lost = (stored_out.absolute + 2 * (count + 3) * sums.underflow) * query.double().abs().sum(-1)
    missed = (stored.absolute + 2 * (1 + abs(factor)) * (channels + 3) * products.underflow) / abs(factor)
    tolerance = relative * reach + lost + total * missed
    if size is not None:
        tolerance = tolerance + stored_out.roundoff * terms.abs().sum(-1) + stored.roundoff * size / abs(factor)
    return RowCheck((terms.sum(-1) - mean / factor).abs_(), tolerance * (1 + 2.0**-28))


def _raised_lengths(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    # The loss of a product to subnormal operands, and of the squares of float64 numbers below 1e-154.
    least = math.sqrt(vectors.shape[-1]) * flushed(dtype) + 2.0**-500
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float64) + least


def _weighted_scores(mass: Tensor, scores: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return sum w s and, where storing rounds, sum |w s|; (B, H, T) float64."""
    mean = torch.empty(mass.shape[:-1], dtype=torch.float64, device=mass.device)
    size = torch.empty_like(mean) if storage(mass.dtype).roundoff or storage(scores.dtype).roundoff else None
    for block in row_blocks(tuple(mean.shape), mass.shape[-1], LINE_ELEMENTS):
        product = mass[block].double() * scores[block].double()
        mean[block] = product.sum(-1)
        if size is not None:
            size[block] = product.abs_().sum(-1)
    return mean, size


def _mass_sums(mass: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum |w_j| l_j for ``lengths`` (B, H_kv, S), and sum |w_j|; (B, H, T) float64."""
    batch, heads, rows, keys = mass.shape
    lines = torch.stack([lengths, torch.ones_like(lengths)], -2)
    lines = lines.repeat_interleave(heads // lengths.shape[1], dim=1)
    sums = torch.empty((batch, heads, 2, rows), dtype=torch.float64, device=mass.device)
    for block in row_blocks((batch, heads, rows), keys, LINE_ELEMENTS):
        head, row = block[:2], block[2]
        sums[*head, :, row] = lines[head] @ mass[block].double().abs().mT
    return sums[:, :, 0], sums[:, :, 1]
