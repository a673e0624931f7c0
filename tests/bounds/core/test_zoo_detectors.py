"""No detector fires on a fault-free pass: every architecture of the zoo, in three dtypes."""

import pytest
import torch
from zoo import ZOO

from bounds import get_detector, list_detectors
from experiments.passes.taps.call_state import Situation
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import SiteSurvey, attention_cores, check_kv_consistency, patched, tapped
from fault_injection.operands.finding import operand_sources

ALWAYS = ("finite", "s@w", "S_row", "S_col", "W_sum", "W_simplex", "W_elem", "O_row", "O_col", "O_hull")
PROVED = [name for name in list_detectors() if get_detector(name).proved and not get_detector(name).oracle]


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
        operand_sources(model, inputs)
        detectors = [get_detector(detector) for detector in PROVED]
        for detector in detectors:
            detector.prepare(model)
        with recorded_origins(model, detectors) as origins:
            watcher = Watcher(detectors, Situation.of(survey, equal), origins=origins)
            with tapped(model, watcher):
                model(**inputs)
    assert len(watcher.modules) == ZOO[name].cores
    for (detector, layer), verdict in watcher.verdicts.items():
        assert verdict.violations == 0, (detector, layer, verdict)
        if detector in ALWAYS:
            assert verdict.applicable
            assert verdict.rows_checked > 0
        if not verdict.applicable:
            assert verdict.reason
