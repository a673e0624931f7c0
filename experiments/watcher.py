"""The tap that lets detectors look at a pass while it runs.

Per attention call it hands the tensors of that call to every detector as the last of them appears, keeps only verdicts
and reduced statistics, and forgets the tensors: nothing is collected.

    watcher = Watcher(detectors, situation, model_kv_equal)
    with tapped(model, watcher):
        model(**batch)
    watcher.verdicts[("s@w", 0)]

Public names: ``Watcher``, ``Situation``, ``is_oracle``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bounds import AttentionState, Detector, Verdict
from fault_injection import AttentionCall

_COMPLETE = frozenset({"q", "k", "v", "logits", "weights", "out"})


def is_oracle(name: str) -> bool:
    """Whether a detector of this name reads the fault-free pass."""
    return name.startswith("oracle_")


@dataclass(frozen=True)
class Situation:
    """What a detector may know of an input besides the pass it looks at: properties of input and model alone.

    Attributes:
        visible: by ``(layer, call)``, which keys each query sees.
        plain_logits: by ``(layer, call)``, whether the logits are the scaled scores and nothing else.
        kv_equal: by layer, whether the model has K = V there.
        baseline: by ``(layer, call)``, the reduced statistics of the fault-free pass; for ``oracle_*`` only.
    """

    visible: Mapping[tuple[int, int], Tensor]
    plain_logits: Mapping[tuple[int, int], bool]
    kv_equal: Mapping[int, bool]
    baseline: Mapping[tuple[int, int], Any] = field(default_factory=dict)


class Watcher:
    """Runs detectors inside a pass.

    Args:
        detectors: those to run; ``oracle_*`` ones are left out where there is no baseline (the fault-free pass itself).
        situation: what they may know.
        layers: the layers to look at (default: all).
        tolerance: added to every proved tolerance.
        reduce: makes the statistics that ``oracle_*`` detectors compare with; ``None`` keeps none.
        synchronize: called before every reading of the clock.

    Attributes:
        verdicts: by ``(detector, layer)``, merged over the calls of one pass.
        statistics: by ``(layer, call)``, what ``reduce`` returned.
        bounds_seconds, detection_seconds: time spent on statistics and on decisions.
    """

    locations = _COMPLETE

    def __init__(
        self,
        detectors: Sequence[Detector],
        situation: Situation,
        *,
        layers: AbstractSet[int] | None = None,
        tolerance: float = 0.0,
        reduce: Callable[[AttentionState], Any] | None = None,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.layers = layers
        self.verdicts: dict[tuple[str, int], Verdict] = {}
        self.modules: dict[int, str] = {}
        self.statistics: dict[tuple[int, int], Any] = {}
        self.bounds_seconds = 0.0
        self.detection_seconds = 0.0
        self._detectors = detectors
        self._situation = situation
        self._tolerance = tolerance
        self._reduce = reduce
        self._synchronize = synchronize

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep the tensor until the call's output is there; then let every detector look."""
        call.tensors[location] = tensor.detach()
        if location != "out":
            return
        key = call.core.index, call.number
        self.modules[call.core.index] = call.core.name
        start = self._now()
        with torch.no_grad():
            state = self._state(call)
            if self._reduce is not None:
                self.statistics[key] = self._reduce(state)
            prepared = self._now()
            self.bounds_seconds += prepared - start
            for detector in self._detectors:
                self._check(detector, state, key)
        self.detection_seconds += self._now() - prepared
        call.tensors.clear()

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _state(self, call: AttentionCall) -> AttentionState:
        key = call.core.index, call.number
        kept = call.tensors
        return AttentionState(
            query=kept["q"],
            key=kept["k"],
            value=kept["v"],
            logits=kept["logits"],
            weights=kept["weights"],
            out=kept["out"],
            visible=self._situation.visible[key],
            scaling=call.scaling,
            kv_equal=self._situation.kv_equal.get(call.core.index, False),
            has_bias_or_cap=not self._situation.plain_logits[key],
            layer=call.core.index,
            module=call.core.name,
        )

    def _check(self, detector: Detector, state: AttentionState, key: tuple[int, int]) -> None:
        baseline = self._situation.baseline.get(key)
        if is_oracle(detector.name) and baseline is None:
            return
        verdict = detector.check(state, baseline=baseline, tolerance=self._tolerance)
        known = self.verdicts.get((detector.name, key[0]))
        self.verdicts[detector.name, key[0]] = verdict if known is None else known.merged(verdict)
