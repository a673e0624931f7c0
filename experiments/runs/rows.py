"""Turn what a run measured into the rows of the result files.

    detections = detection_rows(planned.run_id, watcher, effect, batch, config)
    row = run_row(planned, config, Setting(model=..., ...), Measured(effect=effect, detections=detections, ...))

Public names: ``run_row``, ``detection_rows``, ``tightest``, ``Seen``, ``clean_rows``,
``propagation_rows``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from bounds import Verdict, get_detector
from bounds.registry import is_oracle
from experiments.config import ExperimentConfig
from experiments.effects.outcome import Effect
from experiments.passes.taps.corrector import Corrector
from experiments.plan.plan import PlannedRun
from experiments.runs.measured import Measured, Setting
from experiments.tables.schema import DetectionRow, ExperimentResult, PropagationRow
from fault_injection import Fault, InjectionRecord, bit_field
from fault_injection.numbers.bits import float_format

OUTPUT = "output"
"""The module name of the check of the model's own output."""


class Seen(Protocol):
    """What detectors said of a pass: verdicts by ``(detector, layer)``, and the modules' names by layer."""

    @property
    def verdicts(self) -> Mapping[tuple[str, int], Verdict]: ...  # noqa: D102

    @property
    def modules(self) -> Mapping[int, str]: ...  # noqa: D102


def detection_rows(
    run_id: str, seen: Seen, effect: Effect | None, batch: Mapping[str, Tensor], config: ExperimentConfig
) -> list[DetectionRow]:
    """Return one row for every detector and layer that was checked.

    The ``finite`` check also looks at the model's output, where there is one (``effect``): a fault may overflow behind
    the last attention layer.
    """
    rows = [
        _detection_row(run_id, name, layer, seen.modules[layer], verdict)
        for (name, layer), verdict in seen.verdicts.items()
    ]
    if effect is not None and "finite" in config.detect.names():
        rows.append(
            DetectionRow(
                run_id=run_id,
                detector="finite",
                online=True,
                proved=True,
                layer=None,
                module=OUTPUT,
                applicable=True,
                reason=None,
                rows_checked=batch["input_ids"].numel(),
                violations=effect.nonfinite_rows,
                nonfinite=effect.nonfinite_rows,
                largest_ratio=None,
                smallest_margin=None,
            )
        )
    return rows


def _detection_row(run_id: str, name: str, layer: int, module: str, verdict: Verdict) -> DetectionRow:
    return DetectionRow(
        run_id=run_id,
        detector=name,
        online=not is_oracle(name),
        proved=get_detector(name).proved,
        layer=layer,
        module=module,
        applicable=verdict.applicable,
        reason=verdict.reason,
        rows_checked=verdict.rows_checked,
        violations=verdict.violations,
        nonfinite=verdict.nonfinite,
        largest_ratio=verdict.largest_ratio,
        smallest_margin=verdict.smallest_margin,
    )


def tightest(seen: Seen, layer: int) -> tuple[float, float, float] | None:
    """Return epsilon (s@w) and its bounds in the row of a layer that is closest to them; None if nobody looked."""
    verdict = seen.verdicts.get(("s@w", layer))
    return None if verdict is None else verdict.tightest


def propagation_rows(run_id: str, changes: Mapping[int, float]) -> tuple[PropagationRow, ...]:
    """Return one row for every block, given by number how far what it returns moved."""
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
    first, metrics = measured.faults[0], measured.metrics
    epsilon = measured.tightest or (None, None, None)
    return ExperimentResult(
        run_id=planned.run_id,
        repeat=planned.repeat,
        seed=config.seed,
        model=setting.model,
        dtype=setting.dtype,
        device=setting.device,
        source=setting.source,
        batch_index=measured.batch_index,
        layer_type="attn",
        layer_depth=layer_depth(first.layer, setting.depth),
        location=config.fault.location,
        kind=config.fault.kind,
        **_site_columns(measured.faults, measured.records),
        effective=_effective(measured),
        fault_id=measured.fault_id,
        sampling_weight=sampling_weight,
        **_effect_columns(measured),
        **_detection_columns(measured.detections, first.layer),
        epsilon=epsilon[0],
        epsilon_lower=epsilon[1],
        epsilon_upper=epsilon[2],
        certificate=_certificate(measured.certificate, measured.faults, measured.detections),
        **correction_columns(measured.faults, measured.corrector),
        baseline_seconds=metrics.baseline_forward_time,
        injection_seconds=measured.injection_seconds,
        bounds_seconds=metrics.bounds_computation_time,
        detection_seconds=metrics.violation_detection_time,
        total_seconds=metrics.total_time,
        peak_memory_mb=metrics.peak_memory_mb,
        attention_flops=metrics.attention_flops,
        bounds_flops=metrics.bounds_flops,
        execution=measured.execution,
        hits=sum(len(fault.elements) for fault in measured.faults),
    )


def _effective(measured: Measured) -> bool:
    masked_away = measured.effect is not None and measured.effect.outcome == "masked"
    return any(record.changed and not (record.fault.masked_position and masked_away) for record in measured.records)


def _effect_columns(measured: Measured) -> dict[str, Any]:
    effect, local = measured.effect, measured.local
    return {
        "scope": "full" if local is None else "site",
        "local_change": None if local is None else local.relative,
        "local_max": None if local is None else local.largest,
        "baseline_loss": measured.baseline_loss,
        "injected_loss": None if effect is None else effect.injected_loss,
        "loss_diff": None if effect is None else effect.loss_diff,
        "relative_change": None if effect is None else effect.relative_change,
        "kl_mean": None if effect is None else effect.kl_mean,
        "top1_changed": None if effect is None else effect.top1_changed,
        "nonfinite": None if effect is None else effect.outcome == "nonfinite",
        "outcome": None if effect is None else effect.outcome,
    }


def _certificate(
    certificate: float | None, faults: Sequence[Fault], detections: Sequence[DetectionRow]
) -> float | None:
    alarm = any(row.violations and row.online and row.proved for row in detections)
    # T26 is about one element.
    several = sum(len(fault.elements) for fault in faults if fault.layer == faults[0].layer) > 1
    return None if alarm or several else certificate


def layer_depth(layer: int, depth: int) -> str:
    """Return ``early``, ``mid`` or ``late`` by the centre of the layer: thirds of ``(layer + 1/2) / depth``.

    >>> [layer_depth(i, 4) for i in range(4)]
    ['early', 'mid', 'mid', 'late']
    """
    centre = (layer + 0.5) / depth
    return "early" if centre < 1 / 3 else "mid" if centre < 2 / 3 else "late"


def _site_columns(faults: Sequence[Fault], records: Sequence[InjectionRecord]) -> dict[str, Any]:
    first = faults[0]
    index = first.index or (None, None, None, None)
    hit = next((record for record in records if record.fault is first), None)
    found: dict[str, Any] = dict(zip(("index_batch", "index_head", "index_row", "index_col"), index, strict=True))
    found |= {"layer": first.layer, "module": first.module, "masked_position": first.masked_position}
    found["layers"] = ";".join(str(fault.layer) for fault in faults)
    bits = first.bits
    fields = {bit_field(hit.dtype, bit) for bit in bits} if hit is not None else set()
    found["bit"] = bits[0] if len(bits) == 1 else None
    found["bits"] = ";".join(str(bit) for bit in bits) or None
    found["bit_field"] = None if not fields else fields.pop() if len(fields) == 1 else "mixed"
    if hit is not None:
        digits = float_format(hit.dtype).width // 4
        found["value_before"], found["value_after"] = hit.value_before, hit.value_after
        for name, pattern in (("bits_before", hit.bits_before), ("bits_after", hit.bits_after)):
            found[name] = None if pattern is None else f"0x{pattern:0{digits}x}"
    return found


def _detection_columns(detections: Sequence[DetectionRow], layer: int) -> dict[str, Any]:
    fired = [row for row in detections if row.violations > 0]
    proved = [row for row in fired if row.online and row.proved]
    online = list(dict.fromkeys(row.detector for row in proved))
    oracle = list(dict.fromkeys(row.detector for row in fired if not row.online))
    has_oracle = any(not row.online for row in detections)
    margin = next((row.smallest_margin for row in detections if (row.detector, row.layer) == ("s@w", layer)), None)
    return {
        "violation_detected": bool(online),
        "detectors": ";".join(online),
        "num_violations": sum(row.violations for row in proved),
        "oracle_detected": bool(oracle) if has_oracle else None,
        "oracle_detectors": ";".join(oracle),
        "unproved_detectors": ";".join(dict.fromkeys(row.detector for row in fired if row.online and not row.proved)),
        "epsilon_margin": margin,
    }


def correction_columns(faults: Sequence[Fault], corrector: Corrector | None) -> dict[str, Any]:
    """Return what correction did in a pass with ``faults``, in numbers; None for each if it was not asked for.

    Keys: ``repairs``, ``miscorrections`` (repairs of an element that none of the faults hit), ``unrepaired`` and
    ``correction_seconds``.
    """
    if corrector is None:
        return dict.fromkeys(("repairs", "miscorrections", "unrepaired", "correction_seconds"))
    hit = {
        (fault.layer, fault.call, fault.location, *map(int, np.unravel_index(element.flat, fault.shape)))
        for fault in faults
        for element in fault.elements
    }
    done = [repair for repair in corrector.repairs if repair.status == "repaired"]
    return {
        "repairs": len(done),
        "miscorrections": sum((one.layer, one.call, one.location, *one.index) not in hit for one in done),
        "unrepaired": len(corrector.repairs) - len(done),
        "correction_seconds": corrector.seconds,
    }
