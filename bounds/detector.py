"""What a detector is: it reads one attention call and says which rows break an invariant.

    detector = get_detector("s@w")
    detector.prepare(model)                      # once per model: tables that depend on the weights alone
    verdict = detector.check(state)              # per attention call
    if verdict.applicable and verdict.fired: ...

A detector reads the faulty pass only. One that compares with the fault-free pass is an *oracle*: its name starts
with ``oracle_``, and ``check`` takes what ``reduce`` kept of that pass.

Public names: ``Detector``, ``Verdict``, ``MAX_POSITIONS``, ``extreme``, ``first_positions``.

>>> Verdict.not_applicable("q@o", "queries have 192 channels and values 128").fired
False
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bounds.attention_state import AttentionState
from bounds.violations import require_tolerance

MAX_POSITIONS = 16
"""Most positions a verdict lists; the counts are always complete."""


@dataclass(frozen=True)
class Verdict:
    """What one detector says about one attention call. Plain numbers: it keeps no tensor alive.

    Attributes:
        detector: name of the detector.
        rows_checked: number of rows the invariant was evaluated on.
        violations: number of rows that break it, non-finite ones included.
        nonfinite: number of rows that could not be evaluated because something in them is NaN or Inf.
        positions: indices of the first violations, at most MAX_POSITIONS.
        largest_ratio: largest residual in units of the tolerance; None where the invariant has none.
        smallest_margin: smallest distance to the nearer bound, negative outside; None where there is no bound.
        reason: why the invariant says nothing about this call; None when it applies.
        detail: what broke, for people; may be empty.
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

    @classmethod
    def not_applicable(cls, detector: str, reason: str) -> Verdict:
        """Return the verdict of a detector that cannot speak about this call."""
        return cls(detector=detector, reason=reason)

    @property
    def applicable(self) -> bool:
        """Whether the invariant holds for this kind of attention call at all."""
        return self.reason is None

    @property
    def fired(self) -> bool:
        """Whether any row breaks the invariant."""
        return self.violations > 0


class Detector(ABC):
    """Base class of the detectors; subclasses set the class variables and implement ``judge``.

    Class attributes:
        name: the name in configurations and results.
        needs: names of the ``AttentionState`` tensors it reads.
        statement: the invariant in one line, with its place in docs/theory.md.
        cost: extra work per row of n keys and d channels, as a class such as ``"n"``, ``"n + d"`` or ``"n exp"``.
        oracle: whether it needs the fault-free pass.
        proved: whether a theorem rules out false positives; not so for thresholds taken from the literature.
        calibrated: whether it must see fault-free calls of other inputs first (``calibrate``).
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    statement: ClassVar[str]
    cost: ClassVar[str]
    oracle: ClassVar[bool] = False
    proved: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False

    def __init__(self, tolerance: float = 0.0) -> None:
        """Set the allowance that is added to every proved tolerance, in the detector's own units.

        Raises:
            ValueError: when it is negative or not finite.
        """
        require_tolerance(tolerance)
        self.tolerance = tolerance

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Compute what depends on the model's weights alone. Most detectors need nothing."""

    def calibrate(self, state: AttentionState) -> None:  # noqa: B027
        """Learn from a fault-free call. Only ``calibrated`` detectors do; theorems need no calibration."""

    def derive(self, state: AttentionState) -> None:  # noqa: B027
        """Compute the statistics that detectors share (``state.derived``), so that their cost can be told apart."""

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the invariant says nothing about ``state``, or None when it applies."""
        missing = sorted(name for name in self.needs if getattr(state, name, None) is None)
        return f"it reads {', '.join(missing)}, which this state does not carry" if missing else None

    def reduce(self, state: AttentionState) -> Any:
        """Return what ``check`` needs to remember of the fault-free pass: None unless the detector is an oracle."""
        return None

    def check(self, state: AttentionState, baseline: Any = None) -> Verdict:
        """Judge one attention call.

        Args:
            state: the call.
            baseline: for an oracle, what ``reduce`` returned for the fault-free pass.

        Raises:
            ValueError: when an oracle gets no baseline, a baseline is given to another detector, or the two passes
                have different shapes.
        """
        if (reason := self.applicable(state)) is not None:
            return Verdict.not_applicable(self.name, reason)
        if self.oracle != (baseline is not None):
            got, allowed = ("None", "what reduce() returned") if self.oracle else ("one", "None: it is no oracle")
            raise ValueError(f"{self.name}: baseline: got {got}, allowed {allowed}")
        return self.judge(state, baseline)

    @abstractmethod
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge a call the invariant applies to; ``check`` has verified the arguments."""


def extreme(reduce: Callable[[Tensor], Tensor], *values: float | None) -> float | None:
    """Return the largest or smallest of the values that exist; NaN if one of them is.

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
