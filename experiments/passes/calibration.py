"""Show fault-free calls to the detectors that must be calibrated.

The theorems of ``bounds`` need no calibration. Detectors from the literature that clamp to observed ranges do; they see
passes on inputs that the campaign itself does not use, so that their false positives can be counted honestly.

    calibrate(detectors, subject, lambda: batches)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bounds import Detector
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import COMPLETE, Situation, SituationSurvey, call_state, keep_tensor
from fault_injection import AttentionCall
from fault_injection.attention.call_tensors import CallTensors


def calibrate(
    detectors: Sequence[Detector], subject: Subject, batches: Callable[[], Sequence[Mapping[str, Tensor]]]
) -> None:
    """Let every ``calibrated`` detector learn from fault-free passes of the batches that ``batches()`` gives.

    It is not called if no detector needs calibration. One that gets no batch says that it does not apply.
    """
    learning = [detector for detector in detectors if detector.calibrated]
    if not learning:
        return
    for batch in batches():
        survey = SituationSurvey(subject.dtype, subject.kv_equal)
        subject.forward(batch, survey, _Calibrator(learning, survey.situation))


class _Calibrator:
    """The tap that does it."""

    locations = COMPLETE
    layers = None

    def __init__(self, detectors: Sequence[Detector], situation: Situation) -> None:
        self._detectors = detectors
        self._situation = situation
        self._kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        keep_tensor(self._kept, location, tensor, call, self._situation)
        if location == "out":
            with torch.no_grad():
                state = call_state(call, self._kept.take(call), self._situation)
                for detector in self._detectors:
                    detector.calibrate(state)
