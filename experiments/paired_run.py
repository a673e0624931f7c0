"""Pairs: one fault, its injected pass, and the fault-free baseline of the same input.

    pairs = PairedRunner(subject, batches, forward)
    pairs.prepare(config)                    # equivalence gate and control run, or CheckRefusedError
    record = pairs.run(planned, config)      # a RunRecord: one result, its detections, its faults

Everything random in a run is drawn from the run's own generator, in this order: batch, layers, element, bits.

Public names: ``PairedRunner``, ``RunRecord``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bounds import Detector, get_detector
from bounds.certifier import Certifier
from experiments.baseline import Baseline, compute_baseline, timed_forward
from experiments.calibration import calibrate
from experiments.config import ExperimentConfig
from experiments.corrector import Corrector, check_clean_correction
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.gate import control_run, equivalence_gate
from experiments.objective import Evaluation
from experiments.origins import recorded_origins
from experiments.outcome import Effect, effect_of
from experiments.plan import PlannedRun
from experiments.result import CleanRow, DetectionRow, ExperimentResult
from experiments.result_rows import clean_rows, detection_rows, experiment_result
from experiments.subject import Subject
from experiments.watcher import Watcher
from fault_injection import (
    Fault,
    InjectionRecord,
    Injector,
    candidate_layers,
    choose_layers,
    draw_fault,
    instrumentation_of,
    tapped,
)
from fault_injection.bits import check_bits
from fault_injection.model_outputs import bitwise_equal
from monitoring import PerformanceMetrics, PerformanceMonitor
from monitoring.cached_forward import CachedForward
from monitoring.fingerprints import digest, input_fingerprint, model_fingerprint
from monitoring.flops import attention_formula_gap


@dataclass(frozen=True)
class RunRecord:
    """Everything one run yields; ``clean`` are the rows of fault-free passes that were made for it."""

    result: ExperimentResult
    detections: tuple[DetectionRow, ...]
    faults: tuple[Fault, ...]
    metrics: PerformanceMetrics
    clean: tuple[CleanRow, ...] = ()


@dataclass(frozen=True)
class InjectedPass:
    """What the injected pass of a run gave; ``corrector`` is None unless ``detect.correct``."""

    evaluation: Evaluation
    records: tuple[InjectionRecord, ...]
    watcher: Watcher
    corrector: Corrector | None
    forward_seconds: float


class PairedRunner:
    """Runs pairs on one model and one set of batches.

    Args:
        subject: the patched model.
        batches: batches on its device, as ``Subject.to_device`` returns them.
        forward: the cache, trace and counters that passes go through.
        calibration: gives fault-free inputs that no run uses, for detectors that must be calibrated (default: none).
        model_name: what the rows call a model that was given, like the batches, from Python (default: both are those of
            the run's configuration).
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
        self._calibration = calibration
        self._calibration_id = ""
        self._made_certifier: Certifier | None = None
        self._detectors: dict[tuple[tuple[str, ...], float], list[Detector]] = {}
        self.subject = subject
        self._model_name = model_name
        self.batches = batches
        self.forward = forward
        self._clean_known: set[str] = set()
        self._clean_new: list[CleanRow] = []
        self.monitor = PerformanceMonitor(subject.device)
        self._input_ids = [input_fingerprint(dict(batch)) for batch in batches]
        self._has_formulas = attention_formula_gap(subject.model) is None

    def prepare(self, config: ExperimentConfig) -> dict[str, Any]:
        """Run the equivalence gate and the control run on the first batch; return what was checked, for provenance."""
        first = self.batches[0]
        equivalence_gate(self.subject, first)
        baseline = self.baseline(0, config)
        control_run(self.subject, first, baseline.evaluation, baseline.sites)
        return {
            "equivalence_gate": "bitwise equal to the model's own eager attention",
            "control_run": "loss and output differ by exactly 0",
            "execution": "plain",
            "attention_layers": self.subject.layer_names,
            "attention_paths": [core.path for core in self.subject.cores],
            "kv_equal": [self.subject.kv_equal.get(core.index) for core in self.subject.cores],
        }

    def check_layers(self, config: ExperimentConfig) -> list[int]:
        """Return the candidate layers of a run; ``ValueError`` if the configuration names layers that do not exist."""
        fault = config.fault
        allowed = instrumentation_of(self.subject.model).injection_layers
        layers = fault.layer_list()
        if allowed is None:
            return candidate_layers(self.subject.layer_names, layers, fault.layer_pattern)
        refused = sorted(set(layers or ()) - set(allowed))
        if refused:
            raise ValueError(f"fault.layers: got {refused[0]}, allowed {list(allowed)} (injection_layers of the patch)")
        return candidate_layers(self.subject.layer_names, layers or list(allowed), fault.layer_pattern)

    def check_fault(self, config: ExperimentConfig) -> None:
        """Raise ``ValueError`` or ``IndexError`` if such a fault cannot be drawn on the first batch."""
        spec = config.fault.spec()
        sites = self.baseline(0, config).sites
        for layer in self.check_layers(config):
            site = sites[layer, spec.location]
            site.check(spec.index)
            if isinstance(spec.bits, tuple):
                check_bits(spec.bits, site.dtype)

    def detectors(self, config: ExperimentConfig) -> list[Detector]:
        """Return the detectors of a configuration, prepared for the model and calibrated, made once for all runs."""
        key = config.detect.names(), config.detect.tolerance
        if key not in self._detectors:
            made = [get_detector(name, config.detect.tolerance) for name in key[0]]
            for detector in made:
                detector.prepare(self.subject.model)
            if any(detector.calibrated for detector in made) and not self._calibration_id:
                seen = self._calibration()
                self._calibration_id = digest("calibration", *(input_fingerprint(dict(batch)) for batch in seen))
            calibrate(made, self.subject, self._calibration)
            self._detectors[key] = made
        return self._detectors[key]

    def baseline(
        self, batch_index: int, config: ExperimentConfig, run_id: str = "", model_id: str | None = None
    ) -> Baseline:
        """Return the fault-free pass of a batch, computed once for each input, model and set of detectors."""
        batch = self.batches[batch_index]
        detectors, tolerance = self.detectors(config), config.detect.tolerance
        model_id = model_id or model_fingerprint(self.subject.model)
        names, correct = [detector.name for detector in detectors], config.detect.correct
        learnt = self._calibration_id if any(detector.calibrated for detector in detectors) else ""

        def compute() -> Baseline:
            computed = compute_baseline(self.subject, batch, detectors)
            if correct:
                check_clean_correction(self.subject, batch, computed)
            return computed

        baseline = self.forward.cached(
            "baseline",
            "base",
            dict(batch),
            {
                "detectors": names,
                "tolerance": tolerance,
                "family": self.subject.family,
                "correct": correct,
                "calibration": learnt,
            },
            compute,
            model=model_id,
            phase="baseline",
            run_id=run_id,
        )
        # What calibrated detectors say depends on what they have seen.
        baseline_id = digest(model_id, self._input_ids[batch_index], *filter(None, [learnt]))
        # What the detectors said of a pass depends on which there were.
        known = f"{baseline_id} {config.detect.names()} {tolerance}"
        if known not in self._clean_known:
            self._clean_known.add(known)
            self._clean_new += clean_rows(baseline_id, baseline, self.subject.layer_names, tolerance)
        return baseline

    def run(self, planned: PlannedRun, config: ExperimentConfig) -> RunRecord:
        """Execute one run.

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
        random = planned.generator()
        batch_index = int(random.integers(len(self.batches)))
        model_id = model_fingerprint(self.subject.model)
        baseline = self.baseline(batch_index, config, planned.run_id, model_id)
        faults = self._draw(config, baseline, random)
        fault_id = digest(model_id, self._input_ids[batch_index], *(fault.to_json() for fault in faults))[:16]
        baseline_first = bool(random.integers(2))
        seconds = baseline.forward_seconds
        if not config.run.reuse_baseline and baseline_first:
            seconds = self._repeat_baseline(baseline, batch_index)
        injected = self._inject(faults, fault_id, baseline, batch_index, config, planned.run_id, model_id)
        if not config.run.reuse_baseline and not baseline_first:
            seconds = self._repeat_baseline(baseline, batch_index)
        effect = effect_of(
            baseline.evaluation,
            injected.evaluation,
            self.batches[batch_index],
            self.subject.family,
            config.detect.critical_loss,
        )
        self.monitor.add_time("baseline_forward", seconds)
        self.monitor.add_time("total", time.perf_counter() - start)
        return self._record(planned, config, baseline, faults, fault_id, injected, effect, batch_index)

    def run_many(
        self, runs: Sequence[tuple[PlannedRun, ExperimentConfig]]
    ) -> Iterator[tuple[PlannedRun, RunRecord | Exception]]:
        """Execute runs of one context; yield each once, in any order, as it is done.

        A run that raises is yielded with its exception; what refuses the whole campaign is raised.
        """
        for planned, config in runs:
            try:
                record = self.run(planned, config)
            except (UsageError, MissingResourceError, CheckRefusedError):
                raise
            except Exception as error:
                yield planned, error
            else:
                yield planned, record

    def _certifier(self) -> Certifier:
        if self._made_certifier is None:
            self._made_certifier = Certifier(self.subject.model)
        return self._made_certifier

    def _draw(self, config: ExperimentConfig, baseline: Baseline, random: np.random.Generator) -> tuple[Fault, ...]:
        layers = choose_layers(self.check_layers(config), config.fault.effective_layer_mode(), random)
        spec = config.fault.spec()
        return tuple(draw_fault(spec, baseline.sites[layer, spec.location], random) for layer in layers)

    def _repeat_baseline(self, baseline: Baseline, batch_index: int) -> float:
        evaluation, seconds = timed_forward(self.subject, self.batches[batch_index])
        if not bitwise_equal(evaluation.output, baseline.evaluation.output):
            raise CheckRefusedError(
                f"the fault-free pass of batch {batch_index} did not repeat bit for bit; effects of faults could "
                "not be told from the noise of this set-up"
            )
        return seconds

    def _inject(
        self,
        faults: Sequence[Fault],
        fault_id: str,
        baseline: Baseline,
        batch_index: int,
        config: ExperimentConfig,
        run_id: str,
        model_id: str,
    ) -> InjectedPass:
        injector = Injector(faults)
        detectors, situation = self.detectors(config), baseline.situation
        # Layers before the first fault are bitwise those of the baseline, and so are their verdicts.
        layers = frozenset(range(min(fault.layer for fault in faults), len(self.subject.cores)))
        synchronize = self.subject.synchronize
        certifier = self._certifier() if config.detect.certificate else None
        watcher = Watcher(detectors, situation, layers=layers, synchronize=synchronize, certifier=certifier)
        corrector = None
        if config.detect.correct:
            corrector = Corrector(situation.visible, layers=layers, synchronize=synchronize)
        # The corrector comes last: detectors judge what it then repairs.
        taps = (watcher,) if corrector is None else (watcher, corrector)

        def injected_pass() -> Evaluation:
            with (
                recorded_origins(self.subject.model, [*detectors, *filter(None, [certifier])]) as watcher.origins,
                self.monitor.timer("injection_forward"),
                tapped(self.subject.model, injector),
            ):
                evaluation = self.subject.forward(self.batches[batch_index], *taps)
            injector.finish()
            return evaluation

        evaluation = self.forward.forward(
            "injected",
            f"fault:{fault_id}",
            dict(self.batches[batch_index]),
            injected_pass,
            model=model_id,
            run_id=run_id,
            fault=[fault.to_json() for fault in faults],
            details=lambda answer: {
                "loss": answer.loss,
                "phase_ms": {"bounds": 1e3 * watcher.bounds_seconds, "detection": 1e3 * watcher.detection_seconds},
            },
        )
        self.monitor.add_time("bounds_computation", watcher.bounds_seconds)
        self.monitor.add_time("violation_detection", watcher.detection_seconds)
        self.monitor.record_memory()
        total = self.monitor.metrics.injection_forward_time or 0.0
        looked = watcher.bounds_seconds + watcher.detection_seconds + (corrector.seconds if corrector else 0.0)
        return InjectedPass(evaluation, tuple(injector.records), watcher, corrector, max(0.0, total - looked))

    def _record(
        self,
        planned: PlannedRun,
        config: ExperimentConfig,
        baseline: Baseline,
        faults: tuple[Fault, ...],
        fault_id: str,
        injected: InjectedPass,
        effect: Effect,
        batch_index: int,
    ) -> RunRecord:
        detections = detection_rows(planned.run_id, injected.watcher, effect, self.batches[batch_index], config)
        metrics = self._metrics(batch_index, len({row.layer for row in detections if row.layer is not None}))
        result = experiment_result(
            planned=planned,
            config=config,
            model=self._model_name or config.model.path,
            source="dataloader" if self._model_name else config.data.source,
            dtype=str(self.subject.dtype).removeprefix("torch."),
            device=str(self.subject.device),
            depth=len(self.subject.cores),
            batch_index=batch_index,
            faults=faults,
            fault_id=fault_id,
            records=injected.records,
            losses=(baseline.evaluation.loss, injected.evaluation.loss),
            effect=effect,
            detections=detections,
            metrics=metrics,
            injection_seconds=injected.forward_seconds,
            certificate=injected.watcher.certificate,
            corrector=injected.corrector,
        )
        clean, self._clean_new = tuple(self._clean_new), []
        return RunRecord(result, tuple(detections), faults, metrics, clean)

    def _metrics(self, batch_index: int, checked_layers: int) -> PerformanceMetrics:
        """Return what was measured in the run, with sizes and operations where formulas hold for the architecture."""
        if self._has_formulas:
            self.monitor.record_model_info(self.subject.model, dict(self.batches[batch_index]))
            self.monitor.estimate_flops(checked_layers)
        return self.monitor.metrics
