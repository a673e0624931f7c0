"""The table of number formats: the number of bits of a floating-point number, and the meaning of each.

Bit 0 is the least significant bit of the mantissa, the highest bit is the sign (IEEE 754 numbering). This module does
not need torch; ``fault_injection.numbers.bits`` reads a row when it has a tensor of that dtype.

>>> single = FORMATS["float32"]
>>> single.bits, single.field_of(30), single.bits_of("exponent")
(32, 'exponent', range(23, 31))
>>> FORMATS["float23"]
Traceback (most recent call last):
    ...
ValueError: dtype: got 'float23', allowed float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2; did you mean 'float32'?
"""  # noqa: E501 - the last line is what the error prints

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fault_injection.table import Table

FIELDS = ("sign", "exponent", "mantissa")


@dataclass(frozen=True)
class NumberFormat:
    """A binary floating-point format with one sign bit.

    Attributes:
        name: the name of the torch dtype.
        exponent, mantissa: the number of bits of each of these fields.
        computes: whether a model can compute in it; other formats only store numbers.
        accumulates: whether kernels sum in the format itself; otherwise they sum in float32 and round once.
    """

    name: str
    exponent: int
    mantissa: int
    computes: bool = False
    accumulates: bool = False

    @property
    def bits(self) -> int:
        """How many bits a number has."""
        return 1 + self.exponent + self.mantissa

    @property
    def all_bits(self) -> int:
        """The pattern with every bit set, as a non-negative integer."""
        return (1 << self.bits) - 1

    @property
    def bias(self) -> int:
        """The number that is subtracted from a stored exponent; the smallest normal number is ``2 ** (1 - bias)``."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def fields(self) -> dict[str, range]:
        """The bit numbers of each field."""
        sign = self.bits - 1
        ranges = range(sign, self.bits), range(self.mantissa, sign), range(self.mantissa)
        return dict(zip(FIELDS, ranges, strict=True))

    def field_of(self, bit: int) -> str:
        """Return the field of ``bit``; raise ``ValueError`` with the range if the bit does not exist."""
        self.check([bit])
        return next(field for field, bits in self.fields.items() if bit in bits)

    def bits_of(self, field: str) -> range:
        """Return the bit numbers of a field; ``ValueError`` for an unknown one."""
        if field not in FIELDS:
            raise ValueError(f"bit field: got {field!r}, allowed {', '.join(FIELDS)}")
        return self.fields[field]

    def check(self, bits: Iterable[int]) -> None:
        """Raise ``ValueError`` with the allowed range unless every bit exists and none is repeated."""
        seen: set[int] = set()
        for bit in bits:
            if not 0 <= bit < self.bits:
                raise ValueError(f"bit: got {bit}, allowed 0..{self.bits - 1} for {self.name}")
            if bit in seen:
                raise ValueError(f"bit: {bit} is given twice; the bits of one fault must be distinct")
            seen.add(bit)

    def pattern(self, bits: Iterable[int]) -> int:
        """Return the pattern in which exactly ``bits`` are set; ``ValueError`` as ``check``."""
        chosen = list(bits)
        self.check(chosen)
        return sum(1 << bit for bit in chosen)


FORMATS = Table(
    "dtype",
    [
        NumberFormat("float64", exponent=11, mantissa=52, computes=True, accumulates=True),
        NumberFormat("float32", exponent=8, mantissa=23, computes=True, accumulates=True),
        NumberFormat("bfloat16", exponent=8, mantissa=7, computes=True),
        NumberFormat("float16", exponent=5, mantissa=10, computes=True),
        NumberFormat("float8_e4m3fn", exponent=4, mantissa=3),
        NumberFormat("float8_e5m2", exponent=5, mantissa=2),
    ],
)
"""The table. ``FORMATS.register`` adds a row, ``FORMATS.registered`` for the duration of a block."""

WIDEST = FORMATS["float64"]


def model_dtypes() -> tuple[str, ...]:
    """Return the formats that a model can be computed in.

    >>> model_dtypes()
    ('float64', 'float32', 'bfloat16', 'float16')
    """
    return tuple(row.name for row in FORMATS if row.computes)


def flipping(layout: NumberFormat, pattern: int) -> tuple[int, int]:
    """Return the masks ``(keep, toggle)`` that flip the bits of ``pattern``: ``new = (old & keep) ^ toggle``."""
    return layout.all_bits, pattern


def setting(layout: NumberFormat, pattern: int) -> tuple[int, int]:
    """Return the masks that set the bits of ``pattern`` to 1."""
    return layout.all_bits & ~pattern, pattern


def clearing(layout: NumberFormat, pattern: int) -> tuple[int, int]:
    """Return the masks that clear the bits of ``pattern`` to 0."""
    return layout.all_bits & ~pattern, 0


def replacing(layout: NumberFormat, pattern: int) -> tuple[int, int]:
    """Return the masks that put ``pattern`` in place of every bit."""
    return 0, pattern
