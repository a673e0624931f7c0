"""The registry of fault kinds: how each changes the bits of a hit number.

Every kind is one rule on bit patterns, ``new = (old & keep) ^ toggle``. A row says what must be drawn besides the
element, and which masks result. This module does not need torch.

>>> from fault_injection.numbers.formats import FORMATS
>>> half = FORMATS["float16"]
>>> [f"{mask:#06x}" for mask in FAULT_KINDS["stuck_at_1"].masks(half, half.pattern([14]))]
['0xbfff', '0x4000']
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fault_injection.numbers.formats import NumberFormat, clearing, flipping, replacing, setting
from fault_injection.table import Table

BITS, PATTERN, RATE, NOTHING = "bits", "pattern", "rate", "nothing"
"""What a kind draws: chosen bits; a uniformly random pattern; every bit separately, at a rate; nothing."""


@dataclass(frozen=True)
class FaultKind:
    """How one number is broken.

    Attributes:
        name: its name in configurations and rows.
        meaning: one clause for people.
        draws: ``bits``, ``pattern``, ``rate`` or ``nothing``.
        masks: returns ``(keep, toggle)`` for a number, given its format and the drawn pattern: the chosen bits, the
            random pattern, the bits that the rate chose, or 0.
    """

    name: str
    meaning: str
    draws: str
    masks: Callable[[NumberFormat, int], tuple[int, int]]

    def __post_init__(self) -> None:
        if self.draws not in (BITS, PATTERN, RATE, NOTHING):
            raise ValueError(f"draws: got {self.draws!r}, allowed {BITS}, {PATTERN}, {RATE}, {NOTHING}")


FAULT_KINDS = Table(
    "fault.kind",
    [
        FaultKind("bitflip", "the chosen bits flip", BITS, flipping),
        FaultKind("stuck_at_0", "the chosen bits become 0", BITS, clearing),
        FaultKind("stuck_at_1", "the chosen bits become 1", BITS, setting),
        FaultKind("zero", "the number becomes +0.0", NOTHING, replacing),
        FaultKind("random_value", "its bits become a uniformly random pattern, which may be NaN", PATTERN, replacing),
        FaultKind("bit_error_rate", "every bit of every number that may be hit flips at a rate", RATE, flipping),
    ],
)
"""The registry. ``FAULT_KINDS.register`` adds a row, ``FAULT_KINDS.registered`` for the duration of a block."""

KINDS = FAULT_KINDS.names()
"""The kinds that come with the project, in order."""


def that_draw(*what: str) -> tuple[str, ...]:
    """Return the names of the kinds that draw one of these.

    >>> that_draw(BITS)
    ('bitflip', 'stuck_at_0', 'stuck_at_1')
    """
    return tuple(row.name for row in FAULT_KINDS if row.draws in what)
