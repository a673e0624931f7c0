"""The tap that runs detectors inside a pass.

When the last tensor of an attention call appears, the tap passes all tensors of the call to the detectors. It keeps
only verdicts and reduced statistics, and drops the tensors. If it knows which layers faults hit, then in later layers
it runs only the detectors that can fire there.

    watcher = Watcher(detectors, situation)
    with tapped(model, watcher):
        model(**batch)
    watcher.verdicts[("s@w", 0)]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from bounds import AttentionState, Detector, Verdict
from bounds.core.sequences import merged
from bounds.effects.certifier import Certifier
from experiments.passes.taps.call_state import COMPLETE, Origins, Situation, call_state, keep_tensor, only_read
from fault_injection import AttentionCall
from fault_injection.attention.call_tensors import CallTensors


class Watcher:
    """Runs detectors inside a pass.

    Args:
        detectors: those to run; ``oracle_*`` ones only reduce where there is no baseline (the fault-free pass itself).
        situation: the facts that they may know.
        layers: the layers to check (default: all).
        injected: the layers that faults hit. Other layers are checked only by detectors with ``propagates``, and by no
            oracles; without such detectors, the tap skips these layers (default: all detectors check all layers).
        synchronize: called before every reading of the clock.
        certifier: bounds the effect of an undetected fault in the first of the layers (default: none).
        origins: tells where the operands of a core come from in the pass that runs (default: not known).

    Attributes:
        verdicts: by ``(detector, layer)``, merged over the calls of one pass.
        statistics: by ``(layer, call)`` and oracle, what it keeps of this pass, if it is the fault-free one.
        certificate: largest share of its length by which a single fault in the first layer can have moved a row of the
            output; None without a certifier, or where a location has no check.
        bounds_seconds, detection_seconds: time spent on statistics and on decisions.
    """

    locations = COMPLETE

    def __init__(
        self,
        detectors: Sequence[Detector],
        situation: Situation,
        *,
        layers: AbstractSet[int] | None = None,
        injected: AbstractSet[int] | None = None,
        synchronize: Callable[[], None] = lambda: None,
        certifier: Certifier | None = None,
        origins: Origins | None = None,
    ) -> None:
        self.certificate: float | None = None
        self._certifier = certifier
        self.origins = origins
        behind = [detector for detector in detectors if detector.propagates and not detector.oracle]
        self.layers = layers if injected is None or behind else injected & (injected if layers is None else layers)
        self.verdicts: dict[tuple[str, int], Verdict] = {}
        self.modules: dict[int, str] = {}
        self.statistics: dict[tuple[int, int], dict[str, Any]] = {}
        self.bounds_seconds = 0.0
        self.detection_seconds = 0.0
        self._detectors, self._behind = detectors, behind
        self._injected = injected
        self._origins_behind = any("projected" in detector.needs for detector in behind)
        self._situation = situation
        self._synchronize = synchronize
        self._kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep the tensor until the call's output appears; then run every detector."""
        keep_tensor(self._kept, location, tensor, call, self._situation)
        if location != "out":
            return
        key = call.core.index, call.number
        self.modules[call.core.index] = call.core.name
        start = self._now()
        hit = self._injected is None or key[0] in self._injected
        looking = self._detectors if hit else self._behind
        kept, origins = self._kept.take(call), self.origins if hit or self._origins_behind else None
        with torch.no_grad(), only_read(kept, call.core.name):
            state = call_state(call, kept, self._situation, origins)
            for detector in looking:
                detector.derive(state)
            if not self._situation.baseline:
                oracles = [detector for detector in looking if detector.oracle]
                self.statistics[key] = {detector.name: detector.reduce(state) for detector in oracles}
            prepared = self._now()
            self.bounds_seconds += prepared - start
            for detector in looking:
                self._check(detector, state, key)
            if self._certifier is not None and self.layers is not None and key == (min(self.layers), 0):
                self.certificate = self._certifier.certify(state).largest_relative
        self.detection_seconds += self._now() - prepared

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _check(self, detector: Detector, state: AttentionState, key: tuple[int, int]) -> None:
        baseline = self._situation.baseline.get(key, {}).get(detector.name) if detector.oracle else None
        if detector.oracle and baseline is None:
            return
        verdict = detector.check(state, baseline)
        known = self.verdicts.get((detector.name, key[0]))
        self.verdicts[detector.name, key[0]] = verdict if known is None else merged(known, verdict)
