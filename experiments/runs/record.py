"""A run after its fault is drawn, and its record after it is executed."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config import ExperimentConfig
from experiments.passes.baseline import Baseline
from experiments.plan.plan import PlannedRun
from experiments.tables.schema import CleanRow, DetectionRow, ExperimentResult, PropagationRow
from fault_injection import Fault
from monitoring import PerformanceMetrics


@dataclass(frozen=True)
class RunRecord:
    """All rows of one run; ``clean`` are the rows of fault-free passes that were made for it."""

    result: ExperimentResult
    detections: tuple[DetectionRow, ...]
    faults: tuple[Fault, ...]
    metrics: PerformanceMetrics
    clean: tuple[CleanRow, ...] = ()
    propagation: tuple[PropagationRow, ...] = ()


@dataclass(frozen=True)
class DrawnRun:
    """A run whose faults are drawn.

    Attributes:
        planned, config: the planned run, and the configuration of this run alone.
        batch_index, baseline: its input, and the fault-free pass of that input.
        faults, fault_id: the faults, and their identity.
        baseline_first: whether the fault-free pass of an uncached pair comes first.
        model_id: the fingerprint of the model.
        sampling_weight: the probability of the faults under uniform drawing, divided by the probability with which they
            were drawn.
    """

    planned: PlannedRun
    config: ExperimentConfig
    batch_index: int
    baseline: Baseline
    faults: tuple[Fault, ...]
    fault_id: str
    baseline_first: bool
    model_id: str
    sampling_weight: float = 1.0

    @property
    def propagates(self) -> bool:
        """Return whether the fault is propagated to the output of the model."""
        return self.config.run.propagates(self.planned.repeat)
