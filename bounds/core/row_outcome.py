"""The outcome of each row, and the verdict on a whole call or on each of its sequences.

    verdict("S_row", outcome)                    # on all rows, with the positions of the first violations
    verdicts("S_row", outcome)                   # one for each sequence, that is for each index of the first axis

Both take the same numbers from the same rows, so that the merged verdicts of the sequences are the verdict on the call.

>>> fired = torch.tensor([[False, False], [True, False]])
>>> outcome = RowOutcome(fired, nonfinite=~fired & fired, ratio=torch.tensor([[0.5, 0.25], [7.0, 0.5]]))
>>> verdict("example", outcome).positions, [found.largest_ratio for found in verdicts("example", outcome)]
(((1, 0),), [0.5, 7.0])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bounds.core.verdict import Verdict, first_positions


@dataclass(frozen=True, eq=False)
class RowOutcome:
    """The outcome of a check for each row of a call. The first axis is that of the sequences.

    Attributes:
        fired: bool (...), checked rows that break the invariant.
        nonfinite: bool (...), rows among them that could not be evaluated.
        ratio: float (...), residual in units of the tolerance; -Inf for a row that is not checked.
        checked: bool, broadcastable to the rows; None: all rows are.
    """

    fired: Tensor
    nonfinite: Tensor
    ratio: Tensor
    checked: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundedOutcome(RowOutcome):
    """The outcome of rows with a quantity that must be between two bounds.

    Attributes:
        margin: float (...), distance to the nearer bound, negative outside; Inf where ``bounded`` is False.
        bounded: bool, broadcastable to the rows: whether the margin counts.
        interval: float64, each broadcastable to the rows: the quantity, its lower and upper bound, and the tolerance
            beyond them; None if the margin is that of several quantities.
    """

    margin: Tensor
    bounded: Tensor
    interval: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def among(self, rows: Tensor) -> BoundedOutcome:
        """Return the same outcome, with margins only for some rows, bool (...)."""
        return replace(self, margin=torch.where(rows, self.margin, math.inf), bounded=rows & self.bounded)


def verdict(name: str, outcome: RowOutcome, detail: str = "") -> Verdict:
    """Return the verdict on all rows together; ``detail`` is kept only if one fires."""
    found = _counted(name, outcome, 1)[0]
    if not found.violations:
        return found
    return replace(found, positions=first_positions(outcome.fired.nonzero()), detail=detail)


def verdicts(name: str, outcome: RowOutcome) -> list[Verdict]:
    """Return the verdict on the rows of each sequence, without positions."""
    return _counted(name, outcome, outcome.fired.shape[0])


def fires_if_one_does(first: BoundedOutcome, second: BoundedOutcome) -> BoundedOutcome:
    """Return the outcome of a check that fires where one of two does; both checked the same rows."""
    return BoundedOutcome(
        fired=first.fired | second.fired,
        # A row that is not finite on one path counts once, regardless of the other path.
        nonfinite=first.nonfinite | second.nonfinite,
        ratio=torch.maximum(first.ratio, second.ratio),
        checked=first.checked,
        margin=torch.minimum(first.margin, second.margin),
        bounded=first.bounded,
    )


def not_finite(*tensors: Tensor) -> Tensor:
    """Return where one of several float tensors, broadcastable to each other, is NaN or infinite; bool."""
    # The difference of a finite number from itself is 0, that of another NaN: faster than to ask for each.
    first, *others = (tensor - tensor for tensor in tensors)
    for other in others:
        first = first + other
    return first != 0


def _counted(name: str, outcome: RowOutcome, sequences: int) -> list[Verdict]:
    rows = outcome.fired.shape
    if not outcome.fired.numel():
        return [Verdict(name)] * sequences

    def by_sequence(tensor: Tensor) -> Tensor:
        return tensor.expand(rows).reshape(sequences, -1)

    def count(mask: Tensor | None) -> list[int]:
        if mask is None:
            return [outcome.fired.numel() // sequences] * sequences
        return by_sequence(mask).sum(1).tolist()

    fired = count(outcome.fired) if bool(outcome.fired.any()) else [0] * sequences
    nonfinite = count(outcome.nonfinite) if any(fired) else fired
    checked = count(outcome.checked)
    counts = list(zip(checked, fired, nonfinite, strict=True))
    columns: list[list[Any]] = [counts, by_sequence(outcome.ratio).amax(1).tolist()]
    if isinstance(outcome, BoundedOutcome):
        columns.append(checked if outcome.bounded is outcome.checked else count(outcome.bounded))
        if outcome.interval is None:
            columns.append(by_sequence(outcome.margin).amin(1).tolist())
        else:
            columns += _tightest(*(by_sequence(each) for each in (outcome.margin, outcome.bounded, *outcome.interval)))
    return [_verdict(name, *numbers) for numbers in zip(*columns, strict=True)]


def _tightest(
    margin: Tensor, bounded: Tensor, value: Tensor, lower: Tensor, upper: Tensor, allowed: Tensor
) -> tuple[list[float], list[list[float]]]:
    """Return the smallest margin of each sequence, and what is bounded there with its bounds; all are (F, rows)."""
    row = margin.argmin(1, keepdim=True)
    counts = bounded.gather(1, row)
    if not bool(counts.all()):
        # Where even the smallest is infinite, rows that do not count have it too.
        row = torch.where(counts, row, bounded.byte().argmax(1, keepdim=True))
    margin, value, lower, upper, allowed = (each.gather(1, row) for each in (margin, value, lower, upper, allowed))
    return margin[:, 0].tolist(), torch.cat([value, lower - allowed, upper + allowed], 1).tolist()


def _verdict(
    name: str,
    counts: tuple[int, int, int],
    ratio: float,
    bounded: int = 0,
    margin: float = 0.0,
    interval: Sequence[float] | None = None,
) -> Verdict:
    rows, violations, nonfinite = counts
    # Zeros lose their sign, which depends on the order in which they were compared.
    largest = ratio + 0.0 if rows else None
    smallest = margin + 0.0 if bounded else None
    tightest = None if interval is None or not bounded else (interval[0], interval[1], interval[2])
    return Verdict(name, rows, violations, nonfinite, (), largest, smallest, tightest=tightest)
