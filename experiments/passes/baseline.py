"""The fault-free pass of one input, and all that runs need of it.

It is computed once per input and model and read from the forward cache afterwards. Beside the output it holds the
sites that faults can hit, the visible keys, what every detector said of the clean pass (the false positives), and the
reduced statistics that ``oracle_*`` detectors compare with.

Public names: ``Baseline``, ``compute_baseline``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bounds import Detector, Verdict
from experiments.effects.loss import Evaluation
from experiments.errors import CheckRefusedError
from experiments.inputs.families import FAMILIES
from experiments.inputs.windows import real_positions
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import Situation
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import Site, SiteSurvey
from fault_injection.numbers.model_outputs import bitwise_equal


@dataclass(frozen=True, eq=False)
class Baseline:
    """One fault-free pass.

    Attributes:
        evaluation: loss and output.
        sites: by ``(layer, location)``.
        situation: what detectors may know of this input; its ``baseline`` part is for ``oracle_*`` detectors alone.
        verdicts: by ``(detector, layer)``, what the detectors said of this clean pass.
        forward_seconds: one fault-free pass with instrumentation but without taps, after a warm-up.
    """

    evaluation: Evaluation
    sites: Mapping[tuple[int, str], Site]
    situation: Situation
    verdicts: Mapping[tuple[str, int], Verdict]
    forward_seconds: float


def compute_baseline(subject: Subject, batch: Mapping[str, Tensor], detectors: Sequence[Detector]) -> Baseline:
    """Survey the input, let the detectors look at the clean pass, then time a plain one.

    The three passes go through the same kernels; the output is that of the last, timed one.
    """
    real = None if FAMILIES[subject.family].two_stacks else real_positions(batch)
    survey = SiteSurvey(subject.dtype, real_queries=real)
    subject.forward(batch, survey)
    situation = Situation.of(survey, subject.kv_equal)
    with recorded_origins(subject.model, detectors) as origins:
        watcher = Watcher(detectors, situation, origins=origins)
        watched = subject.forward(batch, watcher)
    evaluation, seconds = timed_forward(subject, batch)
    if not bitwise_equal(watched.output, evaluation.output):
        raise CheckRefusedError(
            "control run: the fault-free pass gives another output when detectors look at it; a detector writes into "
            "the tensors it reads, or the pass is not deterministic"
        )
    if not bool(torch.isfinite(evaluation.output).all()):
        raise CheckRefusedError(
            f"the fault-free output of {type(subject.model).__name__} in {subject.dtype} is not finite on an input of "
            "this campaign; no fault could be told from it"
        )
    situation = replace(situation, baseline=watcher.statistics)
    return Baseline(evaluation, survey.sites(), situation, watcher.verdicts, seconds)


def timed_forward(subject: Subject, batch: Mapping[str, Tensor]) -> tuple[Evaluation, float]:
    """Return the evaluation of a fault-free pass without taps, and its seconds."""
    subject.synchronize()
    start = time.perf_counter()
    evaluation = subject.forward(batch)
    subject.synchronize()
    return evaluation, time.perf_counter() - start
