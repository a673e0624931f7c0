"""Turn residuals and tolerances into a verdict: the one decision rule of all detectors.

    judged("S_row", RowCheck(residual, tolerance))       # fires where not (residual <= tolerance)
    judged_each("S_row", RowCheck(residual, tolerance))  # one verdict for each sequence

A row fires if *not* (residual <= tolerance), so that NaN fires, or if its tolerance is not finite.

>>> check = RowCheck(torch.tensor([0.5, float("nan"), 3.0]), torch.tensor([1.0, 1.0, 2.0]))
>>> verdict = judged("example", check)
>>> verdict.violations, verdict.positions, verdict.nonfinite, verdict.rows_checked
(2, ((1,), (2,)), 1, 3)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Detector
from bounds.core.row_outcome import RowOutcome, not_finite, verdict, verdicts
from bounds.core.verdict import Verdict


@dataclass(frozen=True, eq=False)
class RowCheck:
    """An equation that must hold row by row, as computed on one attention call.

    Attributes:
        residual: (...,) float64, how far each row is from the equation; 0 or less is a perfect row.
        tolerance: broadcastable to ``residual``, float64, the proved bound on a correct row's residual.
        checked: bool, broadcastable; rows with False are not judged and not counted. None: all rows are.
    """

    residual: Tensor
    tolerance: Tensor
    checked: Tensor | None = None


@torch.no_grad()
def judged(name: str, check: RowCheck, *, allowance: float = 0.0, detail: str = "") -> Verdict:
    """Return the verdict on the rows of ``check``.

    Args:
        name: the name of the detector.
        check: residuals and tolerances.
        allowance: the user's addition to the tolerance (``Detector.tolerance``), in units of the residual.
        detail: for people; kept only if a row fires.
    """
    return verdict(name, _outcome(check, allowance), detail)


@torch.no_grad()
def judged_each(name: str, check: RowCheck, *, allowance: float = 0.0) -> list[Verdict]:
    """Return the verdict on the rows of each sequence, the first axis of ``check``. Arguments as for ``judged``."""
    return verdicts(name, _outcome(check, allowance))


def _outcome(check: RowCheck, allowance: float) -> RowOutcome:
    residual, checked = check.residual, check.checked
    tolerance = check.tolerance + allowance if allowance else check.tolerance
    # A residual of 0 is perfect for every tolerance, even 0.
    ratio = torch.where(residual <= 0, 0.0, residual / tolerance)
    fired = ~((residual <= tolerance) & (tolerance < math.inf))
    if checked is not None:
        fired &= checked
        ratio = torch.where(checked, ratio, -math.inf)
    return RowOutcome(fired, fired & not_finite(residual, tolerance), ratio, checked)


class RowDetector(Detector):
    """Base class of the detectors that check one equation row by row; subclasses implement ``check_rows``."""

    @abstractmethod
    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return residual and tolerance of every row; the detector applies to the call, the first axis is the batch."""

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every row."""
        return judged(self.name, self.check_rows(state), allowance=self.tolerance)

    def check_each(self, state: AttentionState, baseline: Any = None) -> list[Verdict]:
        """Judge the rows of each sequence, all at once."""
        if (refused := self.refused(state, baseline)) is not None:
            return [refused] * state.rows[0]
        return judged_each(self.name, self.check_rows(state), allowance=self.tolerance)
