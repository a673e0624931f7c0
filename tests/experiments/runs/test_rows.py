"""The row of a run, from what its execution measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bounds import Verdict
from experiments.config import DetectConfig, ExperimentConfig
from experiments.effects.local_change import LocalChange
from experiments.effects.outcome import Effect
from experiments.plan.plan import make_plan
from experiments.runs.measured import Measured, Setting
from experiments.runs.rows import detection_rows, run_row
from experiments.tables.schema import ExperimentResult, cells, columns
from fault_injection import Fault, InjectionRecord
from fault_injection.faults.fault import Element
from monitoring import PerformanceMetrics

BEHIND = ("injected_loss", "loss_diff", "relative_change", "kl_mean", "top1_changed", "nonfinite", "outcome")
CONFIG = ExperimentConfig(detect=DetectConfig(["finite", "s@w"]), injection_bit=30)
(PLANNED,) = make_plan(CONFIG).runs
SETTING = Setting(model="m", source="pydoc", dtype="float32", device="cpu", depth=4)
MASKED = Effect("masked", 1.5, 0.0, 0.0, 0.0, 0, 0)
BATCH = {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}


def fault(layer: int = 1, masked_position: bool = False) -> Fault:
    return Fault(
        "scores", layer, f"h.{layer}", "bitflip", "float32", (1, 2, 12, 12), (0, 1, 3, 2), (30,),
        (Element(182, -1, 1 << 30),), masked_position,
    )  # fmt: skip


def measured(*faults: Fault, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "batch_index": 3, "faults": faults, "fault_id": "f" * 16,
        "records": [InjectionRecord(f, 1.0, 2.0, 0x3F800000, 0x40000000, 1, torch.float32) for f in faults],
        "baseline_loss": 1.5, "effect": Effect("critical", 1.75, 0.25, 0.1, 0.2, 1, 0),
        "detections": (), "metrics": PerformanceMetrics(), "injection_seconds": 0.5,
    }  # fmt: skip
    return Measured(**{**values, **changes})


def row(given: Measured) -> ExperimentResult:
    return run_row(PLANNED, CONFIG, SETTING, given)


def test_a_run_that_was_propagated() -> None:
    result = row(measured(fault(1), fault(3)))
    assert [getattr(result, name) for name in BEHIND] == [1.75, 0.25, 0.1, 0.2, 1, False, "critical"]
    assert (result.scope, result.local_change, result.local_max) == ("full", None, None)
    assert (result.layer, result.layers, result.module, result.layer_depth) == (1, "1;3", "h.1", "mid")
    assert (result.hits, result.bit, result.index_row, result.execution) == (2, 30, 3, "plain")
    assert (result.bits_before, result.bits_after) == ("0x3f800000", "0x40000000")
    assert (result.effective, result.baseline_loss, result.injection_seconds) == (True, 1.5, 0.5)


def test_a_run_that_stayed_in_its_layer_has_no_outcome() -> None:
    local = LocalChange(0.5, float("inf"))
    result = row(measured(fault(), effect=None, local=local, execution="fast"))
    assert (result.scope, result.local_change, result.local_max) == ("site", 0.5, float("inf"))
    assert {getattr(result, name) for name in BEHIND} == {None}
    written = dict(zip(columns(ExperimentResult), cells(result), strict=True))
    assert {written[name] for name in BEHIND} == {""}
    assert (result.baseline_loss, result.effective, result.execution) == (1.5, True, "fast")


def test_a_run_that_changes_nothing_in_its_layer_is_masked() -> None:
    local = LocalChange(0.0, 0.0)
    result = row(measured(fault(), effect=MASKED, local=local))
    assert [getattr(result, name) for name in BEHIND] == [1.5, 0.0, 0.0, 0.0, 0, False, "masked"]
    assert (result.scope, result.local_change, result.local_max) == ("site", 0.0, 0.0)


def test_a_run_without_any_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"effect: got None, allowed only for a run with a local effect"):
        measured(fault(), effect=None)


@pytest.mark.parametrize(
    ("effect", "masked_position", "effective"),
    [(MASKED, False, True), (MASKED, True, False), (None, True, True), (replace(MASKED, outcome="benign"), True, True)],
)
def test_a_fault_at_a_hidden_key_is_effective_if_anything_came_of_it(
    effect: Effect | None, masked_position: bool, effective: bool
) -> None:
    hit = fault(masked_position=masked_position)
    assert row(measured(hit, effect=effect, local=LocalChange(0.0, 0.0))).effective is effective
    record = replace(measured(hit).records[0], changed=0)
    assert not row(measured(hit, records=[record])).effective


def test_only_an_output_that_was_computed_is_looked_at() -> None:
    seen = SimpleNamespace(verdicts={("s@w", 1): Verdict("s@w", rows_checked=4, violations=2)}, modules={1: "h.1"})

    def found(effect: Effect | None, config: ExperimentConfig = CONFIG) -> list[tuple[Any, ...]]:
        rows = detection_rows("x", seen, effect, BATCH, config)
        return [(r.detector, r.layer, r.module, r.rows_checked, r.violations) for r in rows]

    local = ("s@w", 1, "h.1", 4, 2)
    assert found(None) == [local]
    assert found(replace(MASKED, nonfinite_rows=5)) == [local, ("finite", None, "output", 24, 5)]
    assert found(MASKED, CONFIG.with_field("detect.detectors", ["s@w"])) == [local]
