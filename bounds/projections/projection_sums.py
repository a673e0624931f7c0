"""Checksums of the query, key and value projections, and checks of the steps between them and the attention product.

    tables = ProjectionTables.of(weight, bias, heads=12)              # once per model, from the weights
    check = row_sums(operand, tables)                                 # RowCheck, one row per head and position
    check = worst(check, tail_check(tail, operand, query))

In real numbers the channels of a head sum to ``x . (W 1) + b . 1`` (docs/theory.md, F15), and the operand is its
tail's image of the projection (F16).

>>> weight, x = torch.randn(6, 8), torch.randn(1, 5, 8)               # 2 heads of 3 channels
>>> operand = ProjectedOperand(x, (x @ weight.T).view(1, 5, 2, 3).transpose(1, 2))
>>> check = row_sums(operand, ProjectionTables.of(weight, None, heads=2))
>>> check.residual.shape, bool((check.residual <= check.tolerance).all())
(torch.Size([1, 2, 5]), True)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState, ProjectedOperand
from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import row_blocks
from bounds.numerics.fixed_order import product
from bounds.numerics.rounding import accumulation, gamma, storage
from fault_injection.operands.operand_tails import Tail

_CHECKER = 2.0**-53
_SECOND_ORDER = 1 + 2.0**-10


@dataclass(frozen=True, eq=False)
class ProjectionTables:
    """The sums of a projection's weights that its checksums need; float64.

    Attributes:
        sums: (D, heads * groups), the rows of W added up over the channels of each group: W 1.
        bias_sums: (heads, groups), b . 1; None without a bias.
        length: (heads, groups), Euclidean norm of |W| 1.
        bias_length: (heads, groups), |b| . 1; None without a bias.
        channels: of a head.
        group: channels of a group; the last one of a head may have fewer.
        bias_apart: whether the bias is added in an operation of its own, after the product was stored.
    """

    sums: Tensor
    bias_sums: Tensor | None
    length: Tensor
    bias_length: Tensor | None
    channels: int
    group: int
    bias_apart: bool

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, heads: int, group: int | None = None, *, bias_apart: bool = False
    ) -> ProjectionTables:
        """Return the tables of a projection.

        Args:
            weight: (heads * channels, D), ordered by head and channel.
            bias: (heads * channels,) or None.
            heads: number of heads.
            group: channels of a group; None for one group a head.
            bias_apart: see above.

        Raises:
            ValueError: when the features do not divide among the heads.
        """
        if heads < 1 or weight.shape[0] % heads:
            raise ValueError(f"heads: got {heads}, allowed a divisor of the {weight.shape[0]} features")
        channels = weight.shape[0] // heads
        group = channels if group is None else group
        grouped = _grouped(weight.view(heads, channels, -1).movedim(1, -1), group)  # (heads, D, groups)
        magnitude = _grouped(weight.view(heads, channels, -1).abs().movedim(1, -1), group)
        offsets = None if bias is None else bias.view(heads, channels)
        return cls(
            sums=grouped.movedim(1, 0).reshape(weight.shape[1], -1),
            bias_sums=None if offsets is None else _grouped(offsets, group),
            length=magnitude.norm(dim=1),
            bias_length=None if offsets is None else _grouped(offsets.abs(), group),
            channels=channels,
            group=group,
            bias_apart=bias_apart and bias is not None,
        )

    @property
    def per_head(self) -> bool:
        """Whether a group is a whole head; checks then have one row per head and position."""
        return self.group >= self.channels


def _grouped(tensor: Tensor, group: int) -> Tensor:
    """Return float64 sums over groups of the last axis: (..., channels) -> (..., groups)."""
    channels = tensor.shape[-1]
    if group >= channels:
        return tensor.sum(-1, dtype=torch.float64).unsqueeze(-1)
    if channels % group:
        tensor = torch.nn.functional.pad(tensor, (0, group - channels % group))
    wide = tensor.unflatten(-1, (-1, group)).double()
    # Adding slices is twice as fast as summing over so short an axis.
    total = wide[..., 0]
    for channel in range(1, group):
        total = total + wide[..., channel]
    return total


@dataclass(frozen=True, eq=False)
class WideHidden:
    """Float64 copies of what projections read, made once although queries, keys and values often share it."""

    known: dict[object, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def of(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``hidden`` (B, T, D) and the Euclidean norms of its vectors (B, T), both float64."""
        key = hidden.data_ptr(), hidden.shape, hidden.stride(), hidden.dtype
        if key not in self.known:
            wide = hidden.double()
            # The original is kept too, so that nothing else can get its address meanwhile.
            self.known[key] = wide, torch.linalg.vector_norm(wide, dim=-1), hidden
        return self.known[key][:2]


def wide_hidden(state: AttentionState) -> WideHidden:
    """Return the copies that the detectors of one call share, for ``state.derived``."""
    return WideHidden()


@torch.no_grad()
def row_sums(operand: ProjectedOperand, tables: ProjectionTables, wide: WideHidden | None = None) -> RowCheck:
    """Compare the sums of channels with the checksum of what the projection read (docs/theory.md, F15).

    Args:
        operand: ``projected`` (B, H, T, d), in any format that holds the projection's output exactly.
        tables: of its projection.
        wide: shared float64 copies.

    Returns:
        Rows (B, H, T), or (B, H, T, groups) if the tables are by groups.
    """
    hidden, length = (WideHidden() if wide is None else wide).of(operand.hidden)
    # Sequence by sequence: the bits of a product of all at once would depend on their number.
    expected = operand.by_sequence(torch.stack([product(own, tables.sums) for own in hidden.unbind(0)]))
    expected = expected.unflatten(-1, tables.length.shape).transpose(1, 2)
    found = _grouped(operand.projected, tables.group)
    tolerance = _tolerance(operand, tables, operand.by_sequence(length))
    if tables.bias_sums is not None:
        expected = expected + tables.bias_sums.unsqueeze(1)
    residual = (found - expected).abs_()
    return RowCheck(residual.squeeze(-1), tolerance.squeeze(-1)) if tables.per_head else RowCheck(residual, tolerance)


def _tolerance(operand: ProjectedOperand, tables: ProjectionTables, length: Tensor) -> Tensor:
    """Return F15, (B, H, T, groups)."""
    dtype, depth = operand.hidden.dtype, operand.hidden.shape[-1]
    arithmetic, stored = accumulation(dtype), storage(dtype)
    growth = gamma(depth + 2, arithmetic.roundoff) + (depth + 2 * tables.channels + 8) * _CHECKER
    growth *= _SECOND_ORDER
    # PyTorch adds the bias in one operation with the product only if what it reads is contiguous.
    apart = tables.bias_length is not None and (tables.bias_apart or not operand.hidden.is_contiguous())
    tolerance = growth * length[:, None, :, None] * tables.length[:, None, :]
    # What a product reads as zero: at most omega (|x_i| + |W_ci|) a term; the 1-norms by way of the lengths.
    flushed = arithmetic.underflow * depth**0.5
    tolerance = tolerance + flushed * (tables.group * length[:, None, :, None] + tables.length[:, None, :])
    floor = tables.group * ((depth + 2) * arithmetic.underflow + 3 * stored.absolute)
    if tables.bias_length is not None:
        extra = stored.roundoff * (1 + stored.roundoff) if apart else 0.0
        tolerance = tolerance + (growth + extra) * tables.bias_length.unsqueeze(1)
    if stored.roundoff:
        roundings = 2 + stored.roundoff if apart else 1.0
        magnitude = _grouped(operand.projected.abs(), tables.group)
        tolerance = tolerance + magnitude * (roundings * stored.roundoff * _SECOND_ORDER)
    return tolerance + floor


@torch.no_grad()
def tail_check(tail: Tail, operand: ProjectedOperand, read: Tensor, group: int | None = None) -> RowCheck:
    """Compute the tail of a projection again and compare it, element by element, with what was read (F16).

    Args:
        tail: what lies between the two.
        operand: the projection's output, with its rotation.
        read: (B, H, T, d), the operand that the attention product reads.
        group: channels of a group; None for one group a head.

    Returns:
        Rows (B, H, T), or (B, H, T, groups): of each, the element that is furthest outside of its tolerance.
    """
    batch, heads, rows, channels = read.shape
    parts = -(-channels // group) if group is not None and group < channels else 1
    shape = (batch, heads, rows, parts)
    residual, tolerance = (torch.empty(shape, dtype=torch.float64, device=read.device) for _ in range(2))
    rotation = operand.rotation
    tables = None if rotation is None else (operand.by_sequence(rotation[0]), operand.by_sequence(rotation[1]))
    for sequences, positions in _blocks(read, tables is None or tables[0].shape[0] == 1):
        expected = tail.expected(
            operand.projected[sequences, :, positions],
            None
            if tables is None
            else (_entries(tables[0], sequences)[:, positions], _entries(tables[1], sequences)[:, positions]),
            read.dtype,
        )
        block = sequences, slice(None), positions
        off = (read[block].double() - expected.value).abs_()
        allowed = expected.tolerance.expand(off.shape)
        residual[block], tolerance[block] = _worst_elements(off, allowed, parts, group or channels)
    return RowCheck(residual, tolerance) if parts > 1 else RowCheck(residual.squeeze(-1), tolerance.squeeze(-1))


def _blocks(read: Tensor, one_rotation: bool) -> Iterator[tuple[slice, slice]]:
    """Yield sequences and positions; sequences of different rotations apart, whose size enters the tolerance."""
    batch, heads, rows, channels = read.shape
    for first in [0] if one_rotation else range(batch):
        for sequences, positions in row_blocks((batch if one_rotation else 1, rows), heads * channels):
            yield slice(first + sequences.start, first + sequences.stop), positions


def _entries(tensor: Tensor, sequences: slice) -> Tensor:
    # What is the same for the whole batch is there once.
    return tensor if tensor.shape[0] == 1 else tensor[sequences]


def _worst_elements(off: Tensor, tolerance: Tensor, parts: int, group: int) -> tuple[Tensor, Tensor]:
    """Return residual and tolerance (..., parts) of the element furthest outside, for each group of channels."""
    missing = parts * group - off.shape[-1] if parts > 1 else 0
    if missing:
        off, tolerance = (torch.nn.functional.pad(tensor, (0, missing)) for tensor in (off, tolerance))
    off, tolerance = (tensor.unflatten(-1, (parts, -1)) for tensor in (off, tolerance))
    # NaN is the largest number to argmax, so that it is found and fires.
    worst = (off - tolerance).argmax(-1, keepdim=True)
    return off.gather(-1, worst).squeeze(-1), tolerance.gather(-1, worst).squeeze(-1)


def worst(first: RowCheck, second: RowCheck) -> RowCheck:
    """Return a check that fires where one of two checks on the same rows fires, for any allowance added to both."""
    excess = [
        torch.where(torch.isfinite(check.tolerance), check.residual - check.tolerance, torch.nan)
        for check in (first, second)
    ]
    # NaN fires. It is kept where it is the first, because no comparison with it is True.
    take_second = (excess[1] > excess[0]) | torch.isnan(excess[1])
    return RowCheck(
        torch.where(take_second, second.residual, first.residual),
        torch.where(take_second, second.tolerance, first.tolerance),
    )
