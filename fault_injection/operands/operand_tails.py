"""What lies between a projection and the attention product that reads it: a norm, a factor, a rotary embedding.

    tail = Tail(rotation=RotaryLayout(start=0, width=64, interleaved=False, table="halves"))
    expected = tail.expected(projected, (cos, sin), operand.dtype)
    (operand.double() - expected.value).abs() <= expected.tolerance           # docs/theory.md, F16

>>> tail = Tail(factor=0.5)
>>> expected = tail.expected(torch.ones(1, 1, 1, 2), None, torch.float32)
>>> expected.value.tolist(), bool((expected.tolerance < 1e-6).all()), tail.kind
([[[[0.5, 0.5]]]], True, 'scaled')
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fault_injection.operands.norms import Norm

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, each (batch or 1, position, width of the table)."""

_SINGLE = 2.0**-24
_DOUBLE = 2.0**-53
_SECOND_ORDER = 1 + 2.0**-10


@dataclass(frozen=True)
class RotaryLayout:
    """Which channels a rotary embedding turns, and how its tables are laid out.

    Channels pair as (c, c + width / 2), or as (2c, 2c + 1) if interleaved, counted from ``start``.

    Attributes:
        start, width: the channels that are turned.
        interleaved: how channels form pairs.
        table: "single" where the tables hold one number a pair; "halves" or "interleaved" where they hold one a
            channel, paired like that; "first half" where of one a channel only the first half is read.
    """

    start: int
    width: int
    interleaved: bool
    table: str

    def channels(self) -> tuple[slice, slice]:
        """Return the first and the second channels of all pairs."""
        return _pairs(self.start, self.width, self.interleaved)

    def angles(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``table`` (..., width of the table) says for the first and the second channels."""
        if self.table == "single":
            return table, table
        first, second = _pairs(0, self.width, self.table == "interleaved")
        return table[..., first], table[..., first if self.table == "first half" else second]

    def amplitude(self, rotation: Rotation) -> float:
        """Return a bound on the factor by which turning a pair changes its length; NaN if a table holds one.

        A rotation has 1; embeddings for long contexts multiply by a constant.
        """
        (cos1, cos2), (sin1, sin2) = (self.angles(table.double()) for table in rotation)
        squares = cos1.square() + sin1.square()
        if not (torch.equal(cos1, cos2) and torch.equal(sin1, sin2)):
            # The Frobenius norm of [[c1, -s1], [s2, c2]] bounds its largest singular value.
            squares = squares + cos2.square() + sin2.square()
        return float(squares.max().sqrt()) * _SECOND_ORDER


def _pairs(start: int, width: int, interleaved: bool) -> tuple[slice, slice]:
    if interleaved:
        return slice(start, start + width, 2), slice(start + 1, start + width, 2)
    return slice(start, start + width // 2), slice(start + width // 2, start + width)


@dataclass(frozen=True, eq=False)
class ExpectedOperand:
    """What the operand must be, element by element.

    Attributes:
        value: float64, (B, H, T, d).
        tolerance: float64, the same shape; bound on the distance of a correct computation (F16). 0 where the operand is
            the projection's output itself.
    """

    value: Tensor
    tolerance: Tensor


@dataclass(frozen=True, eq=False)
class Tail:
    """The map from a projection's output to the operand: first the norm, then the factor, then the rotation.

    Attributes:
        norm: over the channels of a head, or over all heads together; ``None`` without one.
        factor: what everything is multiplied by.
        rotation: ``None`` without a rotary embedding.
        gain: of the norm, float64, as it is to be; ``None``: as the norm's weights are when it is asked for.
    """

    norm: Norm | None = None
    factor: float = 1.0
    rotation: RotaryLayout | None = None
    gain: Tensor | None = None

    @property
    def kind(self) -> str:
        """The steps in their order, as in "normed, rotated"; "identity" without any."""
        steps = {"normed": self.norm is not None, "scaled": self.factor != 1, "rotated": self.rotation is not None}
        return ", ".join(step for step, there in steps.items() if there) or "identity"

    def relative_error(self, formats: set[torch.dtype]) -> float:
        """Return a bound on the relative error of the steps before the rotation (F16).

        Args:
            formats: of projection and operand.
        """
        relative = 0.0
        if self.norm is not None:
            relative += (self.norm.width / 2 + 12) * _SINGLE + 2 * max(_operation(formats), _SINGLE)
        if self.factor != 1:
            relative += _operation(formats) + 2 * _arithmetic(formats)
        return relative

    @torch.no_grad()
    def expected(self, projected: Tensor, rotation: Rotation | None, dtype: torch.dtype) -> ExpectedOperand:
        """Return what the tail makes of ``projected``, with the tolerance F16.

        Args:
            projected: (B, H, T, d) as stored, all heads.
            rotation: cosines and sines; read only if the tail rotates.
            dtype: format of the operand.

        Raises:
            ValueError: when the tail rotates and there is no rotation.
        """
        formats = {projected.dtype, dtype}
        value, relative, absolute = projected.double(), self.relative_error(formats), 0.0
        if self.norm is not None:
            gain = self.norm.gain() if self.gain is None else self.gain
            value = _over_channels(self.norm, value, gain)
            absolute = 3 * _underflow(formats) * float(gain.abs().max().clamp(min=1))
        if self.factor != 1:
            value = value * self.factor
            absolute = absolute * max(1.0, abs(self.factor)) + 2 * _underflow(formats)
        if self.rotation is None:
            return ExpectedOperand(value, _grown(relative) * value.abs() + absolute)
        if rotation is None:
            raise ValueError("rotation: got None, allowed (cos, sin): this tail rotates")
        return _rotated(value, rotation, self.rotation, formats, (relative, absolute))


def _over_channels(norm: Norm, value: Tensor, gain: Tensor) -> Tensor:
    batch, heads, rows, channels = value.shape
    if norm.width == channels:
        return norm.normalised(value) * gain
    together = value.transpose(1, 2).reshape(batch, rows, heads * channels)
    return (norm.normalised(together) * gain).view(batch, rows, heads, channels).transpose(1, 2)


def _rotated(
    value: Tensor,
    rotation: Rotation,
    layout: RotaryLayout,
    formats: set[torch.dtype],
    before: tuple[float, float],
) -> ExpectedOperand:
    """Turn ``value``; ``before`` bounds what it may be off already, relatively and absolutely."""
    relative, absolute = before
    formats = formats | {rotation[0].dtype}
    # Of one format: two products and their sum. Of several, one of the factors may be rounded first.
    roundings = 2 if len(formats) == 1 else 3
    growth = _grown(relative + roundings * _operation(formats))
    (cos1, cos2), (sin1, sin2) = (layout.angles(table.double().unsqueeze(1)) for table in rotation)
    floor = absolute * float(rotation[0].abs().max() + rotation[1].abs().max()) + 4 * _underflow(formats)
    result, tolerance = (
        value.clone(),
        _grown(relative) * value.abs() + absolute if relative else torch.zeros_like(value),
    )
    first, second = layout.channels()
    x, y = value[..., first], value[..., second]
    for channels, terms in ((first, (x * cos1, -y * sin1)), (second, (y * cos2, x * sin2))):
        result[..., channels] = terms[0] + terms[1]
        tolerance[..., channels] = growth * (terms[0].abs() + terms[1].abs()) + floor
    return ExpectedOperand(result, tolerance)


def _arithmetic(formats: set[torch.dtype]) -> float:
    """Return the unit roundoff of the arithmetic: float64 if everything is, else float32."""
    return _DOUBLE if formats == {torch.float64} else _SINGLE


def _operation(formats: set[torch.dtype]) -> float:
    """Return the relative error of one operation that is stored in the coarsest of the formats."""
    stored = max(torch.finfo(dtype).eps / 2 for dtype in formats)
    return stored if stored <= _SINGLE else stored + _SINGLE


def _underflow(formats: set[torch.dtype]) -> float:
    """Return the absolute error of one operation whose result is subnormal in the coarsest of the formats."""
    if formats == {torch.float64}:
        return 2.0**-1022
    spacing = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
    return 2.0**-126 + max(spacing.get(dtype, 0.0) for dtype in formats)


def _grown(relative: float) -> float:
    """Return a bound on the product of factors 1 + delta whose |delta| sum to ``relative``; 0 stays 0."""
    if relative == 0:
        return 0.0
    # The last term is what this module's own float64 arithmetic loses: at most 16 roundings of one operation each.
    return relative / (1 - relative) * _SECOND_ORDER + 16 * _DOUBLE
