"""The cost of a run: measured times, and sizes and operations from formulas.

monitor.reset()
...
metrics = RunMetrics(subject, batches, monitor).of(drawn, detections)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from experiments.passes.subject import Subject
from experiments.runs.record import DrawnRun
from experiments.tables.schema import DetectionRow
from monitoring import PerformanceMetrics, PerformanceMonitor
from monitoring.performance.flops import attention_formula_gap

SIZES = (
    "num_layers",
    "num_heads",
    "head_dim",
    "seq_len",
    "batch_size",
    "attention_flops",
    "bounds_flops",
    "forward_flops",
    "total_flops",
)
"""The fields of ``PerformanceMetrics`` that depend on the model and the input, not on the execution."""


class RunMetrics:
    """Metrics of runs on one model and one set of batches; sizes are computed once for each input.

    Args:
        subject: the model.
        batches: batches on its device.
        monitor: the monitor that sums up the times.
    """

    def __init__(self, subject: Subject, batches: Sequence[Mapping[str, Tensor]], monitor: PerformanceMonitor) -> None:
        self._subject, self._batches, self._monitor = subject, batches, monitor
        self._sizes: dict[tuple[int, int], dict[str, Any]] = {}
        self._has_formulas = attention_formula_gap(subject.model) is None

    def of(self, drawn: DrawnRun, detections: Sequence[DetectionRow]) -> PerformanceMetrics:
        """Return the monitor's measurements, with sizes and operations if formulas exist for the architecture.

        The operations of bounds are those of the layers that all detectors checked.
        """
        if not self._has_formulas:
            return self._monitor.metrics
        layers = {row.layer for row in detections if row.layer is not None}
        if drawn.config.detect.layers == "injected":
            layers &= {fault.layer for fault in drawn.faults}
        key = drawn.batch_index, len(layers)
        if key not in self._sizes:
            self._monitor.record_model_info(self._subject.model, dict(self._batches[drawn.batch_index]))
            self._monitor.estimate_flops(len(layers))
            known = self._monitor.metrics
            self._sizes[key] = {name: getattr(known, name) for name in SIZES}
        return replace(self._monitor.metrics, **self._sizes[key])
