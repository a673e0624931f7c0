"""Decide which attention rows lie outside their bounds.

The rule (docs/theory.md, "Decision"): with residual ``r = max(lower - epsilon, epsilon - upper)`` a row is a
violation iff **not (r <= tolerance)** or the tolerance is not finite, so that NaN and Inf always count.

>>> from bounds.epsilon.bounds import compute_attention_bounds
>>> logits = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.5]])
>>> weights = torch.softmax(logits, -1)
>>> detect_violation(compute_attention_bounds(logits, weights, d=16)).count
0
>>> weights[1, 2] += 4.0                                                # a fault
>>> found = detect_violation(compute_attention_bounds(logits, weights, d=16))
>>> found.count, found.positions.tolist(), found.smallest_margin < 0
(1, [[1]], True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.detector import require_tolerance
from bounds.core.row_outcome import BoundedOutcome, not_finite, verdict
from bounds.epsilon.bounds import AttentionBounds, Interval


@dataclass(frozen=True, eq=False)
class Violations:
    """Which rows violate their bounds, and by how much.

    Attributes:
        fired: bool (..., T), True where a row violates its bounds.
        margins: float64 (..., T), ``min(epsilon - lower, upper - epsilon)``, negative outside the bounds; the
            tolerance is not part of it. NaN where the row is not checked; NaN or -Inf where it is not finite.
        rows_checked: number of rows with at least one visible key.
        count: number of violations, non-finite rows included.
        nonfinite: number of checked rows whose epsilon, bounds or tolerance are not finite.
        nonfinite_rows: bool (..., T), which rows those are.
        positions: int64 (count, number of row axes), indices of the violations in row-major order.
        smallest_margin: smallest of ``margins`` over the checked rows, NaN if one of them is; None without
            rows.
        largest_ratio: largest residual in units of the tolerance (above 1 for a violation), NaN if one is; None
            without rows.
    """

    fired: Tensor
    margins: Tensor
    rows_checked: int
    count: int
    nonfinite: int
    nonfinite_rows: Tensor
    positions: Tensor
    smallest_margin: float | None
    largest_ratio: float | None


@torch.no_grad()
def detect_violation(
    bounds: AttentionBounds | Interval, epsilon: Tensor | None = None, tolerance: float = 0.0
) -> Violations:
    """Compare epsilon with its bounds.

    Args:
        bounds: from ``compute_attention_bounds``, or an interval made from them.
        epsilon: (..., T) the values to judge, in the units of ``bounds.epsilon.bounds``, which is the default. Another
            path to the same quantity (q.o) or another pass (an oracle) is judged by passing its values.
        tolerance: allowance in units of epsilon, finite and not negative; **added** to the proved one.

    Raises:
        ValueError: for an epsilon that is missing or of another shape, or a tolerance that is negative or not
            finite.
    """
    require_tolerance(tolerance)
    if epsilon is None:
        if not isinstance(bounds, AttentionBounds):
            raise ValueError("epsilon: got None, but an interval has no values of its own to judge")
        epsilon = bounds.epsilon
    if epsilon.shape != bounds.lower.shape:
        raise ValueError(f"epsilon: got shape {tuple(epsilon.shape)}, allowed {tuple(bounds.lower.shape)}")
    return _judge(bounds, epsilon.double(), tolerance)


def row_outcome(bounds: AttentionBounds | Interval, epsilon: Tensor, tolerance: float = 0.0) -> BoundedOutcome:
    """Return what ``detect_violation`` finds, row by row and without counting. Arguments as there."""
    allowed = bounds.tolerance + tolerance
    below, above = epsilon - bounds.lower, bounds.upper - epsilon
    # torch.minimum propagates NaN, so a NaN anywhere in the row reaches the comparison and fires.
    margins = torch.minimum(below, above)
    # Epsilon, lower and upper each reach one of the first two.
    nonfinite = bounds.checked & not_finite(below, above, allowed)
    return BoundedOutcome(
        fired=bounds.checked & ~(-margins <= allowed) | nonfinite,
        nonfinite=nonfinite,
        ratio=torch.where(bounds.checked, -margins / allowed, -math.inf),
        checked=bounds.checked,
        margin=torch.where(bounds.checked, margins, math.inf),
        bounded=bounds.checked,
        interval=(epsilon, bounds.lower, bounds.upper, allowed),
    )


def _judge(bounds: AttentionBounds | Interval, epsilon: Tensor, tolerance: float) -> Violations:
    outcome = row_outcome(bounds, epsilon, tolerance)
    found = verdict("", outcome)
    return Violations(
        fired=outcome.fired,
        margins=torch.where(bounds.checked, outcome.margin, math.nan),
        rows_checked=found.rows_checked,
        count=found.violations,
        nonfinite=found.nonfinite,
        nonfinite_rows=outcome.nonfinite,
        positions=outcome.fired.nonzero(),
        smallest_margin=found.smallest_margin,
        largest_ratio=found.largest_ratio,
    )
