"""Make the rows of the result files from the measurements of a run.

detections = detection_rows(planned.run_id, watcher, effect, batch, config)
row = run_row(planned, config, Setting(model=..., ...), Measured(effect=effect, detections=detections, ...))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from bounds import Verdict
from experiments.config import ExperimentConfig
from experiments.effects.outcome import Effect
from experiments.passes.baselines import Look
from experiments.passes.taps.corrector import Corrector
from experiments.plan.plan import PlannedRun
from experiments.runs.measured import Measured, Setting
from experiments.tables.schema import DetectionRow, ExperimentResult, PropagationRow, row_of
from fault_injection import Fault, InjectionRecord, bit_field
from fault_injection.locations import LOCATION_TABLE
from fault_injection.numbers.bits import float_format

OUTPUT = "output"
"""The module name in the row of the check of the model's output."""


class Seen(Protocol):
    """The verdicts of detectors on a pass, by ``(detector, layer)``, and the names of the modules, by layer."""

    @property
    def verdicts(self) -> Mapping[tuple[str, int], Verdict]: ...  # noqa: D102

    @property
    def modules(self) -> Mapping[int, str]: ...  # noqa: D102


def detection_rows(
    run_id: str, seen: Seen, effect: Effect | None, batch: Mapping[str, Tensor], config: ExperimentConfig
) -> list[DetectionRow]:
    """Return one row for every detector and layer that was checked.

    The ``finite`` detector also checks the model's output, if the run has one (``effect``): a fault may overflow after
    the last attention layer.
    """
    looks = [
        Look(run_id, name, layer, seen.modules[layer], verdict) for (name, layer), verdict in seen.verdicts.items()
    ]
    if effect is not None and "finite" in config.detect.names():
        rows, broken = batch["input_ids"].numel(), effect.nonfinite_rows
        verdict = Verdict("finite", rows_checked=rows, violations=broken, nonfinite=broken)
        looks.append(Look(run_id, "finite", None, OUTPUT, verdict))
    return [row_of(DetectionRow, look) for look in looks]


def tightest(seen: Seen, layer: int) -> tuple[float, float, float] | None:
    """Return epsilon (s@w) and its bounds in the layer's row that is closest to them; None without such a row."""
    verdict = seen.verdicts.get(("s@w", layer))
    return None if verdict is None else verdict.tightest


def propagation_rows(run_id: str, changes: Mapping[int, float]) -> tuple[PropagationRow, ...]:
    """Return one row for every block; ``changes`` has the relative change of each block's output, by its number."""
    pairs = sorted(changes.items())
    return tuple(PropagationRow(run_id=run_id, layer=number, relative_change=change) for number, change in pairs)


def run_row(
    planned: PlannedRun,
    config: ExperimentConfig,
    setting: Setting,
    measured: Measured,
    sampling_weight: float = 1.0,
) -> ExperimentResult:
    """Return the row of ``runs.csv``; see ``ExperimentResult`` for what each column means."""
    return row_of(ExperimentResult, RunFacts(planned, config, setting, measured, sampling_weight))


@dataclass(frozen=True)
class RunFacts:
    """All facts about a run; each column of ``runs.csv`` names the attribute that it holds.

    Facts that no other object has are properties here.
    """

    planned: PlannedRun
    config: ExperimentConfig
    setting: Setting
    measured: Measured
    sampling_weight: float = 1.0

    layer_type: ClassVar = "attn"

    @cached_property
    def first(self) -> Fault:
        """The fault of the first injected layer."""
        return self.measured.faults[0]

    @cached_property
    def hit(self) -> InjectionRecord | None:
        """What the first fault hit; None if it hit nothing."""
        return next((record for record in self.measured.records if record.fault is self.first), None)

    @property
    def index(self) -> Index | None:
        """The first element that was hit."""
        return None if self.first.index is None else Index(*self.first.index)

    @property
    def layers(self) -> str:
        """All injected layers."""
        return ";".join(str(fault.layer) for fault in self.measured.faults)

    @property
    def layer_depth(self) -> str:
        """The third of the model that contains the first injected layer."""
        return layer_depth(self.first.layer, self.setting.depth)

    @property
    def bit(self) -> int | None:
        """The bit, if the fault has exactly one."""
        return self.first.bits[0] if len(self.first.bits) == 1 else None

    @property
    def bits(self) -> str | None:
        """All bits."""
        return ";".join(str(bit) for bit in self.first.bits) or None

    @property
    def bit_field(self) -> str | None:
        """The field of all bits, or ``mixed`` if they lie in several."""
        fields = {bit_field(self.hit.dtype, bit) for bit in self.first.bits} if self.hit is not None else set()
        return None if not fields else fields.pop() if len(fields) == 1 else "mixed"

    @property
    def bits_before(self) -> str | None:
        """The bit pattern of the element before the fault."""
        return None if self.hit is None else _pattern(self.hit, self.hit.bits_before)

    @property
    def bits_after(self) -> str | None:
        """The bit pattern of the element after the fault."""
        return None if self.hit is None else _pattern(self.hit, self.hit.bits_after)

    @property
    def hits(self) -> int:
        """The number of elements of all faults."""
        return sum(len(fault.elements) for fault in self.measured.faults)

    @property
    def effective(self) -> bool:
        """Whether a fault changed a bit that something reads."""
        effect = self.measured.effect
        masked_away = effect is not None and effect.outcome == "masked"
        records = self.measured.records
        return any(record.changed and not (record.fault.masked_position and masked_away) for record in records)

    @property
    def scope(self) -> str:
        """How far the fault was propagated."""
        return "full" if self.measured.local is None else "site"

    @property
    def nonfinite(self) -> bool | None:
        """Whether the outcome is ``nonfinite``; None without one."""
        return None if self.measured.effect is None else self.measured.effect.outcome == "nonfinite"

    @cached_property
    def alarms(self) -> Alarms:
        """The verdicts of the detectors, in the words of the columns."""
        return Alarms.of(self.measured.detections, self.first.layer)

    @property
    def epsilon(self) -> Epsilon | None:
        """Epsilon in its tightest row; None if no detector computed it."""
        return None if self.measured.tightest is None else Epsilon(*self.measured.tightest)

    @property
    def certificate(self) -> float | None:
        """The certificate, if it is valid: no alarm, and one hit element in a tensor that has a check (T26)."""
        here = [fault for fault in self.measured.faults if fault.layer == self.first.layer]
        several = sum(len(fault.elements) for fault in here) > 1
        covered = all(LOCATION_TABLE[fault.location].closed_form for fault in here)
        return self.measured.certificate if covered and not several and not self.alarms.violation_detected else None

    @cached_property
    def correction(self) -> Correction | None:
        """The result of correction; None if the configuration does not request it."""
        corrector = self.measured.corrector
        return None if corrector is None else Correction.of(self.measured.faults, corrector)


class Index(NamedTuple):
    """The place of an element."""

    batch: int
    head: int
    row: int
    column: int


class Epsilon(NamedTuple):
    """Epsilon (s@w) of one row, and its bounds."""

    value: float
    lower: float
    upper: float


def _pattern(hit: InjectionRecord, bits: int | None) -> str | None:
    return None if bits is None else f"0x{bits:0{float_format(hit.dtype).width // 4}x}"


def layer_depth(layer: int, depth: int) -> str:
    """Return ``early``, ``mid`` or ``late`` by the centre of the layer: thirds of ``(layer + 1/2) / depth``.

    >>> [layer_depth(i, 4) for i in range(4)]
    ['early', 'mid', 'mid', 'late']
    """
    centre = (layer + 0.5) / depth
    return "early" if centre < 1 / 3 else "mid" if centre < 2 / 3 else "late"


@dataclass(frozen=True)
class Alarms:
    """The verdicts of the detectors on a run, in the words of the columns."""

    violation_detected: bool
    detectors: str
    num_violations: int
    oracle_detected: bool | None
    oracle_detectors: str
    unproved_detectors: str
    epsilon_margin: float | None

    @classmethod
    def of(cls, detections: Sequence[DetectionRow], layer: int) -> Alarms:
        """Return the alarms in the rows of a run; the margin is that of the first injected layer."""
        fired = [row for row in detections if row.violations > 0]
        proved = [row for row in fired if row.online and row.proved]
        oracle = [row for row in fired if not row.online]
        margins = (row.smallest_margin for row in detections if (row.detector, row.layer) == ("s@w", layer))
        return cls(
            violation_detected=bool(proved),
            detectors=_names(proved),
            num_violations=sum(row.violations for row in proved),
            oracle_detected=bool(oracle) if any(not row.online for row in detections) else None,
            oracle_detectors=_names(oracle),
            unproved_detectors=_names([row for row in fired if row.online and not row.proved]),
            epsilon_margin=next(margins, None),
        )


def _names(rows: Sequence[DetectionRow]) -> str:
    return ";".join(dict.fromkeys(row.detector for row in rows))


@dataclass(frozen=True)
class Correction:
    """The result of correction in a pass.

    Attributes:
        repairs: the number of elements that it replaced.
        miscorrections: how many of them no fault had hit.
        unrepaired: the number of errors that it saw and left.
        seconds: the time it took.
    """

    repairs: int
    miscorrections: int
    unrepaired: int
    seconds: float

    @classmethod
    def of(cls, faults: Sequence[Fault], corrector: Corrector) -> Correction:
        """Return the result of a pass: compare its repairs with its faults."""
        hit = {
            (fault.layer, fault.call, fault.location, *map(int, np.unravel_index(element.flat, fault.shape)))
            for fault in faults
            for element in fault.elements
        }
        done = [repair for repair in corrector.repairs if repair.status == "repaired"]
        wrong = sum((one.layer, one.call, one.location, *one.index) not in hit for one in done)
        return cls(len(done), wrong, len(corrector.repairs) - len(done), corrector.seconds)
