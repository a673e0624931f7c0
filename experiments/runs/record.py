"""A run once its fault is drawn, and all it yields once it is executed.

Public names: ``DrawnRun``, ``RunRecord``.
"""

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
    """Everything one run yields; ``clean`` are the rows of fault-free passes that were made for it."""

    result: ExperimentResult
    detections: tuple[DetectionRow, ...]
    faults: tuple[Fault, ...]
    metrics: PerformanceMetrics
    clean: tuple[CleanRow, ...] = ()
    propagation: tuple[PropagationRow, ...] = ()


@dataclass(frozen=True)
class DrawnRun:
    """A run whose fault is known.

    Attributes:
        planned, config: the run, and the configuration of it alone.
        batch_index, baseline: its input, and the fault-free pass of that.
        faults, fault_id: what is injected, and its identity.
        baseline_first: which pass of an uncached pair comes first.
        model_id: fingerprint of the model.
        sampling_weight: probability of the faults under uniform drawing, divided by the one they were drawn with.
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
        """Whether the fault is followed to the output of the model."""
        return self.config.run.propagates(self.planned.repeat)
