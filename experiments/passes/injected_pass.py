"""One whole injected pass and its observations: the plain way to execute a run.

injected = InjectedPass.of(subject, batch, faults, baseline.situation, detectors, config.detect, monitor)
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
        situation: Situation,
        detectors: Sequence[Detector],
        detect: DetectConfig,
        monitor: PerformanceMonitor,
        *,
        certifier: Certifier | None = None,
        keep_output: bool = False,
        site_only: bool = False,
        blocks: BlockWatcher | None = None,
        traced: Traced = lambda compute, watcher: compute(),
    ) -> InjectedPass:
        """Run the model with ``faults`` on ``batch``; detectors and corrector as ``detect`` says.

        With ``keep_output`` the output of the first injected layer is kept; with ``site_only`` nothing looks at others;
        ``blocks`` sees what the blocks return.
        """
        injector, synchronize = Injector(faults), subject.synchronize
        hit = frozenset(fault.layer for fault in faults)
        # Layers before the first fault are bitwise those of the baseline, and so are their verdicts.
        layers = hit if site_only else frozenset(range(min(hit), len(subject.cores)))
        watcher = Watcher(
            detectors,
            situation,
            layers=layers,
            injected=hit if detect.layers == "injected" else None,
            synchronize=synchronize,
            certifier=certifier,
        )
        corrector = Corrector(situation.visible, layers=layers, synchronize=synchronize) if detect.correct else None
        keeper = OutputKeeper(min(hit)) if keep_output else None
        # The corrector comes after the detectors: they judge what it then repairs.
        taps: list[Tap] = [tap for tap in (watcher, corrector, keeper) if tap is not None]

        def compute() -> Evaluation:
            with (
                recorded_origins(subject.model, [*detectors, *filter(None, [certifier])]) as watcher.origins,
                monitor.timer("injection_forward"),
                tapped(subject.model, injector),
                blocks or nullcontext(),
            ):
                evaluation = subject.forward(batch, *taps)
            injector.finish()
            return evaluation

        evaluation = traced(compute, watcher)
        monitor.add_time("bounds_computation", watcher.bounds_seconds)
        monitor.add_time("violation_detection", watcher.detection_seconds)
        monitor.record_memory()
        looked = watcher.bounds_seconds + watcher.detection_seconds + (corrector.seconds if corrector else 0.0)
        looked += blocks.seconds if blocks else 0.0
        seconds = max(0.0, (monitor.metrics.injection_forward_time or 0.0) - looked)
        changes = blocks.changes if blocks else {}
        return cls(evaluation, tuple(injector.records), watcher, corrector, keeper, changes, seconds)
