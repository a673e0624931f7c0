"""The epsilon bounds of attention rows, with a tolerance that no correct computation exceeds.

    bounds = compute_attention_bounds(logits, weights, d=64, mask=visible)
    detect_violation(bounds).count                       # 0 for every fault-free softmax, by proof

``epsilon = (a* - sum_j w_j a_j) / alpha`` is the distance between the largest score and the attention-weighted
mean of the scores, in units of q.k (alpha = 1/sqrt(d) unless the model scales otherwise). Masked keys enter no
quantity: they are not read, so they may hold anything. Statements and proofs: docs/theory.md, T1-T4 and F1-F3.

>>> logits = torch.tensor([[0.0, -9.0], [2.0, 1.0]])
>>> causal = torch.tensor([[True, False], [True, True]])
>>> weights = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1)
>>> bounds = compute_attention_bounds(logits, weights, d=4, mask=causal)
>>> bounds.n.tolist(), [round(value, 6) for value in bounds.epsilon.tolist()]
([1, 2], [0.0, 0.537883])
>>> bool((bounds.epsilon - bounds.lower >= -bounds.tolerance).all())
True
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.numerics.blocks import row_blocks
from bounds.numerics.chain import chain_bounds, tight_bounds
from bounds.numerics.fixed_order import wide
from bounds.numerics.rounding import MAX_KEYS, SoftmaxError, accumulation, softmax_error
from bounds.numerics.selection import Masks, selected


@dataclass(frozen=True, eq=False)
class Interval:
    """The interval of epsilon, row by row: ``lower - tolerance <= epsilon <= upper + tolerance``, shape (..., T).

    Attributes:
        checked: bool; the other entries mean nothing where it is False.
        lower, upper, tolerance: float64, in units of epsilon.
    """

    checked: Tensor
    lower: Tensor
    upper: Tensor
    tolerance: Tensor


@dataclass(frozen=True, eq=False)
class AttentionBounds:
    """Epsilon and its bounds for every query row; all tensors have the shape of the rows, (..., T).

    Rows without a visible key have ``checked`` False and NaN everywhere. With one visible key gamma does not
    exist: it and every bound are 0. Non-finite data gives non-finite entries, which ``detect_violation`` reports.

    Attributes:
        n: int64, number of visible keys.
        checked: bool, n >= 1.
        a_star: float64, largest visible logit.
        w_star: float64, stored weight of that key (of one of them, if several tie).
        gamma: float64, gap between the two largest visible logits.
        epsilon: float64, ``(a* - sum w a) / alpha``.
        lower1, middle, upper1, upper2: float64, the chain T2 divided by alpha.
        lower, upper: float64, the larger of the lower and the smaller of the upper bounds.
        tolerance: float64, proved bound on how far a correct computation may be outside [lower, upper] (F2).
        scale: alpha, the factor between q.k and the logits.
        magnitude: float64, ``sum |w a| / alpha``.
        error: bound on the error of the weights, to derive further tolerances (the q@o path).
        tight_lower, tight_upper: float64, the best possible bounds given (gamma, n, w*) (T4), recomputed from the
            logits alone; None unless asked for. Check them with ``detect_violation(bounds.tightened())``.
    """

    n: Tensor
    checked: Tensor
    a_star: Tensor
    w_star: Tensor
    gamma: Tensor
    epsilon: Tensor
    lower1: Tensor
    middle: Tensor
    upper1: Tensor
    upper2: Tensor
    lower: Tensor
    upper: Tensor
    tolerance: Tensor
    scale: float
    magnitude: Tensor
    error: SoftmaxError
    tight_lower: Tensor | None = None
    tight_upper: Tensor | None = None

    def tightened(self) -> AttentionBounds:
        """Return the same rows with the interval T4. Raises ValueError when it was not computed."""
        if self.tight_lower is None or self.tight_upper is None:
            raise ValueError("tightened: the bounds T4 were not computed, pass tight=True")
        return dataclasses.replace(self, lower=self.tight_lower, upper=self.tight_upper)

    def interval(self, slack: Tensor | None = None, tolerance: Tensor | None = None) -> Interval:
        """Return [lower, upper] widened by ``slack`` on both sides, with ``tolerance`` added to the tolerance."""
        return Interval(
            checked=self.checked,
            lower=self.lower if slack is None else self.lower - slack,
            upper=self.upper if slack is None else self.upper + slack,
            tolerance=self.tolerance if tolerance is None else self.tolerance + tolerance,
        )


@torch.no_grad()
def compute_attention_bounds(
    scores: Tensor,
    weights: Tensor,
    d: int,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    tight: bool = False,
) -> AttentionBounds:
    """Return epsilon, its bounds and the rounding tolerance of every attention row.

    Args:
        scores: (..., T, S) logits, exactly as the softmax received them (scaled, with cap and bias; entries that
            ``mask`` hides are ignored). float64, float32, bfloat16 or float16.
        weights: (..., T, S), the output of the softmax. Its dtype decides the tolerance: float64 arithmetic for
            float64, else float32 and one storage rounding for the half formats.
        d: head dimension; epsilon is ``sqrt(d) * (a* - sum w a)``.
        mask: which keys a row sees, broadcastable to ``scores``: None (all), bool (True = visible), or an additive
            float mask (values <= finfo.min / 2 hide the key, -inf included).
        scale: alpha, where the model's logits are not ``q.k / sqrt(d)``; epsilon is then ``(a* - sum w a) / scale``.
        tight: also compute the bounds T4, at the cost of one exp per entry.

    Returns:
        AttentionBounds; tensors of shape (..., T) on the device of ``scores``.

    Raises:
        ValueError: for shapes that do not match, an unsupported dtype, a d or scale that is not positive, or more
            than ``bounds.numerics.rounding.MAX_KEYS`` keys.

    Temporary memory is bounded (``bounds.numerics.blocks``); the result does not depend on the blocks, bit for bit.
    """
    alpha = _alpha(d, scale)
    _check_shapes(scores, weights)
    visible = visible_keys(mask, scores.shape)
    sums = _row_sums(scores, weights, visible, tight)
    if visible is None:
        n = torch.full(scores.shape[:-1], scores.shape[-1], dtype=torch.int64, device=scores.device)
    else:
        n = visible.expand(*visible.shape[:-1], scores.shape[-1]).sum(-1).expand(scores.shape[:-1])
    return _assemble(sums, n, weights.dtype, alpha)


def visible_keys(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return ``mask`` as a bool tensor, True = visible, broadcastable to ``shape``; None where every key is visible.

    Raises:
        ValueError: when the mask is neither bool nor floating, or does not broadcast to ``shape``.
    """
    if mask is None:
        return None
    # ``torch.broadcast_shapes`` takes a hundred times as long.
    own = tuple(mask.shape)
    if len(own) > len(shape) or any(size not in (1, n) for size, n in zip(own[::-1], shape[::-1], strict=False)):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, which does not broadcast to {tuple(shape)}")
    if mask.dtype != torch.bool:
        if not mask.dtype.is_floating_point:
            raise ValueError(f"mask: got dtype {mask.dtype}, allowed bool (True = visible) or an additive float mask")
        # A NaN in the mask makes its logit NaN: it must count as visible, so that the row is reported.
        mask = ~(mask <= torch.finfo(mask.dtype).min / 2)
    return mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)


@dataclass(frozen=True)
class _RowSums:
    """Reductions over the visible keys of each row, float64, shape (..., T)."""

    a_star: Tensor
    second: Tensor
    w_star: Tensor
    product: Tensor  # sum w a
    magnitude: Tensor  # sum |w a|
    spread: Tensor  # sum |w a| (a* - a)
    total: Tensor  # sum a
    size: Tensor  # sum |a|
    tail: Tensor | None = None  # sum of exp(a - a*) over all but the largest


def _row_sums(logits: Tensor, weights: Tensor, visible: Tensor | None, tight: bool) -> _RowSums:
    rows, keys = logits.shape[:-1], logits.shape[-1]
    sums = torch.empty((8 + tight, *rows), dtype=torch.float64, device=logits.device)
    masks = None if visible is None else Masks.of(visible, logits, weights)
    for block in row_blocks(tuple(rows), keys):
        own = None if masks is None else masks.block(block)
        for number, value in enumerate(_block_sums(logits[block], weights[block], own, tight)):
            sums[number][block] = value
    return _RowSums(*sums.unbind(0))


def _block_sums(logits: Tensor, weights: Tensor, masks: Masks | None, tight: bool) -> list[Tensor]:
    # Hidden entries are selected away, never multiplied by zero: 0 * inf is NaN.
    shown = logits if masks is None else selected(logits, masks.logits)
    mass = weights if masks is None else selected(weights, masks.weights)
    competing = shown if masks is None else shown + masks.hidden
    top, index = competing.max(-1, keepdim=True)
    second = competing.scatter(-1, index, -math.inf).amax(-1)
    w_star = weights.gather(-1, index)[..., 0]
    values, largest = wide(shown), top.double()
    product = values * wide(mass)
    sums = [top[..., 0], second, w_star, product.sum(-1)]
    magnitude = product.abs_()
    sums.append(magnitude.sum(-1))
    delta = largest - values
    # In place only on what was made here: with float64 logits ``values`` may be the caller's own tensor.
    sums += [magnitude.mul_(delta).sum(-1), values.sum(-1), torch.abs(values, out=delta).sum(-1)]
    if tight:
        terms = torch.exp(competing.double() - largest).scatter_(-1, index, 0.0)
        sums.append(terms.sum(-1))
    return sums


def _assemble(sums: _RowSums, n: Tensor, dtype: torch.dtype, alpha: float) -> AttentionBounds:
    zero = torch.zeros((), dtype=torch.float64, device=n.device)
    checked = n >= 1
    every = bool(checked.all())
    gamma = torch.where(n > 1, sums.a_star - sums.second, zero)
    mean = sums.total / n
    lower1, middle, upper1, upper2 = chain_bounds(sums.a_star, gamma, sums.w_star, mean, n)
    lower, upper = torch.maximum(lower1, middle), torch.minimum(upper1, upper2)
    # a* - mean is a rounded number: only with that rounding added is it an upper bound of E.
    spread = torch.minimum(upper2, upper1.clamp(min=0) + 2.0**-52 * (n + 16) * (sums.a_star.abs() + sums.size / n))
    error = softmax_error(n, spread.clamp(min=0), dtype)
    tolerance = _chain_tolerance(sums, gamma, upper, n.double(), error)
    tight = None if sums.tail is None else tight_bounds(gamma, sums.tail, n)

    def rows(value: Tensor, unit: float = alpha) -> Tensor:
        value = value / unit
        return value if every else torch.where(checked, value, math.nan)

    return AttentionBounds(
        n=n,
        checked=checked,
        a_star=rows(sums.a_star, 1.0),
        w_star=rows(sums.w_star, 1.0),
        gamma=rows(gamma, 1.0),
        epsilon=rows(sums.a_star - sums.product),
        lower1=rows(lower1),
        middle=rows(middle),
        upper1=rows(upper1),
        upper2=rows(upper2),
        lower=rows(lower),
        upper=rows(upper),
        tolerance=rows(tolerance),
        scale=alpha,
        tight_lower=None if tight is None else rows(tight[0]),
        tight_upper=None if tight is None else rows(tight[1]),
        magnitude=rows(sums.magnitude),
        error=error,
    )


def _chain_tolerance(sums: _RowSums, gamma: Tensor, upper: Tensor, n: Tensor, error: SoftmaxError) -> Tensor:
    """Return tau of docs/theory.md, F2: distance of the measured E and middle from those of the exact softmax."""
    spread = torch.minimum(sums.spread, error.reach * sums.magnitude)
    of_epsilon = error.relative * sums.magnitude + error.slope * spread + error.absolute * sums.size
    of_middle = gamma * (error.relative * sums.w_star.abs() + error.absolute)
    # The checker's own float64 sums. For float64 data it is no more precise than what it checks.
    checker = 2.0**-52 * (n + 16) * (sums.a_star.abs() + sums.magnitude + sums.size / n + gamma + upper.abs())
    return (of_epsilon + of_middle + checker) * (1 + 2.0**-28) + 2.0**-1000


def _alpha(d: int, scale: float | None) -> float:
    if isinstance(d, bool) or not isinstance(d, int) or d < 1:
        raise ValueError(f"d: got {d!r}, allowed a positive integer (the head dimension)")
    if scale is None:
        return 1 / math.sqrt(d)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: got {scale!r}, allowed a positive finite number")
    return float(scale)


def _check_shapes(logits: Tensor, weights: Tensor) -> None:
    if logits.ndim < 1 or logits.shape != weights.shape:
        raise ValueError(
            f"scores and weights: got shapes {tuple(logits.shape)} and {tuple(weights.shape)}, "
            "allowed one common shape (..., T, S)"
        )
    if not 1 <= logits.shape[-1] <= MAX_KEYS:
        raise ValueError(f"scores: got {logits.shape[-1]} keys, allowed 1..{MAX_KEYS}")
    for tensor in (logits, weights):
        accumulation(tensor.dtype)
