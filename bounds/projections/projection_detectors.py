"""The detectors of the query, key and value projections.

``P_q``, ``P_k``, ``P_v`` check one sum per head, ``P4_q``, ``P4_k``, ``P4_v`` one for every four channels, which is
finer and costs more. They check everything from the input of the projection to the operand of the attention product: a
norm, factor or rotary embedding in between (the tail) is computed again and compared element by element. ``prepare``
makes the tables from the weights, so a weight that changes afterwards counts as a fault.

Nothing that reads only queries, keys and values can see a fault in one of them: a changed operand followed by correct
attention is a correct computation of other operands. So there must be one such check for each of the three.

>>> from bounds import get_detector
>>> get_detector("P_q").statement
'sum over a head of q = x.(W 1) + b.1, and q is its tail of the projection (F15, F16)'
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bounds.core.attention_state import AttentionState, ProjectedOperand
from bounds.core.row_check import RowCheck, RowDetector
from bounds.numerics.rounding import reduced_precision
from bounds.projections.projection_sums import ProjectionTables, WideHidden, row_sums, tail_check, wide_hidden, worst
from bounds.registry import register_detector
from fault_injection.locations import OPERAND_TENSORS
from fault_injection.operands.finding import OPERANDS, operand_sources
from fault_injection.operands.operand_source import OperandSource
from fault_injection.operands.operand_tails import Tail

_ROUNDING_ONCE = (nn.Linear.forward, Conv1D.forward)


def operand_reason(state: AttentionState, operand: str, tail: Tail | None) -> str | None:
    """Return why the origin of an operand is not known in this call, or None.

    Args:
        state: the call.
        operand: "q", "k" or "v".
        tail: what should lie between projection and operand; None if that does not matter.
    """
    people = OPERANDS[operand]
    record = None if state.projected is None else state.projected.get(operand)
    if record is None:
        return f"its {people} were not projected in this call (they come from a cache, or nothing was recorded)"
    read: Tensor = getattr(state, OPERAND_TENSORS[operand])
    if record.projected.shape != read.shape:
        return (
            f"its {people} have {read.shape[2]} rows and their projection {record.projected.shape[2]}: some come from "
            "a cache, or several calls share a projection"
        )
    if tail is not None and tail.rotation is not None and record.rotation is None:
        return f"the rotation of its {people} was not given to the attention"
    if record.hidden.dtype != record.projected.dtype:
        return f"its projection reads {record.hidden.dtype} and returns {record.projected.dtype} (autocast?)"
    return reduced_precision(record.hidden)


@torch.no_grad()
def _is_linear(source: OperandSource, tables: ProjectionTables) -> bool:
    """Return whether the module, with its hooks, computes x.W + b: a subclass may quantise or clip."""
    module = source.projection.module
    weight = cast(Tensor, module.weight)
    inputs = source.projection.weight().shape[1]
    generator = torch.Generator().manual_seed(0)
    for size in (2.0**-6, 1.0, 2.0**6):
        hidden = (torch.randn(1, 5, inputs, generator=generator) * size).to(weight)
        features = module(hidden)[..., source.features]
        projected = features.unflatten(-1, (source.heads, -1)).transpose(1, 2)
        check = row_sums(ProjectedOperand(hidden, projected), tables)
        if bool((~(check.residual <= check.tolerance)).any()):
            return False
    return True


class ProjectionDetector(RowDetector):
    """Shared by the six; a subclass says which operand and how many channels a sum has."""

    operand: ClassVar[str]
    group: ClassVar[int | None] = None

    def __init__(self, tolerance: float = 0.0) -> None:
        super().__init__(tolerance)
        self._prepared: dict[str, tuple[ProjectionTables, Tail] | str] = {}

    def prepare(self, model: nn.Module) -> None:
        """Add up the weights, as they are now, of every attention core.

        ``fault_injection.operands.finding.operand_sources`` says where the operands come from; call it first with
        example inputs where the model needs special ones.
        """
        self._prepared = {
            name: self._tables(source) if isinstance(source := of_core[self.operand], OperandSource) else source
            for name, of_core in operand_sources(model).items()
        }

    def _tables(self, source: OperandSource) -> tuple[ProjectionTables, Tail] | str:
        projection = source.projection
        apart = type(projection.module).forward not in _ROUNDING_ONCE
        weight, bias = projection.weight(), projection.bias()
        tables = ProjectionTables.of(weight, bias, source.heads, self.group, bias_apart=apart)
        if not _is_linear(source, tables):
            return f"{type(projection.module).__name__} does not compute x.W + b from its weight and bias"
        norm = source.tail.norm
        return tables, source.tail if norm is None else replace(source.tail, gain=norm.gain().clone())

    def derive(self, state: AttentionState) -> None:
        """Make the float64 copy of the projections' input."""
        if self.applicable(state) is None and state.projected is not None:
            state.derived(wide_hidden).of(state.projected[self.operand].hidden)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the operand of this call cannot be judged, or None."""
        if not self._prepared:
            return "it was not prepared for this model (prepare)"
        found = self._prepared.get(state.name, "this module was not there when it was prepared")
        if isinstance(found, str):
            return found
        if state.heads is not None:
            return "its tables are those of all heads, and this state has some of them"
        return operand_reason(state, self.operand, found[1])

    @torch.no_grad()
    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return residual and tolerance of every row; the detector must apply to the call."""
        found = self._prepared[state.name]
        if isinstance(found, str) or state.projected is None:
            raise ValueError(f"{self.name}: got a call it does not apply to; ask applicable() first")
        tables, tail = found
        record, read = state.projected[self.operand], getattr(state, OPERAND_TENSORS[self.operand])
        wide: WideHidden = state.derived(wide_hidden)
        if tail.kind == "identity":
            # Comparing the two copies would find any flip, but as a test of memory, not of an operator.
            return row_sums(replace(record, projected=read), tables, wide)
        return worst(row_sums(record, tables, wide), tail_check(tail, record, read, self.group))

    def certifying_rows(self, state: AttentionState) -> RowCheck:
        """Return the check that one changed element of the operand moves by exactly its error (docs/theory.md, T26).

        Without a tail these are the sums of its channels; behind one, the check of each element of the tail.
        """
        found = self._prepared[state.name]
        if isinstance(found, str) or state.projected is None:
            raise ValueError(f"{self.name}: got a call it does not apply to; ask applicable() first")
        if found[1].kind == "identity":
            return self.check_rows(state)
        read = getattr(state, OPERAND_TENSORS[self.operand])
        return tail_check(found[1], state.projected[self.operand], read, group=1)


def _statement(operand: str, channels: str) -> str:
    return f"sum over {channels} of {operand} = x.(W 1) + b.1, and {operand} is its tail of the projection (F15, F16)"


@register_detector
class QueryProjection(ProjectionDetector):
    """Queries, one sum a head."""

    name = "P_q"
    operand = "q"
    needs = frozenset({"query", "projected"})
    statement = _statement("q", "a head")
    cost = "D + d"


@register_detector
class KeyProjection(ProjectionDetector):
    """Keys, one sum a head."""

    name = "P_k"
    operand = "k"
    needs = frozenset({"key", "projected"})
    statement = _statement("k", "a head")
    cost = "D + d"


@register_detector
class ValueProjection(ProjectionDetector):
    """Values, one sum a head."""

    name = "P_v"
    operand = "v"
    needs = frozenset({"value", "projected"})
    statement = _statement("v", "a head")
    cost = "D + d"


@register_detector
class GroupedQueryProjection(QueryProjection):
    """Queries, one sum for four channels."""

    name = "P4_q"
    group = 4
    statement = _statement("q", "4 channels")
    cost = "D d / 4"


@register_detector
class GroupedKeyProjection(KeyProjection):
    """Keys, one sum for four channels."""

    name = "P4_k"
    group = 4
    statement = _statement("k", "4 channels")
    cost = "D d / 4"


@register_detector
class GroupedValueProjection(ValueProjection):
    """Values, one sum for four channels."""

    name = "P4_v"
    group = 4
    statement = _statement("v", "4 channels")
    cost = "D d / 4"
