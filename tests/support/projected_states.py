"""Attention states of real models, with where their operands come from: what a watcher hands to detectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bounds import AttentionState
from bounds.core.attention_state import ProjectedOperand
from fault_injection import AttentionCall, is_patched, patched, tapped
from fault_injection.attention.call_tensors import CallTensors
from fault_injection.operands.finding import operand_sources
from fault_injection.operands.operand_recorder import OperandRecorder


class StateTap:
    """As the last tap of a pass, calls ``look(state)`` for every attention call while it runs."""

    locations = frozenset({"q", "k", "v", "scores", "logits", "weights", "mass", "out"})
    layers = None

    def __init__(self, recorder: OperandRecorder, look: Callable[[AttentionState], None]) -> None:
        self._recorder = recorder
        self._look = look
        self._kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        self._kept.keep(call, location, tensor.detach())
        if location == "out":
            self._look(state_of(call, self._kept.take(call), self._recorder))


def state_of(call: AttentionCall, kept: Mapping[str, Tensor], recorder: OperandRecorder) -> AttentionState:
    recorded = recorder.recorded(call.core)
    return AttentionState(
        query=kept["q"],
        key=kept["k"],
        value=kept["v"],
        logits=kept["logits"],
        weights=kept["weights"],
        out=kept["out"],
        scores=kept["scores"],
        mass=kept["mass"],
        score_factor=call.product.factor,
        score_addend=call.product.addend,
        projected={name: ProjectedOperand(o.hidden, o.projected, o.rotation) for name, o in recorded.items()},
        scaling=1.0,
        kv_equal=False,
        has_bias_or_cap=None,
        layer=call.core.index,
        name=call.core.name,
    )


def states_of(model: nn.Module, inputs: Mapping[str, Any], *taps: Any) -> list[AttentionState]:
    """Return the states of one pass; ``taps`` may change tensors before they are seen."""
    states: list[AttentionState] = []
    assert not is_patched(model)
    with torch.no_grad(), patched(model, example_inputs=inputs):
        recorder = OperandRecorder(model, operand_sources(model))
        with recorder, tapped(model, *taps, StateTap(recorder, states.append)):
            model(**inputs)
    return states
