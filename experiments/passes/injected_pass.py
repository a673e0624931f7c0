"""One whole injected pass and its observations: the plain way to execute a run.

observed = Observed(baseline.situation, detectors, config.detect)
injected = InjectedPass.of(subject, batch, faults, observed, monitor)
injected.evaluation.loss, injected.watcher.verdicts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from bounds import Detector
from bounds.effects.certifier import Certifier
from experiments.config.sections import DetectConfig
from experiments.effects.loss import Evaluation
from experiments.passes.block_changes import BlockWatcher
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import Situation
from experiments.passes.taps.corrector import Corrector
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.output_keeper import OutputKeeper
from experiments.passes.taps.watcher import Watcher
from fault_injection import Fault, InjectionRecord, Injector, Tap, tapped
from monitoring import PerformanceMonitor

Traced = Callable[[Callable[[], Evaluation], Watcher], Evaluation]
"""Runs a pass and notes it, e.g. in a trace."""


@dataclass(frozen=True)
class Observed:
    """What looks at an injected pass, and where.

    Attributes:
        situation: what detectors may know of the input.
        detectors: prepared and calibrated.
        detect: at which layers they look, and whether a corrector repairs.
        certifier: bounds what an undetected fault can have done; None: nothing does.
        keep_output: keep the output of the first injected layer.
        site_only: look at the injected layers alone.
        blocks: sees what the blocks return; None: nobody asks.
        traced: runs the pass and notes it.
    """

    situation: Situation
    detectors: Sequence[Detector]
    detect: DetectConfig
    certifier: Certifier | None = None
    keep_output: bool = False
    site_only: bool = False
    blocks: BlockWatcher | None = None
    traced: Traced = lambda compute, watcher: compute()

    def watcher(self, hit: frozenset[int], subject: Subject) -> Watcher:
        """Return the tap of the detectors for faults in the layers ``hit``."""
        return Watcher(
            self.detectors,
            self.situation,
            layers=self.layers(hit, subject),
            injected=hit if self.detect.layers == "injected" else None,
            synchronize=subject.synchronize,
            certifier=self.certifier,
        )

    def corrector(self, hit: frozenset[int], subject: Subject) -> Corrector | None:
        """Return the tap that repairs; None unless ``detect.correct``."""
        if not self.detect.correct:
            return None
        layers = self.layers(hit, subject)
        return Corrector(self.situation.visible, layers=layers, synchronize=subject.synchronize)

    def layers(self, hit: frozenset[int], subject: Subject) -> frozenset[int]:
        """Return the layers to look at: those in front of the first fault are bitwise those of the baseline."""
        return hit if self.site_only else frozenset(range(min(hit), len(subject.cores)))


@dataclass(frozen=True)
class InjectedPass:
    """The results of the injected pass of a run.

    Attributes:
        evaluation: loss and output.
        records: what the faults hit.
        watcher: what the detectors said.
        corrector: None unless ``detect.correct``.
        keeper: the output of the first injected layer; None unless it was asked for.
        block_changes: by number of the block, how far what it returns moved; empty unless it was watched.
        forward_seconds: the pass without detectors, correction and watched blocks.
    """

    evaluation: Evaluation
    records: tuple[InjectionRecord, ...]
    watcher: Watcher
    corrector: Corrector | None
    keeper: OutputKeeper | None
    block_changes: Mapping[int, float]
    forward_seconds: float

    @classmethod
    def of(
        cls,
        subject: Subject,
        batch: Mapping[str, Tensor],
        faults: Sequence[Fault],
        observed: Observed,
        monitor: PerformanceMonitor,
    ) -> InjectedPass:
        """Run the model with ``faults`` on ``batch``."""
        injector, blocks = Injector(faults), observed.blocks
        hit = frozenset(fault.layer for fault in faults)
        watcher, corrector = observed.watcher(hit, subject), observed.corrector(hit, subject)
        keeper = OutputKeeper(min(hit)) if observed.keep_output else None
        # The corrector comes after the detectors: they judge what it then repairs.
        taps: list[Tap] = [tap for tap in (watcher, corrector, keeper) if tap is not None]
        readers: list[Detector | Certifier] = [*observed.detectors, *filter(None, [observed.certifier])]

        def compute() -> Evaluation:
            with (
                recorded_origins(subject.model, readers) as watcher.origins,
                monitor.timer("injection_forward"),
                tapped(subject.model, injector),
                blocks or nullcontext(),
            ):
                evaluation = subject.forward(batch, *taps)
            injector.finish()
            return evaluation

        evaluation = observed.traced(compute, watcher)
        monitor.add_time("bounds_computation", watcher.bounds_seconds)
        monitor.add_time("violation_detection", watcher.detection_seconds)
        monitor.record_memory()
        looked = watcher.bounds_seconds + watcher.detection_seconds + (corrector.seconds if corrector else 0.0)
        looked += blocks.seconds if blocks else 0.0
        seconds = max(0.0, (monitor.metrics.injection_forward_time or 0.0) - looked)
        changes = blocks.changes if blocks else {}
        return cls(evaluation, tuple(injector.records), watcher, corrector, keeper, changes, seconds)
