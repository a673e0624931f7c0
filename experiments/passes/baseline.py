"""The fault-free pass of one input, and all that runs need of it.

    first = compute_baseline(subject, batch, detectors)          # one pass, and a plain one to compare with
    second = compute_baseline(subject, other, detectors, seconds=first.forward_seconds)          # one pass

It is computed once per input and model and read from the forward cache afterwards. Besides the output it holds the
sites that faults can hit, the visible keys, the verdicts of every detector on the clean pass (the false positives), and
the reduced statistics for ``oracle_*`` detectors. One pass finds all of this: the survey sees each tensor first, then
the detectors, and a recorder may keep the tensors from which runs can begin.

Faulty outputs are compared with the output of this pass, in which taps only observe. Two checks ensure that they only
observe: for the first input of each shape, the pass is repeated without taps and must give the same bits; and for every
input, the detectors must not change the tensors that they read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bounds import Detector, Verdict
from experiments.effects.loss import Evaluation
from experiments.errors import CheckRefusedError
from experiments.inputs.families import FAMILIES
from experiments.inputs.windows import real_positions
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import Origins, Situation, SituationSurvey
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import Site, Tap
from fault_injection.numbers.model_outputs import bitwise_equal


class Judge(Tap, Protocol):
    """A tap that shows a fault-free pass to detectors; ``Watcher`` is one."""

    @property
    def verdicts(self) -> Mapping[tuple[str, int], Verdict]:
        """What the detectors said, by ``(detector, layer)``; oracles do not judge the pass they are made of."""

    @property
    def statistics(self) -> Mapping[tuple[int, int], Mapping[str, Any]]:
        """What the oracles keep, by ``(layer, call)`` and detector."""


class Recorder(Protocol):
    """Keeps more of a fault-free pass than its ``Baseline``."""

    def judge(self, situation: Situation, origins: Origins | None) -> Judge:
        """Return the tap that lets the detectors look."""

    def forward(self, batch: Mapping[str, Tensor], *taps: Tap, origins: Origins | None) -> Evaluation:
        """Run the pass with the taps, as ``Subject.forward`` does."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """One fault-free pass.

    Attributes:
        evaluation: loss and output.
        sites: by ``(layer, location)``.
        situation: the facts about this input that detectors may know; only ``oracle_*`` detectors read ``baseline``.
        verdicts: by ``(detector, layer)``, the detectors' verdicts on this clean pass.
        forward_seconds: one fault-free pass with instrumentation but without taps, after a warm-up, on an input of
            this shape.
    """

    evaluation: Evaluation
    sites: Mapping[tuple[int, str], Site]
    situation: Situation
    verdicts: Mapping[tuple[str, int], Verdict]
    forward_seconds: float


def compute_baseline(
    subject: Subject,
    batch: Mapping[str, Tensor],
    detectors: Sequence[Detector],
    *,
    seconds: float | None = None,
    recorder: Recorder | None = None,
) -> Baseline:
    """Survey the input and run the detectors, all in one pass.

    Args:
        subject: the patched model.
        batch: as ``Subject.to_device`` returns it.
        detectors: prepared and calibrated.
        seconds: the time of a plain pass on an input of this shape; None: make that pass now and compare outputs.
        recorder: keeps more of the pass.

    Raises:
        CheckRefusedError: the output is not finite, or depends on who looks.
    """
    real = None if FAMILIES[subject.family].two_stacks else real_positions(batch)
    survey = SituationSurvey(subject.dtype, subject.kv_equal, real)
    with recorded_origins(subject.model, detectors) as origins:
        if recorder is None:
            judge: Judge = Watcher(detectors, survey.situation, origins=origins)
            evaluation = subject.forward(batch, survey, judge)
        else:
            judge = recorder.judge(survey.situation, origins)
            evaluation = recorder.forward(batch, survey, judge, origins=origins)
    if seconds is None:
        plain, seconds = timed_forward(subject, batch)
        if not bitwise_equal(evaluation.output, plain.output):
            raise CheckRefusedError(
                "control run: the fault-free pass gives another output when detectors look at it; a detector writes "
                "into the tensors it reads, or the pass is not deterministic"
            )
    # NaN and infinities show in the extremes.
    if not bool(torch.stack(torch.aminmax(evaluation.output)).isfinite().all()):
        raise CheckRefusedError(
            f"the fault-free output of {type(subject.model).__name__} in {subject.dtype} is not finite on an input of "
            "this campaign; no fault could be told from it"
        )
    situation = replace(survey.found(), baseline=judge.statistics)
    return Baseline(evaluation, survey.sites(), situation, judge.verdicts, seconds)


def timed_forward(subject: Subject, batch: Mapping[str, Tensor]) -> tuple[Evaluation, float]:
    """Return the evaluation of a fault-free pass without taps, and its seconds."""
    subject.synchronize()
    start = time.perf_counter()
    evaluation = subject.forward(batch)
    subject.synchronize()
    return evaluation, time.perf_counter() - start
