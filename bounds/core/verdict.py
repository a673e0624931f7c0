"""The verdict of a detector on one attention call, and the merging of several verdicts.

    merged(first, second)                        # one detector, two calls or two sequences
    merged(*detector.check_each(state))

>>> merged(Verdict("s@w", 4, 0, largest_ratio=0.5), Verdict("s@w", 4, 1, largest_ratio=7.0)).largest_ratio
7.0
>>> Verdict.not_applicable("q@o", "queries have 192 channels and values 128").fired
False
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_POSITIONS = 16
"""The largest number of positions in a verdict; the counts are always complete."""


@dataclass(frozen=True)
class Verdict:
    """The verdict of one detector on one attention call. It has only plain numbers and keeps no tensor alive.

    Attributes:
        detector: name of the detector.
        rows_checked: number of rows for which the invariant was evaluated.
        violations: number of rows that break it, non-finite ones included.
        nonfinite: number of the violations that could not be evaluated because something in them is NaN or Inf.
        positions: indices of the first violations, at most MAX_POSITIONS.
        largest_ratio: largest residual in units of the tolerance; None if the invariant has no residual.
        smallest_margin: smallest distance to the nearer bound, negative outside; None without bounds.
        reason: why the invariant does not apply to this call; None if it applies.
        detail: what broke, for people; may be empty.
        tightest: the bounded quantity of the first row (in row-major order) with the smallest margin, and its lower and
            upper bound, tolerance included. None if no row is bounded, or if the margin is that of several quantities.
    """

    detector: str
    rows_checked: int = 0
    violations: int = 0
    nonfinite: int = 0
    positions: tuple[tuple[int, ...], ...] = ()
    largest_ratio: float | None = None
    smallest_margin: float | None = None
    reason: str | None = None
    detail: str = ""
    tightest: tuple[float, float, float] | None = None

    @classmethod
    def not_applicable(cls, detector: str, reason: str) -> Verdict:
        """Return the verdict of a detector that does not apply to this call."""
        return cls(detector=detector, reason=reason)

    @property
    def applicable(self) -> bool:
        """Whether the invariant applies to this kind of attention call."""
        return self.reason is None

    @property
    def fired(self) -> bool:
        """Whether any row breaks the invariant."""
        return self.violations > 0


def merged(*verdicts: Verdict) -> Verdict:
    """Return the joint verdict of one detector on several calls, or on several sequences of one call.

    Counts are added; a NaN is both the largest ratio and the smallest margin. Verdicts that do not apply count only if
    none applies. Positions and detail come from the first verdict that has them, the tightest row from the first
    verdict with the smallest margin.

    Args:
        *verdicts: at least one.

    Raises:
        ValueError: without a verdict.
    """
    applicable = [verdict for verdict in verdicts if verdict.reason is None]
    if len(applicable) < 2:
        if not verdicts:
            raise ValueError("verdicts: got none, allowed at least one")
        return applicable[0] if applicable else verdicts[0]
    closest = _closest(applicable)
    return Verdict(
        detector=applicable[0].detector,
        rows_checked=sum(verdict.rows_checked for verdict in applicable),
        violations=sum(verdict.violations for verdict in applicable),
        nonfinite=sum(verdict.nonfinite for verdict in applicable),
        positions=next((verdict.positions for verdict in applicable if verdict.positions), ()),
        largest_ratio=_largest([verdict.largest_ratio for verdict in applicable]),
        smallest_margin=None if closest is None else closest.smallest_margin,
        detail=next((verdict.detail for verdict in applicable if verdict.detail), ""),
        tightest=None if closest is None else closest.tightest,
    )


# Tens of thousands of verdicts are joined in a batch of faults: tensors would take ten times as long. The built-in
# functions lose a NaN, depending on the order; only NaN differs from itself.


def _largest(ratios: Sequence[float | None]) -> float | None:
    present = [ratio for ratio in ratios if ratio is not None]
    return next((ratio for ratio in present if ratio != ratio), max(present)) if present else None


def _closest(verdicts: Sequence[Verdict]) -> Verdict | None:
    closest, smallest = None, math.inf
    for verdict in verdicts:
        margin = verdict.smallest_margin
        if margin is None:
            continue
        if margin != margin:
            return verdict
        if closest is None or margin < smallest:
            closest, smallest = verdict, margin
    return closest


def extreme(reduce: Callable[[Tensor], Tensor], *values: float | None) -> float | None:
    """Return the largest or smallest of the values that exist; NaN if one of them is NaN.

    Args:
        reduce: ``torch.max`` or ``torch.min``.
        *values: None for a value that does not exist.
    """
    # torch's max and min propagate NaN; the built-in ones lose it, depending on the order.
    present = [value for value in values if value is not None]
    return float(reduce(torch.tensor(present, dtype=torch.float64))) if present else None


def first_positions(positions: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the first MAX_POSITIONS rows of a (count, axes) index tensor as tuples."""
    return tuple(tuple(row) for row in positions[:MAX_POSITIONS].tolist())
