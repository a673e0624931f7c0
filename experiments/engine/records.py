"""The records of runs: the measurements of a run as rows of the result files.

records = Records(context, model_name=None)
rows = records.detections(drawn, watcher, effect)
record = records.record(drawn, measured)          # a RunRecord
"""

from __future__ import annotations

from experiments.effects.outcome import Effect
from experiments.engine.context import Context
from experiments.runs.measured import Measured, Setting
from experiments.runs.metrics import RunMetrics
from experiments.runs.record import DrawnRun, RunRecord
from experiments.runs.rows import Seen, detection_rows, propagation_rows, run_row
from experiments.tables.schema import DetectionRow
from monitoring import PerformanceMetrics, PerformanceMonitor


class Records:
    """Makes the records of the runs of one context.

    Args:
        context: the model and its inputs.
        model_name: what the rows call a model that was given, like the batches, from Python (None: both are those of
            the run's configuration).

    Attributes:
        monitor: sums up the times of a run.
    """

    def __init__(self, context: Context, model_name: str | None = None) -> None:
        self._context, self._model_name = context, model_name
        self.monitor = PerformanceMonitor(context.subject.device)
        self._metrics = RunMetrics(context.subject, context.batches, self.monitor)

    def detections(self, drawn: DrawnRun, seen: Seen, effect: Effect | None) -> list[DetectionRow]:
        """Return the rows of what detectors said in a run."""
        batch = self._context.batches[drawn.batch_index]
        return detection_rows(drawn.planned.run_id, seen, effect, batch, drawn.config)

    def metrics(self, drawn: DrawnRun, detections: list[DetectionRow]) -> PerformanceMetrics:
        """Return what the monitor measured of a run."""
        return self._metrics.of(drawn, detections)

    def record(self, drawn: DrawnRun, measured: Measured) -> RunRecord:
        """Return the record of a run; the first one after a new baseline brings its rows along."""
        subject = self._context.subject
        setting = Setting(
            model=self._model_name or drawn.config.model.path,
            source="dataloader" if self._model_name else drawn.config.data.source,
            dtype=str(subject.dtype).removeprefix("torch."),
            device=str(subject.device),
            depth=len(subject.cores),
        )
        result = run_row(drawn.planned, drawn.config, setting, measured, drawn.sampling_weight)
        clean = self._context.baselines.new_rows()
        propagation = propagation_rows(drawn.planned.run_id, measured.block_changes)
        return RunRecord(result, tuple(measured.detections), drawn.faults, measured.metrics, clean, propagation)
