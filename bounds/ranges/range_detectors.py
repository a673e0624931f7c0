"""Detectors of values that no input can produce: bounds from the weights alone.

``rng_q``, ``rng_k``, ``rng_v`` bound every channel of queries, keys and values, ``s_stat`` the raw scores. Unlike
ranges observed on some data they are theorems about all data, and there is nothing to calibrate.

A row above its bound is checked once more: if what the projection read is no output of the norm at all (a mean that
is thousands of times larger than the deviations from it may be rounded that badly), nothing follows, and it is passed.

>>> from bounds import get_detector
>>> get_detector("rng_q").cost
'd, compare only'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from bounds.core.attention_state import AttentionState, ProjectedOperand
from bounds.core.row_check import RowCheck, RowDetector
from bounds.numerics.rounding import storage
from bounds.products.product_detector import required
from bounds.projections.projection_detectors import operand_reason
from bounds.ranges.range_bounds import OperandRange, reason_without_range, score_bound
from bounds.registry import register_detector
from fault_injection.locations import OPERAND_TENSORS
from fault_injection.operands.finding import operand_sources
from fault_injection.operands.operand_source import OperandSource

_UNPREPARED = "it was not prepared for this model (prepare)"
_UNKNOWN = "this module was not there when it was prepared"


def _ranges(model: nn.Module, operand: str) -> dict[str, OperandRange | str]:
    """Return the bounds of an operand of every attention core, or why there are none."""
    ranges: dict[str, OperandRange | str] = {}
    for name, of_core in operand_sources(model).items():
        source = of_core[operand]
        reason = reason_without_range(source) if isinstance(source, OperandSource) else source
        if isinstance(source, OperandSource) and reason is None:
            ranges[name] = OperandRange.of(source, source.projection.weight().dtype)
        else:
            ranges[name] = f"{operand} has no bound: {reason}"
    return ranges


def _record(state: AttentionState, operand: str) -> ProjectedOperand:
    if state.projected is None:
        raise ValueError("projected: got None; ask applicable() first")
    return state.projected[operand]


def _outside(state: AttentionState, operand: str, found: OperandRange) -> Tensor | None:
    """Return which rows (1 or B, T) of an operand were made from something no norm puts out; None: none."""
    if found.ellipsoid is None:
        return None
    record = _record(state, operand)
    outside = found.ellipsoid.outside(record.hidden)
    return record.by_sequence(outside) if bool(outside.any()) else None


def _amplitude(state: AttentionState, operand: str, found: OperandRange) -> Tensor:
    """Return the factor by which a sequence's rotation may lengthen a vector, (1 or B, 1); 1 without one."""
    record = _record(state, operand)
    if found.tail.rotation is None or record.rotation is None:
        return torch.ones(1, 1, dtype=torch.float64, device=record.hidden.device)
    tables = [
        found.tail.rotation.amplitude(own) for own in zip(*(part.split(1) for part in record.rotation), strict=True)
    ]
    # Below 1/2 rounding errors would not shrink as much. A clamp keeps a NaN.
    amplitude = torch.tensor(tables, dtype=torch.float64, device=record.hidden.device).clamp(min=0.5)
    return record.by_sequence(amplitude)[:, None]


def _once_more(check: RowCheck, without_outside: Callable[[], Tensor | None]) -> RowCheck:
    """Return the check with the rows above their bound judged again, by the residuals that a function returns."""
    passed = check.residual <= check.tolerance
    if bool(passed.all()) or (residual := without_outside()) is None:
        return check
    return replace(check, residual=torch.where(passed, check.residual, residual))


class RangeDetector(RowDetector):
    """Shared by the three; a subclass says which operand."""

    per_group = True
    operand: ClassVar[str]
    cost = "d, compare only"

    def __init__(self, tolerance: float = 0.0) -> None:
        super().__init__(tolerance)
        self._prepared: dict[str, OperandRange | str] = {}

    def prepare(self, model: nn.Module) -> None:
        """Compute the bounds from the weights as they are now."""
        self._prepared = _ranges(model, self.operand)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why nothing can be said of the operand of this call, or None."""
        found = self._prepared.get(state.name, _UNKNOWN) if self._prepared else _UNPREPARED
        return found if isinstance(found, str) else operand_reason(state, self.operand, found.tail)

    @torch.no_grad()
    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return for every (batch, head, channel) the largest absolute value over positions, and its bound (T16)."""
        found = self._prepared[state.name]
        if isinstance(found, str):
            raise ValueError(f"{self.name}: got a call it does not apply to; ask applicable() first")
        read: Tensor = getattr(state, OPERAND_TENSORS[self.operand])
        amplitude, channel = _amplitude(state, self.operand, found)[..., None], state.of_heads(found.channel, read)
        bound = torch.where(found.rotated, channel * amplitude, channel)

        def without_outside() -> Tensor | None:
            outside = _outside(state, self.operand, found)
            return None if outside is None else _largest(read.masked_fill(outside[:, None, :, None], 0))

        return _once_more(RowCheck(_largest(read), bound), without_outside)


@register_detector
class QueryRange(RangeDetector):
    """Queries."""

    name = "rng_q"
    operand = "q"
    needs = frozenset({"query", "projected"})
    statement = "|q_c| <= sqrt(D) |W_c g| + |W_c beta + b_c| (T16)"


@register_detector
class KeyRange(RangeDetector):
    """Keys."""

    name = "rng_k"
    operand = "k"
    needs = frozenset({"key", "projected"})
    statement = "|k_c| <= sqrt(D) |W_c g| + |W_c beta + b_c| (T16)"


@register_detector
class ValueRange(RangeDetector):
    """Values."""

    name = "rng_v"
    operand = "v"
    needs = frozenset({"value", "projected"})
    statement = "|v_c| <= sqrt(D) |W_c g| + |W_c beta + b_c| (T16)"


@register_detector
class ScoreRange(RowDetector):
    """Raw scores, masked ones included: each is a product of a query and a key that some input has."""

    name = "s_stat"
    needs = frozenset({"query", "key", "scores", "projected"})
    statement = "|q.k| <= D sigma(A_q' A_k) + sqrt(D) (|A_q' c_k| + |A_k' c_q|) + |c_q.c_k| (T17)"
    cost = "n, compare only"
    per_group = True

    def __init__(self, tolerance: float = 0.0) -> None:
        super().__init__(tolerance)
        self._prepared: dict[str, tuple[OperandRange, OperandRange, Tensor] | str] = {}

    def prepare(self, model: nn.Module) -> None:
        """Compute the bounds from the weights as they are now."""
        queries, keys = _ranges(model, "q"), _ranges(model, "k")
        self._prepared = {name: _pair(queries[name], keys[name]) for name in queries}

    def applicable(self, state: AttentionState) -> str | None:
        """Return why nothing can be said of the scores of this call, or None."""
        found = self._prepared.get(state.name, _UNKNOWN) if self._prepared else _UNPREPARED
        if isinstance(found, str):
            return found
        if state.score_addend is not None:
            return "its score product adds a position bias"
        return (
            super().applicable(state)
            or operand_reason(state, "q", found[0].tail)
            or operand_reason(state, "k", found[1].tail)
        )

    @torch.no_grad()
    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return for every row (batch, head, query) the largest absolute score, and its bound (T17)."""
        found = self._prepared[state.name]
        if isinstance(found, str) or state.scores is None:
            raise ValueError(f"{self.name}: got a call it does not apply to; ask applicable() first")
        query, key, bound = found
        # A partial rotation leaves channels as they are.
        amplitude = _amplitude(state, "q", query).clamp(min=1) * _amplitude(state, "k", key).clamp(min=1)
        tolerance = _stored_score(state.of_heads(bound, state.query) * amplitude, state).unsqueeze(-1)

        def without_outside() -> Tensor | None:
            scores = given = required(state, "scores")
            for operand, side, axis in (("q", query, -1), ("k", key, -2)):
                if (outside := _outside(state, operand, side)) is not None:
                    scores = scores.masked_fill(outside[:, None].unsqueeze(axis), 0)
            return None if scores is given else scores.abs().amax(-1).double()

        return _once_more(RowCheck(state.scores.abs().amax(-1).double(), tolerance), without_outside)


def _largest(read: Tensor) -> Tensor:
    # Two extremes that read the tensor are faster than one of a copy without signs; NaN wins in both.
    return torch.maximum(read.amax(2), -read.amin(2)).double()


def _pair(query: OperandRange | str, key: OperandRange | str) -> tuple[OperandRange, OperandRange, Tensor] | str:
    if isinstance(query, str) or isinstance(key, str):
        return query if isinstance(query, str) else str(key)
    if len(query.exact) % len(key.exact):
        return f"{len(query.exact)} query heads do not divide among {len(key.exact)} key heads"
    return query, key, score_bound(query, key)


def _stored_score(bound: Tensor, state: AttentionState) -> Tensor:
    """Return the bound on a computed and stored score, given the one on the product of the operands."""
    channels, factor = state.query.shape[-1], abs(state.score_factor)
    formats = (state.query.dtype, state.scores.dtype if state.scores is not None else state.query.dtype)
    roundoff = max(storage(dtype).roundoff for dtype in formats)
    absolute = max(storage(dtype).absolute for dtype in formats)
    floor = (1 + factor) * (absolute + (channels + 2) * 2.0**-126)
    return bound * (factor * (1 + 2 * roundoff) / (1 - 2 * roundoff)) + floor
