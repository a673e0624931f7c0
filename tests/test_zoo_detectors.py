"""No detector fires on a fault-free pass: every architecture of the zoo, in three dtypes."""

import pytest
import torch
from zoo import ZOO

from bounds import get_detector, list_detectors
from experiments.call_state import Situation
from experiments.watcher import Watcher
from fault_injection import SiteSurvey, attention_cores, check_kv_consistency, patched, tapped

ONLINE = [name for name in list_detectors() if not name.startswith("oracle_")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_no_false_positive_on_a_clean_pass(name, dtype, zoo_model):
    model = zoo_model(name, dtype)
    inputs = ZOO[name].inputs(model)
    with patched(model, example_inputs=inputs), torch.no_grad():
        consistent = check_kv_consistency(model, example_inputs=inputs)
        equal = {core.index: bool(consistent[core.name].kv_equal) for core in attention_cores(model)}
        survey = SiteSurvey(dtype)
        with tapped(model, survey):
            model(**inputs)
        watcher = Watcher([get_detector(detector) for detector in ONLINE], Situation.of(survey, equal))
        with tapped(model, watcher):
            model(**inputs)
    assert len(watcher.modules) == ZOO[name].cores
    for (detector, layer), verdict in watcher.verdicts.items():
        assert verdict.violations == 0, (detector, layer, verdict)
        if detector in ("finite", "s@w"):
            assert verdict.applicable
            assert verdict.rows_checked > 0
        if not verdict.applicable:
            assert verdict.reason
