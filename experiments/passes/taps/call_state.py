"""Make the state that detectors read from the tensors that a tap kept of one attention call.

    kept = CallTensors()                                          # the tap's own
    keep_tensor(kept, location, tensor, call, situation)          # at every event of the call
    state = call_state(call, kept.take(call), situation, origins) # at its last event, "out"

Public names: ``Situation``, ``keep_tensor``, ``call_state``, ``COMPLETE``, ``Origins``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bounds import AttentionState
from bounds.core.attention_state import ProjectedOperand
from fault_injection import AttentionCall, AttentionCore, SiteSurvey
from fault_injection.attention.call_tensors import CallTensors

COMPLETE = frozenset({"q", "k", "v", "scores", "logits", "weights", "mass", "out"})
"""The events a tap must keep for a complete state."""

Origins = Callable[[AttentionCore], Mapping[str, ProjectedOperand]]
"""Tells where the operands of a core come from, in the pass that runs."""


@dataclass(frozen=True)
class Situation:
    """What a detector may know of an input besides the pass it looks at: properties of input and model alone.

    Attributes:
        visible: by ``(layer, call)``, which keys each query sees.
        plain_logits: by ``(layer, call)``, whether the logits are the scaled scores and nothing else.
        kv_equal: by ``(layer, call)``, whether the model guarantees equal keys and values there: equal projections, and
            nothing between them and the attention that sets them apart (a rotation of the keys).
        overwritten: the ``(layer, call)`` whose architecture changes the scores in place after their product.
        baseline: by ``(layer, call)`` and detector, what an ``oracle_*`` kept of the fault-free pass.
    """

    visible: Mapping[tuple[int, int], Tensor]
    plain_logits: Mapping[tuple[int, int], bool]
    kv_equal: Mapping[tuple[int, int], bool]
    overwritten: tuple[tuple[int, int], ...] = ()
    baseline: Mapping[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, survey: SiteSurvey, projections_equal: Mapping[int, bool]) -> Situation:
        """Return what a survey found; ``projections_equal``: by layer, whether W_K = W_V and b_K = b_V."""
        kv_equal = {key: same and projections_equal[key[0]] for key, same in survey.kv_identical.items()}
        return cls(dict(survey.visible), dict(survey.plain_logits), kv_equal, tuple(sorted(survey.overwritten)))


def keep_tensor(kept: CallTensors, location: str, tensor: Tensor, call: AttentionCall, situation: Situation) -> None:
    """Keep a tensor until the call ends; a copy where the architecture would overwrite it."""
    overwritten = location == "scores" and (call.core.index, call.number) in situation.overwritten
    kept.keep(call, location, tensor.detach().clone() if overwritten else tensor.detach())


def call_state(
    call: AttentionCall, kept: Mapping[str, Tensor], situation: Situation, origins: Origins | None = None
) -> AttentionState:
    """Return the state of a call of which all tensors were kept."""
    key = call.core.index, call.number
    return AttentionState(
        query=kept["q"],
        key=kept["k"],
        value=kept["v"],
        logits=kept["logits"],
        weights=kept["weights"],
        out=kept["out"],
        scores=kept["scores"],
        score_factor=call.product.factor,
        score_addend=call.product.addend,
        # Where nothing lies between them the two are one tensor, and detectors read it once.
        mass=kept["weights"] if _same_tensor(kept["mass"], kept["weights"]) else kept["mass"],
        projected=None if origins is None else origins(call.core),
        visible=situation.visible[key],
        # Without a stated factor epsilon is in the usual unit, and nothing is said of q·o.
        scaling=kept["q"].shape[-1] ** -0.5 if call.scaling is None else call.scaling,
        kv_equal=situation.kv_equal[key],
        has_bias_or_cap=None if call.scaling is None else not situation.plain_logits[key],
        layer=call.core.index,
        name=call.core.name,
    )


def _same_tensor(left: Tensor, right: Tensor) -> bool:
    same_layout = left.dtype == right.dtype and left.shape == right.shape and left.stride() == right.stride()
    return same_layout and left.data_ptr() == right.data_ptr()
