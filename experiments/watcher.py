"""The tap that lets detectors look at a pass while it runs.

Per attention call it hands the tensors of that call to every detector as the last of them appears, keeps only verdicts
and reduced statistics, and forgets the tensors: nothing is collected.

    watcher = Watcher(detectors, situation)
    with tapped(model, watcher):
        model(**batch)
    watcher.verdicts[("s@w", 0)]

Public names: ``Watcher``, ``is_oracle``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bounds import AttentionState, Detector, Verdict
from bounds.certifier import Certifier
from bounds.detector import extreme
from experiments.call_state import COMPLETE, Origins, Situation, call_state, keep_tensor
from fault_injection import AttentionCall


def is_oracle(name: str) -> bool:
    """Whether a detector of this name reads the fault-free pass."""
    return name.startswith("oracle_")


class Watcher:
    """Runs detectors inside a pass.

    Args:
        detectors: those to run; ``oracle_*`` ones only reduce where there is no baseline (the fault-free pass itself).
        situation: what they may know.
        layers: the layers to look at (default: all).
        synchronize: called before every reading of the clock.
        certifier: bounds what an undetected fault can have done, in the first of the layers (default: nothing does).
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
        synchronize: Callable[[], None] = lambda: None,
        certifier: Certifier | None = None,
        origins: Origins | None = None,
    ) -> None:
        self.certificate: float | None = None
        self._certifier = certifier
        self.origins = origins
        self.layers = layers
        self.verdicts: dict[tuple[str, int], Verdict] = {}
        self.modules: dict[int, str] = {}
        self.statistics: dict[tuple[int, int], dict[str, Any]] = {}
        self.bounds_seconds = 0.0
        self.detection_seconds = 0.0
        self._detectors = detectors
        self._situation = situation
        self._synchronize = synchronize

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep the tensor until the call's output is there; then let every detector look."""
        keep_tensor(location, tensor, call, self._situation)
        if location != "out":
            return
        key = call.core.index, call.number
        self.modules[call.core.index] = call.core.name
        start = self._now()
        with torch.no_grad():
            state = call_state(call, self._situation, self.origins)
            for detector in self._detectors:
                detector.derive(state)
            if not self._situation.baseline:
                oracles = [detector for detector in self._detectors if detector.oracle]
                self.statistics[key] = {detector.name: detector.reduce(state) for detector in oracles}
            prepared = self._now()
            self.bounds_seconds += prepared - start
            for detector in self._detectors:
                self._check(detector, state, key)
            if self._certifier is not None and self.layers is not None and key == (min(self.layers), 0):
                self.certificate = self._certifier.certify(state).largest_relative
        self.detection_seconds += self._now() - prepared
        call.tensors.clear()

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()

    def _check(self, detector: Detector, state: AttentionState, key: tuple[int, int]) -> None:
        baseline = self._situation.baseline.get(key, {}).get(detector.name) if detector.oracle else None
        if detector.oracle and baseline is None:
            return
        verdict = detector.check(state, baseline)
        known = self.verdicts.get((detector.name, key[0]))
        self.verdicts[detector.name, key[0]] = verdict if known is None else _merged(known, verdict)


def _merged(first: Verdict, second: Verdict) -> Verdict:
    """Join what one detector said of two evaluations of one core in one pass."""
    if not second.applicable:
        return first
    if not first.applicable:
        return second
    return replace(
        first,
        rows_checked=first.rows_checked + second.rows_checked,
        violations=first.violations + second.violations,
        nonfinite=first.nonfinite + second.nonfinite,
        positions=first.positions or second.positions,
        largest_ratio=extreme(torch.max, first.largest_ratio, second.largest_ratio),
        smallest_margin=extreme(torch.min, first.smallest_margin, second.smallest_margin),
    )
