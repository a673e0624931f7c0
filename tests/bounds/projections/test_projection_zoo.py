"""The detectors of projections and ranges are silent on every architecture of the zoo, and apply where they can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from projected_states import states_of
from zoo import zoo_parameters

import bounds.ranges.range_detectors  # noqa: F401
from bounds import get_detector
from bounds.projections.projection_detectors import ProjectionDetector
from fault_injection.operands.finding import operand_sources

NAMES = [f"{family}_{operand}" for family in ("P", "P4", "rng") for operand in "qkv"] + ["s_stat"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("entry", zoo_parameters())
def test_no_false_positive_on_any_architecture(entry: Any, dtype: torch.dtype, zoo_model: Any) -> None:
    model = zoo_model(entry.name, dtype)
    inputs = entry.inputs(model)
    sources = operand_sources(model, inputs)
    detectors = [get_detector(name) for name in NAMES]
    for detector in detectors:
        detector.prepare(model)
    for state in states_of(model, inputs):
        for detector in detectors:
            verdict = detector.check(state)
            assert verdict.violations == 0, verdict
            if isinstance(detector, ProjectionDetector):
                # It applies exactly where the origin is known; test_operands says where that is.
                assert verdict.applicable != isinstance(sources[state.name][detector.operand], str)
            assert verdict.applicable == (verdict.rows_checked > 0)
