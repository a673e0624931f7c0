"""A campaign with ``detect.correct``: the outcome is that after repair, and every repair is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro_campaign import micro_gpt2

from experiments.config import DetectConfig, ExperimentConfig, FaultConfig
from experiments.runner import CompleteExperimentRunner

BATCHES = [{"input_ids": torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(n))} for n in range(2)]


def campaign(correct: bool, **more: Any) -> list[Any]:
    detect = DetectConfig(["finite", "s@w"], correct=correct)
    config = ExperimentConfig(num_runs=8, detect=detect, **more)
    return CompleteExperimentRunner(config).run_all(micro_gpt2(), BATCHES)


@pytest.mark.parametrize("location", ["scores", "weights", "out"])
def test_a_campaign_reports_the_outcome_after_repair(location: str) -> None:
    before = campaign(False, injection_location=location, injection_bit=30)
    after = campaign(True, injection_location=location, injection_bit=30)
    assert [result.fault_id for result in before] == [result.fault_id for result in after]
    for plain, corrected in zip(before, after, strict=True):
        assert (plain.repairs, plain.miscorrections, plain.unrepaired, plain.correction_seconds) == (None,) * 4
        assert (corrected.repairs, corrected.miscorrections, corrected.unrepaired) == (1, 0, 0)
        assert corrected.correction_seconds > 0
        assert corrected.injection_seconds > 0
        assert corrected.outcome in ("masked", "benign")
        assert abs(corrected.loss_diff) < 1e-5
        assert repr(corrected.value_after) == repr(plain.value_after)
        assert corrected.effective
    assert any(result.outcome in ("critical", "nonfinite") for result in before)


def test_a_campaign_says_what_it_could_not_repair() -> None:
    for result in campaign(True, injection_location="q", injection_bit=26):
        assert (result.repairs, result.miscorrections, result.unrepaired) == (0, 0, 0)
    fault = FaultConfig(location="scores", kind="bit_error_rate", rate=0.01, bit=None)
    results = campaign(True, fault=fault)
    assert sum(result.unrepaired for result in results) > 0
    assert all(result.miscorrections == 0 for result in results)
