"""Pairs: one fault, its injected pass, and the fault-free baseline of the same input.

    pairs = PairedRunner(subject, batches, forward)
    pairs.prepare(config)                    # equivalence gate, control run and start-up proof, or CheckRefusedError
    record = pairs.run(planned, config)      # a RunRecord: one result, its detections, its faults
    for planned, record in pairs.run_many(runs): ...

Public names: ``PairedRunner``, ``RunRecord``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from bounds import Detector
from bounds.effects.certifier import Certifier
from experiments.config import ExperimentConfig
from experiments.effects.baseline_rows import BaselineRows
from experiments.effects.block_outputs import BlockOutputs
from experiments.effects.local_change import LocalChange
from experiments.effects.loss import Evaluation
from experiments.effects.outcome import Effect, effect_of
from experiments.engine.batch_runs import BatchRuns
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.passes.baseline import Baseline, timed_forward
from experiments.passes.baselines import Baselines
from experiments.passes.block_changes import Blocks, BlockWatcher
from experiments.passes.gate import control_run, equivalence_gate
from experiments.passes.injected_pass import InjectedPass
from experiments.passes.subject import Subject
from experiments.passes.taps.output_keeper import OutputKeeper, change_of
from experiments.passes.taps.watcher import Watcher
from experiments.plan.plan import PlannedRun
from experiments.runs.drawing import FaultDrawing
from experiments.runs.measured import Measured, Setting
from experiments.runs.metrics import RunMetrics
from experiments.runs.record import DrawnRun, RunRecord
from experiments.runs.rows import Seen, detection_rows, propagation_rows, run_row, tightest
from experiments.tables.schema import DetectionRow
from fault_injection.numbers.model_outputs import bitwise_equal
from monitoring import PerformanceMonitor
from monitoring.cache.cached_forward import CachedForward

logger = logging.getLogger(__name__)

Done = TypeVar("Done")

WORTH_A_PROOF = 32
"""Fewer runs are done sooner than the start-up proof of the fast engine."""


class PairedRunner:
    """Runs pairs on one model and one set of batches.

    Args:
        subject: the patched model.
        batches: batches on its device, as ``Subject.to_device`` returns them.
        forward: the cache, trace and counters that passes go through.
        calibration: gives fault-free inputs that no run uses, for detectors that must be calibrated (default: none).
        model_name: what the rows call a model that was given, like the batches, from Python (default: both are those of
            the run's configuration).

    Attributes:
        drawing: draws the faults of runs.
        facts: what was checked, and how runs are executed, for provenance.
        stopping: asked before anything is begun; once it is true, ``run_many`` ends early.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Mapping[str, Tensor]],
        forward: CachedForward,
        *,
        calibration: Callable[[], Sequence[Mapping[str, Tensor]]] = tuple,
        model_name: str | None = None,
    ) -> None:
        self._made_certifier: Certifier | None = None
        self.subject = subject
        self._model_name = model_name
        self.batches = batches
        self.forward = forward
        self.facts: dict[str, Any] = {}
        self.stopping: Callable[[], bool] = lambda: False
        self._fast = BatchRuns(self)
        self._blocks = Blocks(subject, batches, lambda: self.forward)
        self._baselines = Baselines(subject, batches, lambda: self.forward, calibration)
        self.drawing = FaultDrawing(subject, batches, self._baselines)
        self.monitor = PerformanceMonitor(subject.device)
        self.metrics = RunMetrics(subject, batches, self.monitor)

    def prepare(self, config: ExperimentConfig) -> dict[str, Any]:
        """Run the equivalence gate and the control run on the first batch; return what was checked, for provenance."""
        first = self.batches[0]
        equivalence_gate(self.subject, first)
        baseline = self.baseline(0, config)
        control_run(self.subject, first, baseline.evaluation, baseline.sites)
        self.facts |= {
            "equivalence_gate": "bitwise equal to the model's own eager attention",
            "control_run": "loss and output differ by exactly 0",
            "execution": "plain",
            "attention_layers": self.subject.layer_names,
            "attention_paths": [core.path for core in self.subject.cores],
            "kv_equal": [self.subject.kv_equal.get(core.index) for core in self.subject.cores],
        }
        if config.run.engine == "fast":
            self._fast.proof(config)
        self.follows(config)
        return self.facts

    def follows(self, config: ExperimentConfig) -> bool:
        """Whether propagated runs of a configuration are to be compared behind every block, and can be."""
        if config.run.propagation and "propagation" not in self.facts:
            self.facts["propagation"] = self._blocks.reason or "behind every block"
            if self._blocks.reason is not None:
                logger.warning("run.propagation: propagation.csv stays empty, since %s", self._blocks.reason)
        return config.run.propagation and self._blocks.reason is None

    def detectors(self, config: ExperimentConfig) -> list[Detector]:
        """Return the detectors of a configuration, prepared for the model and calibrated, made once for all runs."""
        return self._baselines.detectors(config)

    def baseline(
        self, batch_index: int, config: ExperimentConfig, run_id: str = "", model_id: str | None = None
    ) -> Baseline:
        """Return the fault-free pass of a batch, computed once for each input, model and set of detectors."""
        return self._baselines.get(batch_index, config, run_id, model_id)

    def batch_index(self, planned: PlannedRun) -> int:
        """Return which batch a run uses."""
        return planned.batch_index(len(self.batches))

    def run(self, planned: PlannedRun, config: ExperimentConfig) -> RunRecord:
        """Execute one run by whole forward passes.

        Args:
            planned: its identity.
            config: the configuration of this run alone (``Plan.config_of``).

        Raises:
            ValueError, IndexError: layers, bits or an index that the model does not have.
            FaultMissedError: the pass never reached the fault.
        """
        self.monitor.reset()
        self.subject.synchronize()
        start = time.perf_counter()
        return self.run_drawn(self.drawing.draw(planned, config), start=start)

    def run_drawn(
        self,
        drawn: DrawnRun,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        execution: str = "plain",
        start: float | None = None,
        rows: BaselineRows | None = None,
        outputs: BlockOutputs | None = None,
    ) -> RunRecord:
        """Execute a drawn run by an injected pass.

        Args:
            drawn: the run.
            around: what the pass runs in (a model that resumes at a block).
            execution: what the row calls this.
            start: when the run began, on ``time.perf_counter`` (default: now; the monitor is then reset).
            rows: those of the baseline's output, if they are there already.
            outputs: what the blocks return in the baseline, likewise.
        """
        if start is None:
            self.monitor.reset()
            self.subject.synchronize()
            start = time.perf_counter()
        baseline, config, batch = drawn.baseline, drawn.config, self.batches[drawn.batch_index]
        seconds = baseline.forward_seconds
        if not config.run.reuse_baseline and drawn.baseline_first:
            seconds = self._repeat_baseline(baseline, drawn.batch_index)
        if self.follows(config) and drawn.propagates and outputs is None:
            outputs = self._blocks.outputs(drawn.batch_index, drawn.model_id, drawn.planned.run_id)
        with around():
            injected = self._inject(drawn, outputs)
        if not config.run.reuse_baseline and not drawn.baseline_first:
            seconds = self._repeat_baseline(baseline, drawn.batch_index)
        effect = effect_of(
            baseline.evaluation, injected.evaluation, batch, self.subject.family, config.detect.critical_loss, rows
        )
        local, unmoved = self._at_site(drawn, injected)
        # Nothing behind an output that did not move can differ; for any other the site alone does not know.
        reached = effect if drawn.propagates or (unmoved and effect.outcome == "masked") else None
        self.monitor.add_time("baseline_forward", seconds)
        self.monitor.add_time("total", time.perf_counter() - start)
        detections = self.detections(drawn, injected.watcher, reached)
        measured = Measured(
            batch_index=drawn.batch_index,
            faults=drawn.faults,
            fault_id=drawn.fault_id,
            records=injected.records,
            baseline_loss=baseline.evaluation.loss,
            effect=reached,
            local=local,
            detections=detections,
            block_changes=injected.block_changes,
            metrics=self.metrics.of(drawn, detections),
            injection_seconds=injected.forward_seconds,
            tightest=tightest(injected.watcher, drawn.faults[0].layer),
            certificate=injected.watcher.certificate,
            corrector=injected.corrector,
            execution=execution,
        )
        return self.record(drawn, measured)

    def _at_site(self, drawn: DrawnRun, injected: InjectedPass) -> tuple[LocalChange | None, bool]:
        """Return how far the layer's output moved in a run that is not propagated, and whether it did not at all."""
        if injected.keeper is None:
            return None, False
        clean = OutputKeeper(drawn.faults[0].layer)
        self.subject.forward(self.batches[drawn.batch_index], clean)
        return change_of(drawn.faults[0], injected.keeper, clean), bitwise_equal(injected.keeper.out, clean.out)

    def detections(self, drawn: DrawnRun, seen: Seen, effect: Effect | None) -> list[DetectionRow]:
        """Return the rows of what detectors said in a run."""
        batch = self.batches[drawn.batch_index]
        return detection_rows(drawn.planned.run_id, seen, effect, batch, drawn.config)

    def record(self, drawn: DrawnRun, measured: Measured) -> RunRecord:
        """Return the record of a run; the first one after a new baseline brings its rows along."""
        setting = Setting(
            model=self._model_name or drawn.config.model.path,
            source="dataloader" if self._model_name else drawn.config.data.source,
            dtype=str(self.subject.dtype).removeprefix("torch."),
            device=str(self.subject.device),
            depth=len(self.subject.cores),
        )
        result = run_row(drawn.planned, drawn.config, setting, measured, drawn.sampling_weight)
        clean = self._baselines.new_rows()
        propagation = propagation_rows(drawn.planned.run_id, measured.block_changes)
        return RunRecord(result, tuple(measured.detections), drawn.faults, measured.metrics, clean, propagation)

    def run_many(
        self, runs: Sequence[tuple[PlannedRun, ExperimentConfig]]
    ) -> Iterator[tuple[PlannedRun, RunRecord | Exception]]:
        """Execute runs of one context as ``run.engine`` says; yield each once, in any order, as it is done.

        Those that were not begun when ``stopping`` became true are not yielded.

        A run that raises is yielded with its exception; what refuses the whole campaign is raised.
        """
        together = [run for run in runs if run[1].run.engine != "plain"]
        if len(together) < WORTH_A_PROOF:
            together = [run for run in together if run[1].run.engine == "fast"]
        yield from self._fast.run(together)
        done = {planned.run_id for planned, _ in together}
        for planned, config in runs:
            if self.stopping():
                return
            if planned.run_id not in done:
                yield planned, self.attempt(partial(self.run, planned, config))

    @staticmethod
    def attempt(execute: Callable[[], Done]) -> Done | Exception:
        """Return what ``execute`` does, or the error of one run; one that refuses the whole campaign is raised."""
        try:
            return execute()
        except (UsageError, MissingResourceError, CheckRefusedError):
            raise
        except Exception as error:
            return error

    def _certifier(self) -> Certifier:
        if self._made_certifier is None:
            self._made_certifier = Certifier(self.subject.model)
        return self._made_certifier

    def _repeat_baseline(self, baseline: Baseline, batch_index: int) -> float:
        evaluation, seconds = timed_forward(self.subject, self.batches[batch_index])
        if not bitwise_equal(evaluation.output, baseline.evaluation.output):
            raise CheckRefusedError(
                f"the fault-free pass of batch {batch_index} did not repeat bit for bit; effects of faults could "
                "not be told from the noise of this set-up"
            )
        return seconds

    def watcher(self, outputs: BlockOutputs, layer: int) -> BlockWatcher:
        """Return what compares what the blocks from that of a layer on return in an injected pass."""
        return self._blocks.watcher(outputs, layer)

    def _inject(self, drawn: DrawnRun, outputs: BlockOutputs | None) -> InjectedPass:
        batch, detect = self.batches[drawn.batch_index], drawn.config.detect

        def traced(compute: Callable[[], Evaluation], watcher: Watcher) -> Evaluation:
            return self.forward.forward(
                "injected",
                f"fault:{drawn.fault_id}",
                dict(batch),
                compute,
                model=drawn.model_id,
                run_id=drawn.planned.run_id,
                fault=[fault.to_json() for fault in drawn.faults],
                details=lambda answer: {
                    "loss": answer.loss,
                    "phase_ms": {"bounds": 1e3 * watcher.bounds_seconds, "detection": 1e3 * watcher.detection_seconds},
                },
            )

        return InjectedPass.of(
            self.subject,
            batch,
            drawn.faults,
            drawn.baseline.situation,
            self.detectors(drawn.config),
            detect,
            self.monitor,
            certifier=self._certifier() if detect.certificate else None,
            keep_output=not drawn.propagates,
            site_only=not drawn.propagates,
            blocks=None if outputs is None else self.watcher(outputs, min(fault.layer for fault in drawn.faults)),
            traced=traced,
        )
