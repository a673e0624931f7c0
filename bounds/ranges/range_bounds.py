"""How large queries, keys, values and scores can be at all, from the weights alone.

A norm puts out ``x = g z + beta`` with ``|z| <= sqrt(D)``, whatever it reads. So does everything linear behind it have
a bound: ``|q_c| <= sqrt(D) |W_c g| + |W_c beta + b_c|`` (docs/theory.md, T16), and the product of two such vectors
too (T17).

    operand = OperandRange.of(source, dtype)
    operand.channel                       # (heads, channels): bound on |q_c|
    score_bound(queries, keys)            # (heads,): bound on |q . k|
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.numerics.rounding import accumulation, gamma, storage
from fault_injection.operands.norms import Norm
from fault_injection.operands.operand_source import OperandSource
from fault_injection.operands.operand_tails import RotaryLayout, Tail

MAX_WIDTH = 2**14
"""Widest norm for which the allowance of the radius is proved."""

_RADIUS_ALLOWANCE = 1 + 2.0**-9
_SECOND_ORDER = 1 + 2.0**-8
_SINGLE = 2.0**-24


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """The ellipsoid that contains a norm's output: ``gain * z + offset``, ``|z| <= radius``, up to rounding errors.

    Attributes:
        gain, offset: (D,) float64.
        radius: sqrt(D), plus the possible error of the norm's statistics.
        relative, absolute: rounding error of each channel, relative to ``|gain z| + |offset|`` and beyond.
    """

    gain: Tensor
    offset: Tensor
    radius: float
    relative: float
    absolute: float

    @classmethod
    def of(cls, norm: Norm, dtype: torch.dtype) -> Ellipsoid:
        """Return the ellipsoid of the output of ``norm``, stored in ``dtype``. Proof: docs/theory.md, T16."""
        stored, gain = storage(dtype), norm.gain()
        # Norms compute in float32 even inside a float64 model.
        relative = 3 * (stored.roundoff + _SINGLE) + 4 * _SINGLE
        absolute = 4 * (stored.absolute + 2.0**-126) * (1 + float(gain.abs().max()))
        return cls(gain, norm.offset(), math.sqrt(norm.width) * _RADIUS_ALLOWANCE, relative, absolute)

    def outside(self, hidden: Tensor) -> Tensor:
        """Return which vectors of ``hidden`` (..., D) are certainly not in it, bool (...); a NaN is not outside."""
        off = (hidden.double() - self.offset).abs()
        least = ((off - self.relative * self.offset.abs() - self.absolute) / (1 + self.relative)).clamp(min=0)
        # Without a gain a channel has its offset and nothing else.
        z = torch.where(self.gain == 0, torch.where(least > 0, math.inf, 0.0), least / self.gain.abs())
        return torch.linalg.vector_norm(z, dim=-1) > self.radius


@dataclass(frozen=True, eq=False)
class OperandRange:
    """Bounds on an operand, float64; those of a rotated one are to be multiplied by the rotation's ``amplitude``.

    Attributes:
        channel: (heads, channels), on the absolute value of each channel. Of a channel that is rotated: on the length
            of its pair.
        exact: (heads,), on the length of a head's vector in real numbers, before rotation.
        error: (heads,), on how far the computed vector is from that.
        triangle: (heads, at most channels, channels), R of the QR decomposition of the map's transpose; None behind a
            norm over the channels themselves.
        centre: (heads, channels), the map's addend; None as before.
        radius: the radius of the map's input.
        tail: the steps between projection and operand.
        ellipsoid: the ellipsoid of the projection's input; None if nothing depends on it.
    """

    channel: Tensor
    exact: Tensor
    error: Tensor
    triangle: Tensor | None
    centre: Tensor | None
    radius: float
    tail: Tail
    ellipsoid: Ellipsoid | None

    @classmethod
    def of(cls, source: OperandSource, dtype: torch.dtype) -> OperandRange:
        """Return the bounds of an operand whose projection reads and returns ``dtype``.

        Raises:
            ValueError: when neither a norm comes before the projection nor one after, or it is wider than MAX_WIDTH.
        """
        if source.tail.norm is not None:
            return _behind_norm(source, source.tail.norm, dtype)
        if isinstance(source.norm, str) or source.norm.width > MAX_WIDTH:
            raise ValueError(f"source: got one without a norm, allowed one with ({reason_without_range(source)})")
        return _behind_projection(source, source.norm, dtype)

    @property
    def rotated(self) -> Tensor:
        """Which channels are rotated, bool (channels,)."""
        turned = torch.zeros(self.channel.shape[-1], dtype=torch.bool, device=self.channel.device)
        if self.tail.rotation is not None:
            turned[self.tail.rotation.start : self.tail.rotation.start + self.tail.rotation.width] = True
        return turned


def reason_without_range(source: OperandSource) -> str | None:
    """Return why an operand has no bound from the weights alone, or None if it has."""
    norm = source.norm if source.tail.norm is None else source.tail.norm
    if isinstance(norm, str):
        return norm
    return None if norm.width <= MAX_WIDTH else f"its norm has {norm.width} channels, allowed at most {MAX_WIDTH}"


def _behind_norm(source: OperandSource, norm: Norm, dtype: torch.dtype) -> OperandRange:
    """Return the bounds of the output of a norm over the channels; only its gain matters."""
    stored = storage(dtype)
    gain = norm.gain().abs()
    heads = gain.view(source.heads, -1) if gain.numel() > _channels(source) else gain.expand(source.heads, -1)
    radius = math.sqrt(norm.width) * abs(source.tail.factor)
    error = _tail_error(source.tail, dtype)
    floor = 8 * (stored.absolute + 2.0**-126) * (1 + float(gain.max()))
    channel = (heads * radius * (1 + error) + floor) * _SECOND_ORDER
    exact = heads.amax(-1) * radius
    off = exact * error + floor * math.sqrt(heads.shape[-1])
    return OperandRange(_paired(channel, source.tail.rotation), exact, off, None, None, radius, source.tail, None)


def _behind_projection(source: OperandSource, norm: Norm, dtype: torch.dtype) -> OperandRange:
    """Return the bounds of a projection of a norm's output."""
    ellipsoid, stored, arithmetic = Ellipsoid.of(norm, dtype), storage(dtype), accumulation(dtype)
    weight = source.projection.weight().double().view(source.heads, _channels(source), -1)
    bias = source.projection.bias()
    offset = torch.zeros_like(weight[..., 0]) if bias is None else bias.double().view(weight.shape[:2])
    stretched, centre = weight * ellipsoid.gain, weight @ ellipsoid.offset + offset
    reach = ellipsoid.radius * stretched.norm(dim=-1)
    magnitude = reach + weight.abs() @ ellipsoid.offset.abs() + offset.abs()
    depth = weight.shape[-1]
    relative = ellipsoid.relative + (1 + ellipsoid.relative) * (
        gamma(depth + 2, arithmetic.roundoff) + 2.1 * stored.roundoff
    )
    floor = (depth + 2) * arithmetic.underflow + 3 * stored.absolute + 2 * ellipsoid.absolute * weight.abs().sum(-1)
    error = relative * magnitude + floor
    factor, further = abs(source.tail.factor), _tail_error(source.tail, dtype)
    floor_after = 8 * (stored.absolute + 2.0**-126)
    channel = factor * (reach + centre.abs() + error) * (1 + further) + floor_after
    triangle = torch.linalg.qr(stretched.mT, mode="r").R * factor
    exact = ellipsoid.radius * torch.linalg.matrix_norm(triangle, 2) + factor * centre.norm(dim=-1)
    off = factor * error.norm(dim=-1)
    off = off + further * (exact + off) + floor_after * math.sqrt(weight.shape[1])
    return OperandRange(
        channel=_paired(channel * _SECOND_ORDER, source.tail.rotation),
        exact=exact,
        error=off,
        triangle=triangle,
        centre=factor * centre,
        radius=ellipsoid.radius,
        tail=source.tail,
        ellipsoid=ellipsoid,
    )


def _channels(source: OperandSource) -> int:
    return len(source.projection.rows) // source.heads


def _tail_error(tail: Tail, dtype: torch.dtype) -> float:
    """Return the relative error of all steps of a tail, rotation included."""
    relative = tail.relative_error({dtype})
    if tail.rotation is not None:
        relative += 3 * (storage(dtype).roundoff + _SINGLE)
    return relative / (1 - relative)


def _paired(channel: Tensor, layout: RotaryLayout | None) -> Tensor:
    """Return ``channel`` with the two channels of every rotated pair replaced by the bound on the pair's length."""
    if layout is None:
        return channel
    first, second = layout.channels()
    length = torch.hypot(channel[..., first], channel[..., second])
    result = channel.clone()
    result[..., first] = result[..., second] = length
    return result


def score_bound(query: OperandRange, key: OperandRange) -> Tensor:
    """Return a bound on the product of a computed query and a computed key of the same head, float64 (heads,), T17.

    With a rotary embedding it is to be multiplied by the amplitude of the query's rotation and of the key's.
    """
    group = len(query.exact) // len(key.exact)
    key_exact, key_error = (part.repeat_interleave(group, 0) for part in (key.exact, key.error))
    product = query.exact * key_exact
    plain = query.tail.rotation is None and key.tail.rotation is None
    if plain and query.triangle is not None and key.triangle is not None:
        product = torch.minimum(product, _joint(query, key, group))
    off = query.error * key_exact + query.exact * key_error + query.error * key_error
    accumulated = gamma(query.channel.shape[-1] + 3, _SINGLE) * (query.exact + query.error) * (key_exact + key_error)
    return (product + off + accumulated) * _SECOND_ORDER


def _joint(query: OperandRange, key: OperandRange, group: int) -> Tensor:
    """Return the bound on ``(A z + c) . (A' z' + c')`` over both balls: sharper than the product of the lengths."""
    if query.triangle is None or key.triangle is None or query.centre is None or key.centre is None:
        raise ValueError("triangle: got None, allowed the maps of two projections")
    triangle = key.triangle.repeat_interleave(group, 0)
    centre = key.centre.repeat_interleave(group, 0)
    # A = R'Q' with orthonormal Q, so lengths of A'v are those of Rv and sigma(A_q' A_k) is sigma(R_q R_k').
    both = torch.linalg.matrix_norm(query.triangle @ triangle.mT, 2) * query.radius * key.radius
    of_query = (query.triangle @ centre.unsqueeze(-1)).squeeze(-1).norm(dim=-1) * query.radius
    of_key = (triangle @ query.centre.unsqueeze(-1)).squeeze(-1).norm(dim=-1) * key.radius
    return both + of_query + of_key + (query.centre * centre).sum(-1).abs()
