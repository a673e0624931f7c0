"""The output lies in the convex hull of the values and 0: no channel leaves its range, no row is too long.

    reach = mass_reach(weights, mass)             # 1 + rho: the largest possible sum of the masses of a row
    channel_hull(value, out, reach)               # min(0, min_j v_jc) <= o_ic <= max(0, max_j v_jc)
    length_hull(value, out, reach)                # |o_i| <= max_j |v_j|

The hull is that of *all* keys, seen or not: sound for every mask, and looser than a running one for short rows. It
holds the origin because a sink or a dropped row leaves less mass than 1. Statements and proofs: docs/theory.md, F9.

>>> value = torch.eye(3).view(1, 1, 3, 3)
>>> out = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.5]]).view(1, 1, 2, 3)
>>> channel_hull(value, out, 1.0).residual.tolist(), length_hull(value, out, 1.0).residual[0, 0, 1].item()
([[[0.0, 0.0, 0.5]]], 0.5)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.numerics.rounding import accumulation, cast, gamma, softmax_error, storage
from bounds.softmax.softmax_sums import largest_spread


@torch.no_grad()
def mass_reach(weights: Tensor, mass: Tensor) -> float:
    """Return the most that the masses of a row can sum to, where no dropout scales them up (docs/theory.md, F1 and F9).

    Args:
        weights: (B, H, T, S'), as the softmax returned them. Only its dtype and the number of columns are read.
        mass: (B, H, T, S), the same after cast and removal of a sink's column. Only its dtype is read.
    """
    columns = weights.shape[-1]
    n = torch.tensor([columns])
    spread = largest_spread(n)
    reach = 1 + float(softmax_error(n, spread, weights.dtype).row_sum(spread, n.double()))
    narrowed = cast(weights.dtype, mass.dtype)
    return (reach + columns * narrowed.absolute) / (1 - narrowed.roundoff)


@torch.no_grad()
def channel_hull(value: Tensor, out: Tensor, reach: float) -> RowCheck:
    """Return how far each channel of each head leaves the range of its values, (B, H, D_v) (F9).

    Args:
        value: (B, H_kv, S, D_v), not repeated.
        out: (B, H, T, D_v).
        reach: from ``mass_reach``.
    """
    group = out.shape[1] // value.shape[1]
    # A largest and a smallest entry are exact in any format, and NaN wins over both.
    highest, lowest = out.amax(-2).double(), out.amin(-2).double()
    upper = value.amax(-2).double().clamp_(min=0).repeat_interleave(group, dim=1)
    lower = value.amin(-2).double().clamp_(max=0).repeat_interleave(group, dim=1)
    residual = torch.maximum(highest - upper, lower - lowest)
    largest = torch.maximum(upper, -lower)
    found = torch.maximum(highest.abs(), lowest.abs())
    return RowCheck(residual, _tolerance(largest, found, value, out, reach, channels=1))


@torch.no_grad()
def length_hull(value: Tensor, out: Tensor, reach: float) -> RowCheck:
    """Return how much longer each row is than the longest value, (B, H, T) (F9). Arguments as for ``channel_hull``."""
    group, channels = out.shape[1] // value.shape[1], out.shape[-1]
    length = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float64)
    longest = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float64).amax(-1).repeat_interleave(group, dim=1)
    longest = longest[..., None]
    # Squares of float64 numbers below 1e-154 are flushed.
    flushed = 2.0**-500
    return RowCheck(length - longest, _tolerance(longest, length, value, out, reach, channels) + flushed)


def _tolerance(largest: Tensor, found: Tensor, value: Tensor, out: Tensor, reach: float, channels: int) -> Tensor:
    """Return the bound F9 on how far one channel, or the length of ``channels`` of them, lies outside."""
    keys, arithmetic, stored = value.shape[2], accumulation(out.dtype), storage(out.dtype)
    product = reach - 1 + gamma(keys + 3, arithmetic.roundoff) * reach
    absolute = channels**0.5 * (stored.absolute + 2 * (keys + 3) * arithmetic.underflow)
    checker = 2.0**-51 * (channels + 16)
    return ((product + checker) * largest + stored.roundoff * found + absolute) * (1 + 2.0**-28)
