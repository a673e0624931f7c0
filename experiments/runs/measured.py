"""The measurements of a run, from either engine; ``experiments.runs.rows`` makes a row from them.

setting = Setting(model="reference", source="pydoc", dtype="float32", device="cpu", depth=6)
measured = Measured(batch_index=0, faults=faults, ..., effect=effect)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.effects.local_change import LocalChange
from experiments.effects.outcome import Effect
from experiments.passes.taps.corrector import Corrector
from experiments.tables.schema import DetectionRow
from fault_injection import Fault, InjectionRecord
from monitoring import PerformanceMetrics


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The facts that all runs on one model and one data set share.

    Attributes:
        model, source: the names of the model and of its text in the rows.
        dtype, device: dtype and device of the model, in words (``float32``, ``cpu``).
        depth: the number of attention layers.
    """

    model: str
    source: str
    dtype: str
    device: str
    depth: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of one run.

    Attributes:
        batch_index: the number of its batch.
        faults, fault_id: the injected faults, first layer first, and their identity.
        records: what the faults hit.
        baseline_loss: the loss of the fault-free pass, nats; None without a loss.
        effect: the effect on the model's output; None if the fault was not propagated and may have had one.
        local: the effect on the output of the first injected layer; None if and only if the fault was propagated
            (``scope`` full).
        detections: the run's rows of ``detections.csv``.
        metrics, injection_seconds: time, memory and operations.
        block_changes: for each number of a block, the relative change of its output; empty unless recorded.
        tightest: epsilon (s@w) and its bounds in the row of the first injected layer that is closest to them, as in
            ``Verdict.tightest``.
        certificate, corrector: None if the configuration does not request them.
        execution: the engine and shortcuts that computed the run.

    Raises:
        ValueError: the run has neither an effect nor a local effect.
    """

    batch_index: int
    faults: Sequence[Fault]
    fault_id: str
    records: Sequence[InjectionRecord]
    baseline_loss: float | None
    effect: Effect | None
    detections: Sequence[DetectionRow]
    metrics: PerformanceMetrics
    injection_seconds: float
    local: LocalChange | None = None
    block_changes: Mapping[int, float] = field(default_factory=dict)
    tightest: tuple[float, float, float] | None = None
    certificate: float | None = None
    corrector: Corrector | None = None
    execution: str = "plain"

    def __post_init__(self) -> None:
        if self.effect is None and self.local is None:
            raise ValueError("effect: got None, allowed only for a run with a local effect (scope site)")
