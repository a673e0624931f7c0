"""The start-up proof: which shortcuts give exactly the bits of the plain pair, on this model and input.

    proof = prove(context, config)
    proof.rows is None                  # None: exact; else why not
    proof.facts()                       # for provenance.json

Nothing is assumed of kernels or architectures. Random faults of every location run through the plain pair and through
each shortcut; outputs, effects, losses and verdicts must agree to the last bit, or the shortcut is not used. (While
runs are executed, rows without a fault in every pass go on checking it.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bounds import Verdict
from experiments.config import ExperimentConfig
from experiments.effects.outcome import Effect, effect_of
from experiments.engine.context import Context
from experiments.engine.fast.front import EngineMismatchError
from experiments.engine.fast.pack import TILE
from experiments.engine.fast.recording import resumed
from experiments.engine.fast.run import FastRun
from experiments.engine.fast.site_verdicts import unsupported
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.engine.opened_batch import OpenedBatch, recorded_part
from experiments.inputs.blocks import Chain, block_chain
from experiments.inputs.families import FAMILIES
from experiments.passes.baseline import Baseline
from experiments.passes.injected_pass import InjectedPass, Observed
from fault_injection import LOCATIONS, Fault, FaultSpec, InjectionRecord, draw_fault
from fault_injection.numbers.bits import bits_in_field
from fault_injection.numbers.model_outputs import bitwise_equal
from monitoring import PerformanceMonitor

FAULTS_OF_A_LOCATION = 2
ENVIRONMENT = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG")
"""Variables that decide which kernels compute products."""


UNSUITED = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""The errors that an architecture's code raises if a shortcut does not suit it."""


@dataclass(frozen=True)
class Proof:
    """The shortcuts that are exact; each other shortcut has the reason why it is not.

    Attributes:
        chain: the model's blocks; None where runs cannot begin at one of them.
        resume: why runs do not begin at the block of their fault; None: they do.
        rows: why not many runs go through one pass by their changed rows; None: they do.
        head: why a wide head is not evaluated in pieces; None: it is.
        faults: how many random faults were compared.
        repeatable: whether no error was raised; an error may be temporary (such as lack of memory).
    """

    chain: Chain | None
    resume: str | None
    rows: str | None
    head: str | None
    faults: int
    repeatable: bool = True

    def facts(self) -> dict[str, Any]:
        """Return the facts for provenance."""
        said = {name: getattr(self, name) or "exact" for name in ("resume", "rows", "head")}
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        return {**said, "faults_compared": self.faults, "threads": torch.get_num_threads(), "environment": environment}


def prove(context: Context, config: ExperimentConfig, batch_index: int = 0) -> Proof:
    """Compare every shortcut with the plain pair on one batch."""
    chain = block_chain(context.subject.model, context.subject.cores)
    if isinstance(chain, str):
        return Proof(None, chain, chain, chain, 0)
    baseline = context.baseline(batch_index, config)
    try:
        opened = context.opened(batch_index, config, chain, by_groups=False, alone=True)
    except UNSUITED as error:
        opened = f"{type(error).__name__}: {error}"
    if isinstance(opened, str):
        return Proof(None, opened, opened, opened, 0)
    return _Comparison(context, config, opened, context.batches[batch_index], baseline).proof()


def impossible(context: Context, config: ExperimentConfig, opened: OpenedBatch) -> str | None:
    """Return why rows cannot be packed for this model and configuration, whatever the kernels do."""
    subject, detect = context.subject, config.detect
    wrapped = [core.name for core in subject.cores if core.path != "A"]
    if wrapped:
        return f"{wrapped[0]} computes attention in its own forward, not through the attention interface"
    if subject.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return f"{subject.dtype} overflows where rows in front of a fault would have to be watched"
    if FAMILIES[subject.family].two_stacks:
        return "encoder and decoder are two chains"
    if opened.recording.hidden[0].ndim != 3 or opened.recording.hidden[0].shape[1] < TILE:
        return f"an input has fewer than {TILE} tokens"
    if detect.layers == "all":
        return "detect.layers=all: detectors look at whole layers behind the fault"
    if detect.certificate or detect.correct:
        return "detect.certificate and detect.correct need whole layers"
    return unsupported(context.detectors(config))


class _Comparison:
    """Plain pairs of random faults, and what the shortcuts make of the same faults."""

    def __init__(
        self,
        context: Context,
        config: ExperimentConfig,
        opened: OpenedBatch,
        batch: Mapping[str, Tensor],
        baseline: Baseline,
    ) -> None:
        self._context, self._config, self._chain, self._opened = context, config, opened.chain, opened
        self._batch, self._baseline = batch, baseline
        self._monitor = PerformanceMonitor(context.subject.device)
        self._repeatable = True

    def proof(self) -> Proof:
        resume, rows, head = None, impossible(self._context, self._config, self._opened), None
        rows = rows or self._opened.differing_verdict(self._baseline)
        expected: list[_Expected] = []
        faults = list(self._faults())
        for fault in faults:
            # One plain pass serves every comparison; only of the last one is the whole output there.
            plain = self._plain(fault)
            resume = self._resume(fault, plain) if resume is None else resume
            if rows is None:
                expected.append(self._expected(fault, plain))
        if rows is None:
            head = self._compare(expected, OutputBuffer())
            rows = None if head is None else self._compare(expected, None)
        chain = self._chain if resume is None else None
        return Proof(chain, resume, rows, head if rows is None else rows, len(faults), self._repeatable)

    def _resume(self, fault: Fault, plain: InjectedPass) -> str | None:
        try:
            with resumed(self._chain, self._opened.recording, fault.layer):
                again = self._plain(fault)
        except UNSUITED as error:
            # Blocks that read more of those in front of them than their output.
            return self._raised(error)
        if not bitwise_equal(plain.evaluation.output, again.evaluation.output):
            return f"{_name(fault)}: another output, {self._effect(again)} instead of {self._effect(plain)}"
        return _differing_blocks(fault, plain.block_changes, again.block_changes)

    def _raised(self, error: Exception) -> str:
        self._repeatable = False
        return f"{type(error).__name__}: {error}"

    def _faults(self) -> Iterator[Fault]:
        random = np.random.Generator(np.random.Philox(key=0))
        for location in LOCATIONS:
            for _ in range(FAULTS_OF_A_LOCATION):
                layer = int(random.integers(len(self._context.subject.cores)))
                yield draw_fault(FaultSpec(location), self._baseline.sites[layer, location], random)
        # What overflows behind the fault takes a way of its own.
        for location in ("k", "v", "out"):
            site = self._baseline.sites[0, location]
            yield draw_fault(FaultSpec(location, bits=(bits_in_field(site.dtype, "exponent")[-1],)), site, random)

    def _plain(self, fault: Fault) -> InjectedPass:
        detectors, situation = self._context.detectors(self._config), self._baseline.situation
        detect, context = self._config.detect, self._context
        blocks = context.watcher(self._opened.outputs, fault.layer) if context.follows(self._config) else None
        observed = Observed(situation, detectors, detect, blocks=blocks)
        return InjectedPass.of(context.subject, self._batch, [fault], observed, self._monitor)

    def _effect(self, plain: InjectedPass) -> Effect:
        critical, family = self._config.detect.critical_loss, self._context.subject.family
        baseline, rows = self._baseline.evaluation, self._opened.rows
        return effect_of(baseline, plain.evaluation, self._batch, family, critical, rows)

    def _expected(self, fault: Fault, plain: InjectedPass) -> _Expected:
        return _Expected(fault, self._effect(plain), plain.records[0], plain.watcher.verdicts, plain.block_changes)

    def _compare(self, expected: Sequence[_Expected], buffer: OutputBuffer | None) -> str | None:
        engine = self._opened.engine(None, buffer, propagation=self._context.follows(self._config))
        sites = [(plain, site) for plain in expected if (site := engine.site_of(plain.fault)) is not None]
        try:
            runs = engine.run([(site, True) for _, site in sites], self._config.detect.critical_loss)
        except EngineMismatchError as error:
            return str(error)
        except UNSUITED as error:
            # An architecture whose code does not take groups of heads, or rows in tiles (a table by head).
            return self._raised(error)
        differences = (plain.difference(run) for (plain, _), run in zip(sites, runs, strict=True))
        return next((difference for difference in differences if difference is not None), None)


@dataclass(frozen=True)
class _Expected:
    """What the plain pair says of a fault."""

    fault: Fault
    effect: Effect
    record: InjectionRecord
    verdicts: Mapping[tuple[str, int], Verdict]
    block_changes: Mapping[int, float]

    def difference(self, run: FastRun) -> str | None:
        """Return what the fast engine says otherwise, or None; NaN equals NaN."""
        if repr(run.effect) != repr(self.effect):
            return f"{_name(self.fault)}: {run.effect} instead of {self.effect}"
        if repr(run.record) != repr(self.record):
            return f"{_name(self.fault)}: hit {run.record} instead of {self.record}"
        if (reason := _differing_blocks(self.fault, self.block_changes, run.block_changes)) is not None:
            return reason
        said = {(name, self.fault.layer): verdict for name, verdict in run.verdicts.items()}
        said |= {("finite", layer): verdict for layer, verdict in run.behind.items()}
        for (name, layer), verdict in said.items():
            whole = self.verdicts[name, layer]
            if recorded_part(verdict) != recorded_part(whole):
                return f"{_name(self.fault)}: detector {name} in layer {layer} says {verdict} instead of {whole}"
        return None


def _differing_blocks(fault: Fault, expected: Mapping[int, float], changes: Mapping[int, float]) -> str | None:
    if repr(changes) == repr(expected):
        return None
    return f"{_name(fault)}: blocks change by {changes} instead of {expected}"


def _name(fault: Fault) -> str:
    return f"a fault in {fault.location} of layer {fault.layer}"
