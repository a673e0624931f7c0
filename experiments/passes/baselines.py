"""The fault-free passes of a context: computed once for each input and choice of detectors.

baselines = Baselines(subject, batches, lambda: forward, calibration)
baseline = baselines.get(0, config)
baselines.new_rows()                  # what detectors said of passes that were made since the last call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from bounds import Detector, Verdict, get_detector
from bounds.registry import is_oracle
from experiments.config import ExperimentConfig
from experiments.passes.baseline import Baseline, Recorder, compute_baseline
from experiments.passes.calibration import calibrate
from experiments.passes.gate import check_clean_correction
from experiments.passes.subject import Subject
from experiments.tables.schema import CleanRow, row_of
from monitoring.cache.cached_forward import CachedForward
from monitoring.cache.fingerprints import digest, input_fingerprint
from monitoring.cache.model_fingerprints import model_fingerprint


class Baselines:
    """Detectors and fault-free passes on one model and one set of batches.

    Args:
        subject: the patched model.
        batches: on its device.
        forward: gives the cache, trace and counters that passes go through.
        calibration: gives fault-free inputs that no run uses, for detectors that must be calibrated.

    Attributes:
        input_ids: the fingerprint of each batch.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Mapping[str, Tensor]],
        forward: Callable[[], CachedForward],
        calibration: Callable[[], Sequence[Mapping[str, Tensor]]],
    ) -> None:
        self._subject, self._batches, self._forward, self._calibration = subject, batches, forward, calibration
        self._learnt_id = ""
        self._seconds: dict[str, float] = {}
        self._detectors: dict[tuple[tuple[str, ...], float], list[Detector]] = {}
        self._last: tuple[Any, Baseline] | None = None
        self._known: set[str] = set()
        self._new: list[CleanRow] = []
        self.input_ids = [input_fingerprint(dict(batch)) for batch in batches]

    def detectors(self, config: ExperimentConfig) -> list[Detector]:
        """Return the detectors of a configuration, prepared for the model and calibrated, made once for all runs."""
        key = config.detect.names(), config.detect.tolerance
        if key not in self._detectors:
            made = [get_detector(name, config.detect.tolerance) for name in key[0]]
            for detector in made:
                detector.prepare(self._subject.model)
            if any(detector.calibrated for detector in made):
                seen = self._calibration()
                self._learnt_id = digest("calibration", *(input_fingerprint(dict(batch)) for batch in seen))
                calibrate(made, self._subject, lambda: seen)
            self._detectors[key] = made
        return self._detectors[key]

    def get(
        self,
        batch_index: int,
        config: ExperimentConfig,
        run_id: str = "",
        model_id: str | None = None,
        recorder: Recorder | None = None,
    ) -> Baseline:
        """Return the fault-free pass of a batch, computed once for each input, model and set of detectors.

        A recorder keeps more of the pass; it is not asked where the pass was made before.
        """
        detectors, tolerance = self.detectors(config), config.detect.tolerance
        model_id = model_id or model_fingerprint(self._subject.model)
        names, correct = [detector.name for detector in detectors], config.detect.correct
        learnt = self._learnt(detectors)

        # A look into the cache costs a copy; runs of one input come one after the other.
        key = batch_index, model_id, names, tolerance, correct, learnt
        if self._last is None or self._last[0] != key:
            self._last = None
            compute = partial(self._compute, batch_index, config, model_id, recorder)
            self._last = key, self._look_up(batch_index, config, model_id, compute, run_id)
        baseline = self._last[1]
        # What calibrated detectors say depends on what they have seen.
        baseline_id = digest(model_id, self.input_ids[batch_index], *filter(None, [learnt]))
        # What the detectors said of a pass depends on which there were.
        known = f"{baseline_id} {config.detect.names()} {tolerance}"
        if known not in self._known:
            self._known.add(known)
            self._new += clean_rows(baseline_id, baseline, self._subject.layer_names, tolerance)
        return baseline

    def _look_up(
        self,
        batch_index: int,
        config: ExperimentConfig,
        model_id: str,
        compute: Callable[[], Baseline],
        run_id: str,
    ) -> Baseline:
        detectors = self.detectors(config)
        determining = {
            "detectors": [detector.name for detector in detectors],
            "tolerance": config.detect.tolerance,
            "family": self._subject.family,
            "correct": config.detect.correct,
            "calibration": self._learnt(detectors),
        }
        batch = dict(self._batches[batch_index])
        return self._forward().cached(
            "baseline", "base", batch, determining, compute, model=model_id, phase="baseline", run_id=run_id
        )

    def _compute(
        self, batch_index: int, config: ExperimentConfig, model_id: str, recorder: Recorder | None
    ) -> Baseline:
        batch, detectors = self._batches[batch_index], self.detectors(config)
        # The first input of a shape is also run plainly: for its seconds, and to see that detectors only look.
        shapes = {name: list(tensor.shape) for name, tensor in batch.items()}
        shape = f"{model_id} {config.detect.names()} {config.detect.tolerance} {shapes}"
        seconds = self._seconds.get(shape)
        computed = compute_baseline(self._subject, batch, detectors, seconds=seconds, recorder=recorder)
        self._seconds[shape] = computed.forward_seconds
        if config.detect.correct:
            check_clean_correction(self._subject, batch, computed)
        return computed

    def _learnt(self, detectors: Sequence[Detector]) -> str:
        return self._learnt_id if any(detector.calibrated for detector in detectors) else ""

    def new_rows(self) -> tuple[CleanRow, ...]:
        """Return the rows of passes that were looked at for the first time since the last call."""
        rows, self._new = tuple(self._new), []
        return rows


@dataclass(frozen=True)
class Look:
    """What one detector said of one layer of one pass: the facts of a row of ``detections.csv`` or ``clean.csv``.

    Attributes:
        pass_id: the run, or the fault-free pass.
        name: of the detector.
        layer, module: where it looked; no layer for the model's output.
        verdict: what it said.
        tolerance: ``detect.tolerance``, of a fault-free pass.
    """

    pass_id: str
    name: str
    layer: int | None
    module: str
    verdict: Verdict
    tolerance: float | None = None

    @property
    def online(self) -> bool:
        """Whether the detector sees the faulty pass only."""
        return not is_oracle(self.name)

    @property
    def proved(self) -> bool:
        """Whether a theorem rules out its false positives."""
        return get_detector(self.name).proved


def clean_rows(baseline_id: str, baseline: Baseline, layer_names: Sequence[str], tolerance: float) -> list[CleanRow]:
    """Return what the detectors said of a fault-free pass."""
    return [
        row_of(CleanRow, Look(baseline_id, name, layer, layer_names[layer], verdict, tolerance))
        for (name, layer), verdict in baseline.verdicts.items()
    ]
