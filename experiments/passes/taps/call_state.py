"""Make the state that detectors read from the tensors that a tap kept of one attention call.

    kept = CallTensors()                                          # the tap's own
    keep_tensor(kept, location, tensor, call, situation)          # at every event of the call
    state = call_state(call, kept.take(call), situation, origins) # at its last event, "out"

What detectors may know of the input is found in the same pass by the survey, a tap in front of theirs:

    survey = SituationSurvey(subject.dtype, subject.kv_equal)
    subject.forward(batch, survey, Watcher(detectors, survey.situation))
    survey.found()                                                # the situation, for all later passes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bounds import AttentionState
from bounds.core.attention_state import ProjectedOperand
from experiments.errors import CheckRefusedError
from fault_injection import OBSERVED, AttentionCall, AttentionCore, SiteSurvey
from fault_injection.attention.call_tensors import CallTensors

COMPLETE = frozenset(OBSERVED)
"""The events a tap must keep for a complete state."""

Origins = Callable[[AttentionCore], Mapping[str, ProjectedOperand]]
"""Tells where the operands of a core come from, in the pass that runs."""


@dataclass(frozen=True)
class Situation:
    """The facts that a detector may know besides the pass that it checks: properties of input and model alone.

    Attributes:
        visible: by ``(layer, call)``, which keys each query sees.
        plain_logits: by ``(layer, call)``, whether the logits are the scaled scores and nothing else.
        kv_equal: by ``(layer, call)``, whether the model guarantees equal keys and values there: equal projections, and
            nothing between them and the attention that sets them apart (a rotation of the keys).
        overwritten: the ``(layer, call)`` whose architecture changes the scores in place after their product.
        baseline: by ``(layer, call)`` and detector, what an ``oracle_*`` kept of the fault-free pass.
        complete: False while a survey fills it: any scores may still be overwritten.
    """

    visible: Mapping[tuple[int, int], Tensor]
    plain_logits: Mapping[tuple[int, int], bool]
    kv_equal: Mapping[tuple[int, int], bool]
    overwritten: tuple[tuple[int, int], ...] = ()
    baseline: Mapping[tuple[int, int], Mapping[str, Any]] = field(default_factory=dict)
    complete: bool = True

    @classmethod
    def of(cls, survey: SiteSurvey, projections_equal: Mapping[int, bool]) -> Situation:
        """Return what a survey found; ``projections_equal``: by layer, whether W_K = W_V and b_K = b_V."""
        kv_equal = {key: same and projections_equal[key[0]] for key, same in survey.kv_identical.items()}
        return cls(dict(survey.visible), dict(survey.plain_logits), kv_equal, tuple(sorted(survey.overwritten)))


class SituationSurvey(SiteSurvey):
    """A survey whose findings the taps behind it can read in the same pass.

    Args:
        model_dtype: see ``SiteSurvey``.
        projections_equal: by layer, whether W_K = W_V and b_K = b_V.
        real_queries: see ``SiteSurvey``.

    Attributes:
        situation: filled while the pass runs; at the last event of a call it holds all of that call.
    """

    def __init__(
        self, model_dtype: torch.dtype, projections_equal: Mapping[int, bool], real_queries: Tensor | None = None
    ) -> None:
        super().__init__(model_dtype, real_queries=real_queries)
        self._projections_equal = projections_equal
        self._kv_equal: dict[tuple[int, int], bool] = {}
        self.situation = Situation(self.visible, self.plain_logits, self._kv_equal, complete=False)

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Note what the tensor shows."""
        super().on(location, tensor, call)
        key = call.core.index, call.number
        if location == "v" and key in self.kv_identical:
            self._kv_equal[key] = self.kv_identical[key] and self._projections_equal[key[0]]

    def found(self) -> Situation:
        """Return what the pass has shown."""
        return Situation.of(self, self._projections_equal)


def keep_tensor(kept: CallTensors, location: str, tensor: Tensor, call: AttentionCall, situation: Situation) -> None:
    """Keep a tensor until the call ends; a copy where the architecture would overwrite it."""
    key = call.core.index, call.number
    copied = location == "scores" and (key in situation.overwritten or not situation.complete)
    kept.keep(call, location, tensor.detach().clone() if copied else tensor.detach())


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


@contextmanager
def only_read(kept: Mapping[str, Tensor], name: str) -> Iterator[None]:
    """Raise ``CheckRefusedError`` if a tensor of the call of module ``name`` is written to inside the block."""
    before = {location: _version(tensor) for location, tensor in kept.items()}
    yield
    written = next((location for location, tensor in kept.items() if _version(tensor) != before[location]), None)
    if written is not None:
        raise CheckRefusedError(
            f"control run: a detector writes into {written} of {name}; detectors read a pass and must not change it"
        )


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode do not count who writes to them.
    return 0 if tensor.is_inference() else tensor._version


def _same_tensor(left: Tensor, right: Tensor) -> bool:
    same_layout = left.dtype == right.dtype and left.shape == right.shape and left.stride() == right.stride()
    return same_layout and left.data_ptr() == right.data_ptr()
