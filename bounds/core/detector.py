"""The base class of detectors: a detector reads one attention call and says which rows break an invariant.

    detector = get_detector("s@w")
    detector.prepare(model)                      # once per model: tables that depend on the weights alone
    verdict = detector.check(state)              # per attention call
    if verdict.applicable and verdict.fired: ...
    verdicts = detector.check_each(state)        # the same for each sequence of the batch on its own

A detector reads only the faulty pass. An *oracle* compares it with the fault-free pass: its name starts with
``oracle_``, and its ``check`` takes the result of ``reduce`` on that pass.

>>> Verdict.not_applicable("q@o", "queries have 192 channels and values 128").fired
False
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from bounds.core.attention_state import AttentionState
from bounds.core.sequences import sequence_of
from bounds.core.verdict import MAX_POSITIONS, Verdict, extreme, first_positions, merged

__all__ = ["MAX_POSITIONS", "Detector", "Verdict", "extreme", "first_positions", "merged"]


class Detector(ABC):
    """Base class of the detectors; subclasses set the class variables and implement ``judge``.

    Class attributes:
        name: the name in configurations and results.
        needs: names of the ``AttentionState`` tensors it reads.
        statement: the invariant in one line, with its place in docs/theory.md.
        cost: extra work per row of n keys and d channels, as a class such as ``"n"``, ``"n + d"`` or ``"n exp"``.
        oracle: whether it needs the fault-free pass.
        proved: whether a theorem rules out false positives; thresholds from the literature have no such theorem.
        calibrated: whether it must see fault-free calls of other inputs first (``calibrate``).
        per_group: whether the merged verdicts on the groups of ``bounds.core.sequences.by_group`` equal the verdict on
            the call, number for number: it reads nothing that belongs to several groups of heads.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    statement: ClassVar[str]
    cost: ClassVar[str]
    oracle: ClassVar[bool] = False
    proved: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    per_group: ClassVar[bool] = False

    def __init__(self, tolerance: float = 0.0) -> None:
        """Set the allowance that is added to every proved tolerance, in the detector's own units.

        Raises:
            ValueError: when it is negative or not finite.
        """
        require_tolerance(tolerance)
        self.tolerance = tolerance

    @property
    def propagates(self) -> bool:
        """Whether it can fire on a correct evaluation of attention whose inputs an earlier fault has changed.

        A proof holds for all inputs, so a proved detector is silent after a fault.
        """
        return self.oracle or not self.proved

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Compute tables that depend only on the model's weights. Most detectors need none."""

    def calibrate(self, state: AttentionState) -> None:  # noqa: B027
        """Learn from a fault-free call. Only ``calibrated`` detectors do; theorems need no calibration."""

    def derive(self, state: AttentionState) -> None:  # noqa: B027
        """Compute the statistics that detectors share (``state.derived``), so that their cost is timed separately."""

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the invariant says nothing about ``state``, or None when it applies."""
        missing = sorted(name for name in self.needs if getattr(state, name, None) is None)
        return f"it reads {', '.join(missing)}, which this state does not carry" if missing else None

    def reduce(self, state: AttentionState) -> Any:
        """Return the data of the fault-free pass that ``check`` needs: None unless the detector is an oracle."""
        return None

    def check(self, state: AttentionState, baseline: Any = None) -> Verdict:
        """Judge one attention call.

        Args:
            state: the call.
            baseline: for an oracle, the result of ``reduce`` on the fault-free pass.

        Raises:
            ValueError: an oracle gets no baseline, another detector gets one, or the two passes have different shapes.
        """
        refused = self.refused(state, baseline)
        return self.judge(state, baseline) if refused is None else refused

    def check_each(self, state: AttentionState, baseline: Any = None) -> list[Verdict]:
        """Judge each sequence of the batch as ``check`` judges a call of only that sequence, but without positions.

        Args:
            state: the call; a tensor that all sequences share may have a batch of 1.
            baseline: for an oracle, the result of ``reduce`` on the same sequences of the fault-free pass, or
                ``bounds.core.sequences.gathered`` of it.

        Raises:
            ValueError: as ``check`` does.
        """
        return [
            self.check(sequence_of(state, number), sequence_of(baseline, number)) for number in range(state.rows[0])
        ]

    def refused(self, state: AttentionState, baseline: Any) -> Verdict | None:
        """Return the verdict on a call to which the invariant does not apply; None if the call must be judged.

        Raises:
            ValueError: when an oracle gets no baseline, or a baseline is given to another detector.
        """
        if (reason := self.applicable(state)) is not None:
            return Verdict.not_applicable(self.name, reason)
        if self.oracle != (baseline is not None):
            got, allowed = ("None", "what reduce() returned") if self.oracle else ("one", "None: it is no oracle")
            raise ValueError(f"{self.name}: baseline: got {got}, allowed {allowed}")
        return None

    @abstractmethod
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge a call to which the invariant applies; ``check`` has verified the arguments."""


def require_tolerance(tolerance: float) -> None:
    """Raise ValueError unless ``tolerance`` is a finite number that is not negative."""
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(
            f"tolerance: got {tolerance!r}, allowed a finite number >= 0 (it adds to the proved tolerance)"
        )
