"""One attention call seen as many: its groups of heads as sequences, and some of its sequences alone.

Attention never mixes heads: what it computes for the query heads of one key/value head is a call of its own. So many
faults can be judged in one batch, each a sequence of the only group of heads that it hits.

    groups = by_group(state)                                 # sequence b * H_kv + g is group g of sequence b
    some = gathered(groups, torch.tensor([3, 3, 5]))         # then replace what the faults changed
    verdicts = detector.check_each(some, gathered(detector.reduce(groups), torch.tensor([3, 3, 5])))
    merged(verdicts[0], *clean_verdicts_of_the_other_groups)

>>> q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8)
>>> a = torch.zeros(2, 4, 3, 3)
>>> state = AttentionState(query=q, key=k, value=k, logits=a, weights=a + 1 / 3, out=q,
...                        scaling=0.5, kv_equal=True, has_bias_or_cap=False)
>>> groups = by_group(state)
>>> groups.rows, groups.key.shape[1], groups.heads.tolist()
((4, 2, 3), 1, [[0, 1], [2, 3], [0, 1], [2, 3]])
>>> gathered(groups, torch.tensor([1])).heads.tolist()
[[2, 3]]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState, ProjectedOperand
from bounds.core.verdict import merged
from fault_injection.locations import OPERAND_TENSORS

__all__ = ["by_group", "gathered", "merged", "origins_by_group", "sequence_of"]

Value = TypeVar("Value")
Pick = Callable[[Tensor], Tensor]

_OWN = ("query", "key", "value", "logits", "weights", "out", "scores", "heads")
_SHARED = ("visible", "score_addend")


def by_group(state: AttentionState) -> AttentionState:
    """Return the call with its B * H_kv groups of heads as sequences, copying only what strides do not allow to view.

    Group g of sequence b becomes sequence ``b * H_kv + g``: the query heads that read key/value head g, and that head.
    ``visible`` and ``score_addend`` keep an axis of 1 where the groups share them, and what the projections read stays
    one entry a sequence of the call (``ProjectedOperand.source``).
    """
    batch, heads, _ = state.rows
    groups = state.key.shape[1]

    def grouped(tensor: Tensor) -> Tensor:
        return _grouped(tensor, groups)

    def shared(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))
        if tensor.shape[1] == 1:
            return tensor if tensor.shape[0] == 1 else tensor.repeat_interleave(groups, 0)
        return grouped(tensor.expand(batch, -1, -1, -1))

    whole = torch.arange(heads, device=state.query.device).expand(batch, -1) if state.heads is None else state.heads
    changed = _changed(dataclasses.replace(state, heads=whole), grouped, shared)
    return dataclasses.replace(state, **changed, projected=origins_by_group(state))


def groups_joined(value: Value, batch: int) -> Value:
    """Return statistics of ``by_group(state)`` as those of ``state``, a call of ``batch`` sequences.

    Args:
        value: a tensor (B * H_kv, H / H_kv, ...), or a dataclass, tuple or dict of such; None, numbers and texts stay.
        batch: B.
    """
    return cast(Value, _picked(value, lambda tensor: tensor.reshape(batch, -1, *tensor.shape[2:]), batch))


def origins_by_group(state: AttentionState) -> Mapping[str, ProjectedOperand] | None:
    """Return ``by_group(state).projected`` alone."""
    if state.projected is None:
        return None
    batch, groups = state.key.shape[:2]

    def grouped(operand: ProjectedOperand, read: Tensor) -> ProjectedOperand:
        projected = operand.projected
        if projected.shape != read.shape:
            # It is that of other rows, and stays so: no operand has no channels.
            return ProjectedOperand(operand.hidden[:1], projected[:1, ..., :0].expand(batch * groups, -1, -1, -1))
        source = _entries(operand) if operand.source is None else operand.source
        own = None if source is None else source.repeat_interleave(groups)
        return dataclasses.replace(operand, projected=_grouped(projected, groups), source=own)

    read = {location: getattr(state, name) for location, name in OPERAND_TENSORS.items()}
    return {name: grouped(own, read[name]) for name, own in state.projected.items()}


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """Return a tensor (B, H, ...) as (B * groups, H / groups, ...)."""
    return tensor.reshape(len(tensor) * groups, tensor.shape[1] // groups, *tensor.shape[2:])


def gathered(value: Value, sequences: Tensor) -> Value:
    """Return some sequences of a state, or of statistics of one; repeated and in any order.

    Args:
        value: a state; or a tensor, or a dataclass, tuple or dict of such values, the first axis of tensors being that
            of the sequences. An axis of 1 stands for all sequences and stays (but not of the tensors of a state that
            every sequence has its own of); None, numbers and texts stay.
        sequences: int64 (F,), on the device of the tensors.
    """
    return cast(Value, _picked(value, lambda tensor: tensor.index_select(0, sequences), len(sequences)))


def sequence_of(value: Value, number: int) -> Value:
    """Return one sequence of a state, or of statistics of one, without a copy. Arguments as for ``gathered``."""
    picked: Any = _picked(value, lambda tensor: tensor[number : number + 1], 1)
    if isinstance(picked, AttentionState) and picked.projected is not None:
        own = {name: _own(operand) for name, operand in picked.projected.items()}
        picked = dataclasses.replace(picked, projected=own)
    return cast(Value, picked)


def _own(operand: ProjectedOperand) -> ProjectedOperand:
    """Return the operand of one sequence with its entries alone."""
    if operand.source is None or len(operand.source) != 1:
        return operand
    entry = int(operand.source)

    def pick(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[0] == 1 else tensor[entry : entry + 1]

    turned = None if operand.rotation is None else (pick(operand.rotation[0]), pick(operand.rotation[1]))
    return ProjectedOperand(pick(operand.hidden), operand.projected, turned)


def _picked(value: Any, pick: Pick, count: int) -> Any:
    def shared(tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 0 or tensor.shape[0] == 1 else pick(tensor)

    if isinstance(value, AttentionState):
        changed = _changed(value, pick, lambda tensor: shared(tensor) if tensor.ndim == 4 else tensor)
        if value.projected is not None:
            changed["projected"] = {name: _picked(operand, pick, count) for name, operand in value.projected.items()}
        return dataclasses.replace(value, **changed)
    if isinstance(value, ProjectedOperand):
        source = _entries(value) if value.source is None else value.source
        own = None if source is None else pick(source)
        projected = value.projected
        projected = projected.expand(count, -1, -1, -1) if len(projected) == 1 else pick(projected)
        return dataclasses.replace(value, projected=projected, source=own)
    if isinstance(value, Tensor):
        return shared(value)
    if isinstance(value, Mapping):
        return {key: _picked(item, pick, count) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_picked(item, pick, count) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _picked(getattr(value, name), pick, count) for name in fields})
    return value


def _entries(operand: ProjectedOperand) -> Tensor | None:
    """Return the numbers of an operand's entries; None if all sequences have the only one."""
    count = max(len(tensor) for tensor in (operand.hidden, *(operand.rotation or ())))
    return None if count == 1 else torch.arange(count, device=operand.hidden.device)


def _changed(state: AttentionState, own: Pick, shared: Pick) -> dict[str, Any]:
    """Return the tensors of a state after ``own`` or ``shared``, by the names of its fields."""
    changed = {name: own(tensor) for name in _OWN if (tensor := getattr(state, name)) is not None}
    changed |= {name: shared(tensor) for name in _SHARED if (tensor := getattr(state, name)) is not None}
    if state.mass is not None:
        # One tensor must stay one tensor: detectors that see it read it once.
        changed["mass"] = changed["weights"] if state.mass is state.weights else own(state.mass)
    return changed
