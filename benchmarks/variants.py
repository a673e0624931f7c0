"""The ways to execute a run that ``benchmarks.throughput`` compares, from two whole passes to shared changed rows.

variants = make_variants(workload, Counts.of(128))
found = variants["everything"].execute(faults)        # in the order of the faults
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.workloads import Workload
from bounds import Verdict
from experiments.effects.outcome import Effect, effect_of
from experiments.engine.fast.engine import FastEngine
from experiments.engine.fast.recording import resumed
from experiments.engine.fast.run import FastRun
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.engine.opened_batch import OpenedBatch
from fault_injection import Fault, Injector, suspended

NAIVE = "naive_pair"
CRITICAL_LOSS = 1e-3


@dataclass(frozen=True)
class Found:
    """What a way found of one fault; None where it does not say.

    Attributes:
        effect: on the output.
        local: how far the attention output of the layer moved.
        verdicts: of the layer, by detector.
    """

    effect: Effect | None
    local: Any = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A way to execute runs: ``count`` of them a round."""

    count: int
    execute: Callable[[Sequence[Fault]], list[Found]]


@dataclass(frozen=True)
class Counts:
    """Runs of a round.

    Attributes:
        naive: of pairs of whole passes.
        single: of one pass a run.
        some: of shared passes without all shortcuts.
        many: of shared passes with all of them.
        site: of site steps alone.
    """

    naive: int
    single: int
    some: int
    many: int
    site: int

    @classmethod
    def of(cls, many: int) -> Counts:
        """Return counts for ``many`` runs, a power of two from 16 on; each divides the last."""
        return cls(naive=4, single=16, some=max(16, many // 4), many=many, site=max(32, min(1024, 8 * many)))


def make_variants(work: Workload, opened: Mapping[str, OpenedBatch], counts: Counts) -> dict[str, Variant]:
    """Return the ways by name.

    Args:
        work: model and input.
        opened: the recorded input, judged by detectors: ``none``, ``lite`` and ``default``.
        counts: how many runs each gets.
    """
    plain, buffer = opened["none"], OutputBuffer()
    engine = plain.engine(None, buffer)
    whole = replace(plain, causal=False).engine(None, buffer)
    judged = opened["default"].engine(None, buffer)
    ways: dict[str, tuple[int, Callable[[Sequence[Fault]], list[Found]]]] = {
        NAIVE: (counts.naive, lambda faults: [_pair(work, fault) for fault in faults]),
        "naive_pair_with_outcome": (counts.naive, lambda faults: [_compared_pair(work, fault) for fault in faults]),
        "cached_baseline": (counts.single, lambda faults: [_single(work, plain, fault, False) for fault in faults]),
        "resume": (counts.single, lambda faults: [_single(work, plain, fault, True) for fault in faults]),
        "batched": (counts.some, lambda faults: _together(work, plain, whole, faults)),
        "rows": (counts.some, lambda faults: _together(work, plain, plain.engine(1, buffer), faults)),
        "everything": (counts.many, lambda faults: _together(work, plain, engine, faults)),
        "everything_default": (counts.many, lambda faults: _together(work, plain, judged, faults)),
    }
    for name, batch in opened.items():
        ways[f"site_{name}"] = counts.site, _site_way(batch.engine(None, None))
    return {name: Variant(*way) for name, way in ways.items()}


def _pair(work: Workload, fault: Fault) -> Found:
    # The fault-free half is the model as it comes, without a patch.
    with suspended(work.subject.model):
        work.subject.forward(work.batch)
    work.subject.forward(work.batch, Injector([fault]))
    return Found(None)


def _compared_pair(work: Workload, fault: Fault) -> Found:
    with suspended(work.subject.model):
        baseline = work.subject.forward(work.batch)
    injected = work.subject.forward(work.batch, Injector([fault]))
    effect = effect_of(baseline, injected, work.batch, work.subject.family, CRITICAL_LOSS)
    return Found(effect)


def _single(work: Workload, opened: OpenedBatch, fault: Fault, from_block: bool) -> Found:
    around = resumed(work.chain, opened.recording, fault.layer) if from_block else nullcontext()
    with around:
        injected = work.subject.forward(work.batch, Injector([fault]))
    baseline = opened.recording.evaluation
    effect = effect_of(baseline, injected, work.batch, work.subject.family, CRITICAL_LOSS, opened.rows)
    return Found(effect)


def _together(work: Workload, opened: OpenedBatch, engine: FastEngine, faults: Sequence[Fault]) -> list[Found]:
    """Run faults through the engine, as a campaign does."""
    return [_found(run) for run in engine.run([(_site(engine, fault), True) for fault in faults], CRITICAL_LOSS)]


def _site_way(engine: FastEngine) -> Callable[[Sequence[Fault]], list[Found]]:
    def execute(faults: Sequence[Fault]) -> list[Found]:
        runs = engine.run([(_site(engine, fault), False) for fault in faults], CRITICAL_LOSS)
        return [_found(run) for run in runs if run is not None]

    return execute


def _found(run: FastRun) -> Found:
    return Found(run.effect, run.local, run.verdicts)


def _site(engine: FastEngine, fault: Fault) -> Any:
    site = engine.site_of(fault)
    if site is None:
        raise ValueError(f"fault: got one in {fault.location} of layer {fault.layer} that hits more than one head")
    return site
