"""What the execution of a run measured, whichever engine did it; ``experiments.runs.rows`` makes the row of it.

    setting = Setting(model="reference", source="pydoc", dtype="float32", device="cpu", depth=6)
    measured = Measured(batch_index=0, faults=faults, ..., effect=effect)

Public names: ``Setting``, ``Measured``.
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
    """What runs on one model and one data set have in common.

    Attributes:
        model, source: what the rows call the model and its text.
        dtype, device: of the model, in words (``float32``, ``cpu``).
        depth: number of attention layers.
    """

    model: str
    source: str
    dtype: str
    device: str
    depth: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the execution of one run measured.

    Attributes:
        batch_index: which batch it used.
        faults, fault_id: what was injected, first layer first, and its identity.
        records: what the faults hit.
        baseline_loss: nats; None without a loss.
        effect: on the model's output; None if it was not propagated and may have had one.
        local: on the output of the first injected layer; None exactly if the fault was propagated (``scope`` full).
        detections: the run's rows of ``detections.csv``.
        metrics, injection_seconds: what it took.
        block_changes: by number of the block, how far what it returns moved, relatively; empty unless it was recorded.
        tightest: epsilon (s@w) and its bounds in the row of the first injected layer that is closest to them, as
            ``Verdict.tightest``.
        certificate, corrector: None where they were not asked for.
        execution: engine and shortcuts that computed it.

    Raises:
        ValueError: neither an effect nor a local one.
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
