"""The start-up proof: which shortcuts give the very bits of the plain pair, on the model and input at hand.

    proof = prove(pairs, config)
    proof.rows is None                  # None: exact; else why not
    proof.facts()                       # for provenance.json

Nothing is assumed of kernels or architectures. Random faults of every location run through the plain pair and through
each shortcut; outputs, effects, losses and verdicts must agree to the last bit, or the shortcut is not used. (While
runs are executed, rows without a fault in every pass go on checking it.)

Public names: ``Proof``, ``prove``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bounds import Verdict
from experiments.baseline import Baseline
from experiments.config import ExperimentConfig
from experiments.engine.chain import Chain, block_chain
from experiments.engine.fast_engine import FastRun
from experiments.engine.front import EngineMismatchError
from experiments.engine.opened_batch import OpenedBatch, recorded_part
from experiments.engine.pack import TILE
from experiments.engine.recording import resumed
from experiments.engine.site_verdicts import unsupported
from experiments.engine.wide_linear import OutputBuffer
from experiments.injected_pass import InjectedPass
from experiments.outcome import effect_of
from fault_injection import LOCATIONS, Fault, FaultSpec, draw_fault
from fault_injection.model_outputs import bitwise_equal
from monitoring import PerformanceMonitor

if TYPE_CHECKING:
    from experiments.paired_run import PairedRunner

FAULTS_OF_A_LOCATION = 2
ENVIRONMENT = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
"""Variables that decide which kernels compute products."""


@dataclass(frozen=True)
class Proof:
    """What is exact; a reason stands where something is not.

    Attributes:
        chain: the model's blocks; None where runs cannot begin at one of them.
        resume: why runs do not begin at the block of their fault; None: they do.
        rows: why not many runs go through one pass by their changed rows; None: they do.
        head: why a wide head is not evaluated in pieces; None: it is.
        faults: how many random faults were compared.
    """

    chain: Chain | None
    resume: str | None
    rows: str | None
    head: str | None
    faults: int

    def facts(self) -> dict[str, Any]:
        """Return what provenance says of it."""
        said = {name: getattr(self, name) or "exact" for name in ("resume", "rows", "head")}
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        return {**said, "faults_compared": self.faults, "threads": torch.get_num_threads(), "environment": environment}


def prove(pairs: PairedRunner, config: ExperimentConfig, batch_index: int = 0) -> Proof:
    """Compare every shortcut with the plain pair on one batch."""
    chain = block_chain(pairs.subject.model, pairs.subject.cores)
    if isinstance(chain, str):
        return Proof(None, chain, chain, chain, 0)
    batch, baseline = pairs.batches[batch_index], pairs.baseline(batch_index, config)
    opened = OpenedBatch.of(pairs.subject, chain, batch, baseline, pairs.detectors(config))
    if isinstance(opened, str):
        return Proof(None, opened, opened, opened, 0)
    return _Comparison(pairs, config, chain, opened, batch, baseline).proof()


def impossible(pairs: PairedRunner, config: ExperimentConfig, opened: OpenedBatch) -> str | None:
    """Return why rows cannot be packed for this model and configuration, whatever the kernels do."""
    subject, detect = pairs.subject, config.detect
    wrapped = [core.name for core in subject.cores if core.path != "A"]
    if wrapped:
        return f"{wrapped[0]} computes attention in its own forward, not through the attention interface"
    if subject.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"{subject.dtype} overflows where rows in front of a fault would have to be watched"
    if subject.family == "encoder-decoder":
        return "encoder and decoder are two chains"
    if opened.recording.hidden[0].ndim != 3 or opened.recording.hidden[0].shape[1] < TILE:
        return f"an input has fewer than {TILE} tokens"
    if detect.layers == "all":
        return "detect.layers=all: detectors look at whole layers behind the fault"
    if detect.certificate or detect.correct:
        return "detect.certificate and detect.correct need whole layers"
    return unsupported(pairs.detectors(config))


class _Comparison:
    """Plain pairs of random faults, and what the shortcuts make of the same faults."""

    def __init__(
        self,
        pairs: PairedRunner,
        config: ExperimentConfig,
        chain: Chain,
        opened: OpenedBatch,
        batch: Mapping[str, Tensor],
        baseline: Baseline,
    ) -> None:
        self._pairs, self._config, self._chain, self._opened = pairs, config, chain, opened
        self._batch, self._baseline = batch, baseline
        self._monitor = PerformanceMonitor(pairs.subject.device)

    def proof(self) -> Proof:
        faults = list(self._faults())
        resume, rows, head = None, impossible(self._pairs, self._config, self._opened), None
        rows = rows or self._opened.differing_verdict(self._baseline)
        plain = [self._plain(fault) for fault in faults]
        for fault, expected in list(zip(faults, plain, strict=True))[::FAULTS_OF_A_LOCATION]:
            with resumed(self._chain, self._opened.recording, fault.layer):
                resume = resume or _differing_pass(fault, expected, self._plain(fault))
        if rows is None:
            head = self._compare(faults, plain, OutputBuffer())
            rows = None if head is None else self._compare(faults, plain, None)
        return Proof(self._chain if resume is None else None, resume, rows, head if rows is None else rows, len(faults))

    def _faults(self) -> Iterator[Fault]:
        random = np.random.Generator(np.random.Philox(key=0))
        for location in LOCATIONS:
            for _ in range(FAULTS_OF_A_LOCATION):
                layer = int(random.integers(len(self._pairs.subject.cores)))
                yield draw_fault(FaultSpec(location), self._baseline.sites[layer, location], random)

    def _plain(self, fault: Fault) -> InjectedPass:
        detectors, situation = self._pairs.detectors(self._config), self._baseline.situation
        detect = self._config.detect
        return InjectedPass.of(self._pairs.subject, self._batch, [fault], situation, detectors, detect, self._monitor)

    def _compare(self, faults: list[Fault], plain: list[InjectedPass], buffer: OutputBuffer | None) -> str | None:
        engine = self._opened.engine(None, buffer)
        critical, family = self._config.detect.critical_loss, self._pairs.subject.family
        sites = [(fault, site) for fault in faults if (site := engine.site_of(fault)) is not None]
        try:
            runs = engine.run([(site, True) for _, site in sites], critical)
        except EngineMismatchError as error:
            return str(error)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            # An architecture whose code does not take groups of heads, or rows in tiles (a table by head).
            return f"{type(error).__name__}: {error}"
        passes = dict(zip(faults, plain, strict=True))
        for (fault, _), run in zip(sites, runs, strict=True):
            if run is None:
                continue
            whole = passes[fault]
            effect = effect_of(
                self._baseline.evaluation, whole.evaluation, self._batch, family, critical, self._opened.rows
            )
            if repr(run.effect) != repr(effect) or repr(run.injected_loss) != repr(whole.evaluation.loss):
                return f"{_name(fault)}: {run.effect} instead of {effect}"
            if run.record != whole.records[0] and repr(run.record) != repr(whole.records[0]):
                return f"{_name(fault)}: hit {run.record} instead of {whole.records[0]}"
            if (reason := _differing_verdict(fault, run, whole.watcher.verdicts)) is not None:
                return reason
        return None


def _name(fault: Fault) -> str:
    return f"a fault in {fault.location} of layer {fault.layer}"


def _differing_pass(fault: Fault, expected: InjectedPass, got: InjectedPass) -> str | None:
    if bitwise_equal(expected.evaluation.output, got.evaluation.output):
        return None
    difference = float((expected.evaluation.output.double() - got.evaluation.output.double()).abs().max())
    return f"{_name(fault)}: the output differs by up to {difference:.3g}"


def _differing_verdict(fault: Fault, run: FastRun, verdicts: Mapping[tuple[str, int], Verdict]) -> str | None:
    for name, verdict in run.verdicts.items():
        expected = verdicts[name, fault.layer]
        if recorded_part(verdict) != recorded_part(expected):
            return f"{_name(fault)}: detector {name} says {verdict} instead of {expected}"
    return None
