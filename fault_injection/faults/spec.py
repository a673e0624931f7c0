"""The specification of a fault, which may leave fields open. This module does not need torch.

>>> FaultSpec(location="query", bits="exponent").location
'q'
>>> FaultSpec(kind="bitflp", location="scores")
Traceback (most recent call last):
    ...
ValueError: fault.kind: got 'bitflp', allowed bitflip, stuck_at_0, stuck_at_1, zero, random_value, bit_error_rate; did you mean 'bitflip'?
"""  # noqa: E501 - the last line is what the error prints

from __future__ import annotations

from dataclasses import dataclass, field

from fault_injection.faults.kinds import BITS, FAULT_KINDS, RATE
from fault_injection.locations import LOCATION_TABLE
from fault_injection.names import nearest
from fault_injection.numbers.formats import FIELDS, WIDEST

AXES = ("batch", "head", "row", "col")
"""Names of the axes; ``Location.axes`` says what a row and a column of a location are."""


@dataclass(frozen=True)
class ElementIndex:
    """The element that a fault hits; a coordinate that is ``None`` is drawn."""

    batch: int | None = None
    head: int | None = None
    row: int | None = None
    col: int | None = None

    def as_tuple(self) -> tuple[int | None, int | None, int | None, int | None]:
        """Return the four coordinates in the order of ``AXES``."""
        return self.batch, self.head, self.row, self.col


@dataclass(frozen=True)
class FaultSpec:
    """What kind of fault to draw.

    Attributes:
        location: a name or alias of ``fault_injection.locations``; kept as the name.
        kind: a name of ``fault_injection.faults.kinds``.
        bits: bit numbers, the name of a field (one of its bits is drawn), or ``None`` (any bit is drawn).
        index: the element, in full or in part.
        include_masked: draw hidden keys of scores and weights as well.
        rate: the bit error rate, in (0, 1]; for kinds that draw by a rate only.

    Raises:
        ValueError: a name is unknown, or the kind has no bits or no rate but one is given.
    """

    location: str
    kind: str = "bitflip"
    bits: tuple[int, ...] | str | None = None
    index: ElementIndex = field(default_factory=ElementIndex)
    include_masked: bool = False
    rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "location", LOCATION_TABLE[self.location].name)
        drawn = FAULT_KINDS[self.kind].draws
        self._check_bits(drawn)
        if (drawn == RATE) != (self.rate is not None):
            wanted = "needs" if drawn == RATE else "has no use for"
            raise ValueError(f"fault.rate: kind {self.kind!r} {wanted} a rate, got {self.rate}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"fault.rate: got {self.rate}, allowed: above 0, at most 1")

    def _check_bits(self, drawn: str) -> None:
        if self.bits is not None and drawn != BITS:
            raise ValueError(
                f"fault.bit: kind {self.kind!r} has no use for a bit, got {self.bits}; leave it out (null)"
            )
        if isinstance(self.bits, str) and self.bits not in FIELDS:
            raise ValueError(
                f"fault.bit: got {self.bits!r}, allowed a bit number, a list of them, or {', '.join(FIELDS)}"
                f"{nearest(self.bits, FIELDS)}"
            )
        if self.bits is not None and not isinstance(self.bits, (str, tuple)):
            raise ValueError(f"fault.bit: got {self.bits!r}, allowed a tuple of bit numbers, a field name or None")
        if isinstance(self.bits, tuple):
            object.__setattr__(self, "bits", tuple(int(bit) for bit in self.bits))
            if min(self.bits, default=0) < 0:
                raise ValueError(f"bit: got {min(self.bits)}, allowed 0 or more")
            if not self.bits:
                raise ValueError("fault.bit: got an empty list; leave it out to draw any bit")
            WIDEST.check(self.bits)
