"""Turn residuals and tolerances into a verdict: the one decision rule of all detectors.

    judged("S_row", RowCheck(residual, tolerance))       # fires where not (residual <= tolerance)

A row fires iff *not* (residual <= tolerance), so that NaN fires, and iff its tolerance is not finite.

Public names: ``RowCheck``, ``judged``.

>>> check = RowCheck(torch.tensor([0.5, float("nan"), 3.0]), torch.tensor([1.0, 1.0, 2.0]))
>>> verdict = judged("example", check)
>>> verdict.violations, verdict.positions, verdict.nonfinite, verdict.rows_checked
(2, ((1,), (2,)), 1, 3)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.detector import Verdict, first_positions


@dataclass(frozen=True, eq=False)
class RowCheck:
    """An equation that must hold row by row, as computed on one attention call.

    Attributes:
        residual: (...,) float64, how far each row is from what must hold; 0 or less is a perfect row.
        tolerance: broadcastable to ``residual``, float64, proved bound on a correct row's residual.
        checked: bool, broadcastable; rows where it is False are not judged and not counted. None: all are.
    """

    residual: Tensor
    tolerance: Tensor
    checked: Tensor | None = None


@torch.no_grad()
def judged(name: str, check: RowCheck, *, allowance: float = 0.0, detail: str = "") -> Verdict:
    """Return the verdict on the rows of ``check``.

    Args:
        name: of the detector.
        check: residuals and tolerances.
        allowance: what the user adds to the tolerance (``Detector.tolerance``), in units of the residual.
        detail: for people; kept only if a row fires.
    """
    residual, checked = check.residual, check.checked
    tolerance = (check.tolerance + allowance if allowance else check.tolerance).expand(residual.shape)
    broken = ~(residual <= tolerance) | ~torch.isfinite(tolerance)
    rows = residual.numel()
    if checked is not None:
        checked = checked.expand(residual.shape)
        broken &= checked
        rows = int(checked.sum())
        residual, tolerance = residual[checked], tolerance[checked]
    violations = int(broken.sum())
    finite = torch.isfinite(residual) & torch.isfinite(tolerance)
    nonfinite = int((~finite).sum()) if violations else 0
    # A residual of 0 is perfect whatever the tolerance, a tolerance of 0 included.
    ratio = torch.where(residual <= 0, 0.0, residual / tolerance)
    return Verdict(
        detector=name,
        rows_checked=rows,
        violations=violations,
        nonfinite=nonfinite,
        positions=first_positions(broken.nonzero()) if violations else (),
        largest_ratio=float(ratio.max()) if rows else None,
        detail=detail if violations else "",
    )
