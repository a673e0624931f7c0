"""Checks of rows of softmax weights: each must be a distribution, and the softmax of its logits.

    simplex(weights, n, visible)         # 0 <= w <= 1 + tau, and 0 where masked
    elements(logits, weights, n)         # w_j = exp(a_j - a*) / sum_k exp(a_k - a*), every j
    divergence(logits, weights, n)       # Kullback-Leibler divergence from the softmax of the logits is 0

Like the softmax itself, the last two read every column: a masked logit lies so far below the others that its
exponential is 0. No tolerance depends on the weights, so that a fault in them cannot widen it.

>>> logits = torch.tensor([[0.3, 1.0, -2.0]])
>>> weights, n = torch.softmax(logits, -1), torch.tensor([3])
>>> bool(elements(logits, weights, n).residual <= 1), bool(elements(logits, weights * 1.00001, n).residual <= 1)
(True, False)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import BLOCK_ELEMENTS, row_blocks
from bounds.numerics.rounding import SoftmaxError, accumulation, softmax_error
from bounds.softmax.softmax_sums import largest_spread


@torch.no_grad()
def simplex(weights: Tensor, n: Tensor, visible: Tensor | None) -> RowCheck:
    """Return how far each row leaves ``0 <= w <= 1 + tau``, ``w = 0`` where masked (docs/theory.md, F12).

    Args:
        weights: (..., T, S) as the softmax stored them, in any supported dtype.
        n: int64, number of visible keys, broadcastable to (..., T). Rows with n = 0 are not checked.
        visible: bool, broadcastable to ``weights``; None where every key is visible.

    Returns:
        RowCheck with residuals (..., T), float64, and tolerance 0: tau is in the residual, the other two are exact.
    """
    spread = largest_spread(n)
    limit = 1 + softmax_error(n, spread, weights.dtype).row_sum(spread, n)
    # Compared in the weights' own format: rounded to the nearest, this is no less than the limit.
    ceiling = (limit * (1 + torch.finfo(weights.dtype).eps)).to(weights.dtype).unsqueeze(-1)
    if visible is not None:
        ceiling = torch.where(visible, ceiling, torch.zeros_like(ceiling))
    ceiling = ceiling.expand(weights.shape)
    residual = torch.empty(weights.shape[:-1], dtype=torch.float64, device=weights.device)
    # One temporary, no wider than the weights.
    for block in row_blocks(tuple(residual.shape), weights.shape[-1], 4 * BLOCK_ELEMENTS):
        part = weights[block]
        # A difference of floats has the sign of the exact one: gradual underflow loses nothing.
        residual[block] = torch.maximum((part - ceiling[block]).amax(-1), -part.amin(-1))
    return RowCheck(residual, torch.zeros((), dtype=torch.float64, device=weights.device), n > 0)


@torch.no_grad()
def elements(logits: Tensor, weights: Tensor, n: Tensor) -> RowCheck:
    """Return the largest error of a weight of each row, in units of its tolerance (docs/theory.md, F13).

    Args:
        logits: (..., T, S) exactly as the softmax received them.
        weights: (..., T, S) as it stored them; the dtypes may differ.
        n: int64, number of visible keys, broadcastable to (..., T). Rows with n = 0 are not checked.

    Returns:
        RowCheck with residuals (..., T), float64: the largest ratio of error and proved bound; tolerance 1.
    """
    stored, own = _errors(n, weights.dtype)
    rows = weights.shape[:-1]
    relative = ((stored.relative + own.relative) * (1 + 2.0**-28)).unsqueeze(-1).expand(*rows, 1)
    # Both grow by a few percent at most with the number of keys: one number, that of all columns, is as good.
    slope, absolute = _steepest(logits.shape[-1], weights.dtype)

    def worst(block: tuple[slice, ...], delta: Tensor, exact: Tensor) -> Tensor:
        bound = torch.add(relative[block], delta, alpha=-slope).mul_(exact).add_(absolute)
        # Converted first: arithmetic on two dtypes at once is several times slower.
        return exact.sub_(weights[block].double()).abs_().div_(bound).amax(-1)

    one = torch.ones((), dtype=torch.float64, device=logits.device)
    return RowCheck(_against_softmax(logits, stored.reach, worst), one, n > 0)


@torch.no_grad()
def divergence(logits: Tensor, weights: Tensor, n: Tensor) -> RowCheck:
    """Return ``sum_j w_j (ln w_j - a_j + lse) - sum_j w_j + 1`` of each row (docs/theory.md, T1 and F14).

    It is the divergence of the stored weights from the softmax of the logits: never negative, and of second order
    in their errors.

    Args:
        logits: (..., T, S) exactly as the softmax received them.
        weights: (..., T, S) as it stored them; the dtypes may differ.
        n: int64, number of visible keys, broadcastable to (..., T). Rows with n = 0 are not checked.

    Returns:
        RowCheck with residuals (..., T), float64; NaN where a weight is negative.
    """
    stored, own = _errors(n, weights.dtype)
    spread = largest_spread(n)
    relative, slope = stored.relative + own.relative, stored.slope + own.slope
    squares = relative**2 + 2 * relative * slope * spread + slope**2 * stored.reach * spread
    underflow = n * (5 * stored.absolute + 2.0**16 * accumulation(weights.dtype).underflow)
    checker = 2.0**-52 * (n + 32)

    def total(block: tuple[slice, ...], delta: Tensor, exact: Tensor) -> Tensor:
        part = weights[block].double()
        exact.clamp_(min=torch.finfo(torch.float64).tiny)
        return (torch.xlogy(part, part / exact) - part).add_(exact).sum(-1)

    return RowCheck(_against_softmax(logits, stored.reach, total), squares + underflow + checker, n > 0)


@functools.lru_cache(maxsize=64)
def _steepest(columns: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest slope and absolute error of rows of any number of keys up to ``columns``."""
    stored, own = _errors(torch.tensor([columns]), dtype)
    return float(stored.slope + own.slope) * (1 + 2.0**-28), float(stored.absolute + 2 * own.absolute)


def _errors(n: Tensor, dtype: torch.dtype) -> tuple[SoftmaxError, SoftmaxError]:
    """Return the errors of the stored weights and of the float64 weights they are compared with: both obey F1."""
    spread = largest_spread(n)
    return softmax_error(n, spread, dtype), softmax_error(n, spread, torch.float64)


def _against_softmax(
    logits: Tensor, reach: float, judge: Callable[[tuple[slice, ...], Tensor, Tensor], Tensor]
) -> Tensor:
    """Return ``judge(block, -min(delta, reach), softmax)`` of every row; it may overwrite what it is given."""
    residual = torch.empty(logits.shape[:-1], dtype=torch.float64, device=logits.device)
    for block in row_blocks(tuple(residual.shape), logits.shape[-1]):
        values = logits[block].double()
        delta = (values - values.amax(-1, keepdim=True)).clamp_(min=-reach)
        exact = torch.exp(delta)
        exact.mul_(1 / exact.sum(-1, keepdim=True))
        residual[block] = judge(block, delta, exact)
    return residual
