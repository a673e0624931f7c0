"""Correction inside a pass: on every architecture nothing to do without a fault, and the fault undone with one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import ZOO, logits_of

from bounds import get_detector
from bounds.effects import correction
from bounds.effects.correction import Repair
from experiments.config import ModelConfig
from experiments.effects.loss import Evaluation
from experiments.errors import CheckRefusedError
from experiments.inputs.models import load_model
from experiments.passes.baseline import Baseline, compute_baseline
from experiments.passes.gate import check_clean_correction
from experiments.passes.subject import Subject
from experiments.passes.taps.corrector import Corrector
from experiments.passes.taps.watcher import Watcher
from experiments.runs.rows import Correction
from fault_injection import (
    LOCATIONS,
    ElementIndex,
    Fault,
    FaultSpec,
    SiteSurvey,
    attention_cores,
    draw_fault,
    injected,
    patched,
    tapped,
)
from fault_injection.numbers.model_outputs import bitwise_equal

CORRECTED = ("scores", "weights", "out")
TEXT = b"The following table summarizes the operator precedence in Python"
DTYPES = [torch.float32, torch.bfloat16]
EXPONENT = {torch.float32: range(23, 31), torch.bfloat16: range(7, 15)}


def generator(key: int = 7) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


# --------------------------------------------------------------------------------------------------------- zoo


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_T19_a_clean_pass_stays_bitwise_as_it_was(name: str, dtype: torch.dtype, zoo_model: Any) -> None:
    model = zoo_model(name, dtype)
    inputs = ZOO[name].inputs(model)
    with patched(model, example_inputs=inputs), torch.no_grad():
        survey = SiteSurvey(dtype)
        with tapped(model, survey):
            model(**inputs)
        plain = logits_of(model(**inputs))
        corrector = Corrector(survey.visible)
        with tapped(model, corrector):
            corrected = logits_of(model(**inputs))
    assert corrector.repairs == []
    assert corrector.seconds > 0
    assert bitwise_equal(plain, corrected)


@pytest.mark.parametrize("name", ZOO)
def test_T18_an_exponent_flip_is_undone_in_every_architecture(name: str, zoo_model: Any) -> None:
    model = zoo_model(name)
    inputs = ZOO[name].inputs(model)
    with patched(model, example_inputs=inputs), torch.no_grad():
        survey = SiteSurvey(torch.float32)
        with tapped(model, survey):
            model(**inputs)
        plain = logits_of(model(**inputs))
        for number, location in enumerate(CORRECTED):
            layer = attention_cores(model)[-1].index
            fault = draw_fault(FaultSpec(location, bits=(30,)), survey.site(layer, location), generator(number))
            corrector = Corrector(survey.visible, layers={layer})
            with injected(model, [fault]), tapped(model, corrector):
                corrected = logits_of(model(**inputs))
            assert [(r.status, r.location, r.layer, r.call, r.index) for r in corrector.repairs] == [
                ("repaired", location, layer, 0, fault.index)
            ]
            torch.testing.assert_close(corrected, plain, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- the reference model


class Reference:
    """The reference model in one dtype, with the fault-free pass of 64 tokens."""

    def __init__(self, dtype: torch.dtype) -> None:
        loaded = load_model(ModelConfig(path="reference", device="cpu"))
        self.dtype = dtype
        self.subject = Subject(loaded.model.to(dtype), "causal")
        self.batch = self.subject.to_device({"input_ids": torch.tensor([[byte + 3 for byte in TEXT]])})
        self.baseline: Baseline = compute_baseline(self.subject, self.batch, [])

    def draw(self, location: str, bits: Any, random: np.random.Generator, **index: int) -> Fault:
        layer = int(random.integers(len(self.subject.cores)))
        return draw_fault(
            FaultSpec(location, bits=bits, index=ElementIndex(**index)), self.baseline.sites[layer, location], random
        )

    def corrected(self, *faults: Fault) -> tuple[Evaluation, Corrector]:
        corrector = Corrector(self.baseline.situation.visible)
        with injected(self.subject.model, faults):
            return self.subject.forward(self.batch, corrector), corrector

    def moved(self, evaluation: Evaluation) -> float:
        assert evaluation.loss is not None
        assert self.baseline.evaluation.loss is not None
        return abs(evaluation.loss - self.baseline.evaluation.loss)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def reference(request: pytest.FixtureRequest) -> Iterator[Reference]:
    torch.set_num_threads(1)
    made = Reference(request.param)
    with made.subject:
        yield made


@pytest.mark.parametrize("location", CORRECTED)
def test_T18_the_loss_comes_back(reference: Reference, location: str) -> None:
    assert len(TEXT) == 64
    random, repaired, bitwise = generator(), 0, 0
    width = 8 * reference.dtype.itemsize
    for number in range(64):
        fault = reference.draw(location, (width - 1 - number % (width // 2),), random)
        evaluation, corrector = reference.corrected(fault)
        if not corrector.repairs:  # below every threshold
            assert reference.moved(evaluation) < (1e-5 if reference.dtype == torch.float32 else 0.02)
            continue
        (found,) = corrector.repairs
        assert (found.status, found.location, found.layer, found.index) == (
            "repaired",
            location,
            fault.layer,
            fault.index,
        )
        repaired += 1
        bitwise += bitwise_equal(evaluation.output, reference.baseline.evaluation.output)
        assert reference.moved(evaluation) < (2e-6 if reference.dtype == torch.float32 else 2e-3)
    assert repaired >= 32
    if reference.dtype == torch.bfloat16:
        assert bitwise >= 0.95 * repaired


@pytest.mark.parametrize("location", ["q", "k", "v"])
def test_operands_are_taken_as_they_are(reference: Reference, location: str) -> None:
    for bit in EXPONENT[reference.dtype]:
        evaluation, corrector = reference.corrected(reference.draw(location, (bit,), generator(bit)))
        # The top bit makes numbers whose products overflow: errors that are seen, and none of the product's making.
        assert {found.status for found in corrector.repairs} <= {"unrepaired"}
        if bit < max(EXPONENT[reference.dtype]):
            assert corrector.repairs == []
    assert reference.moved(evaluation) != 0


def test_two_faults_in_two_heads_are_both_undone(reference: Reference) -> None:
    bit = (max(EXPONENT[reference.dtype]),)
    for location in CORRECTED:
        faults = [reference.draw(location, bit, generator(3), head=head) for head in (0, 2)]
        evaluation, corrector = reference.corrected(*faults)
        assert [found.status for found in corrector.repairs] == ["repaired", "repaired"]
        assert {found.index for found in corrector.repairs} == {fault.index for fault in faults}
        assert reference.moved(evaluation) < 2e-3


def test_two_faults_in_one_row_are_reported(reference: Reference) -> None:
    bit = (max(EXPONENT[reference.dtype]),)
    for location in CORRECTED:
        faults = [reference.draw(location, bit, generator(3), head=1, row=40, col=col) for col in (5, 9)]
        _, corrector = reference.corrected(*faults)
        assert [(r.status, r.index[:3], r.value_after) for r in corrector.repairs] == [("unrepaired", (0, 1, 40), None)]


def test_every_evaluation_of_a_core_has_its_number(reference: Reference) -> None:
    fault = replace(reference.draw("scores", (max(EXPONENT[reference.dtype]),), generator(4)), call=1)
    visible = reference.baseline.situation.visible
    both = {(layer, number): visible[layer, 0] for layer, _ in visible for number in (0, 1)}
    corrector, model = Corrector(both), reference.subject.model
    with torch.no_grad(), injected(model, [fault]), tapped(model, corrector):
        for _ in range(2):
            model(**reference.batch)
    assert [(found.call, found.layer, found.index) for found in corrector.repairs] == [(1, fault.layer, fault.index)]


def test_watchers_see_the_fault_that_is_repaired_behind_them(reference: Reference) -> None:
    fault = reference.draw("out", (max(EXPONENT[reference.dtype]),), generator(1))
    situation = reference.baseline.situation
    watcher, corrector = Watcher([get_detector("finite")], situation), Corrector(situation.visible)
    seen: list[float] = []

    class Looking:
        locations, layers = frozenset({"out"}), frozenset({fault.layer})

        def on(self, location: str, tensor: Tensor, call: Any) -> None:
            seen.append(float(tensor[fault.index]))

    with injected(reference.subject.model, [fault]) as injector:
        evaluation = reference.subject.forward(reference.batch, Looking(), watcher, corrector, Looking())
    (record,), (repair,) = injector.records, corrector.repairs
    assert seen == [record.value_after, repair.value_after]
    assert repair.value_before == record.value_after
    assert reference.moved(evaluation) < 2e-3


# ------------------------------------------------------------------------------------------------------ refusals


def test_reduced_precision_is_refused_by_name(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.passes.taps.corrector.reduced_precision", lambda tensor: "TF32 is on")
    with pytest.raises(CheckRefusedError, match=r"detect.correct: scores of transformer.h.0.attn: TF32 is on"):
        reference.corrected(reference.draw("scores", (14,), generator()))


def test_T19_a_corrector_that_finds_errors_in_a_clean_pass_is_refused(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_clean_correction(reference.subject, reference.batch, reference.baseline)
    real = correction.repair_output

    def imagining(mass: Tensor, value: Tensor, out: Tensor) -> Any:
        wrong = out.clone()
        wrong[0, 1, 2, 3] += 100
        return real(mass, value, wrong)

    monkeypatch.setattr("experiments.passes.taps.corrector.repair_output", imagining)
    with pytest.raises(CheckRefusedError, match=r"4 errors in the fault-free pass, the first in out of layer 0"):
        check_clean_correction(reference.subject, reference.batch, reference.baseline)
    monkeypatch.setattr("experiments.passes.taps.corrector.repair_output", real)
    monkeypatch.setattr(Corrector, "on", lambda self, location, tensor, call: tensor * 1.5)
    with pytest.raises(CheckRefusedError, match="another output when correction looks at it"):
        check_clean_correction(reference.subject, reference.batch, reference.baseline)


# ------------------------------------------------------------------------------------------------------- columns


def test_a_repair_elsewhere_than_at_a_fault_is_a_miscorrection(reference: Reference) -> None:
    bit = (max(EXPONENT[reference.dtype]),)
    faults = [reference.draw("out", bit, generator(n)) for n in range(2)]
    _, corrector = reference.corrected(*faults)

    def counts(faults: list[Fault], repairs: list[Repair]) -> list[int]:
        corrector.repairs = repairs
        done = Correction.of(faults, corrector)
        assert done.seconds == corrector.seconds > 0
        return [done.repairs, done.miscorrections, done.unrepaired]

    right = corrector.repairs
    assert counts(faults, right) == [2, 0, 0]
    assert counts(faults[:1], right) == [2, 1, 0]
    assert counts([], right) == [2, 2, 0]
    row, column = right[0].index[2:]
    for wrong in (
        replace(right[0], location="weights"),
        replace(right[0], call=1),
        replace(right[0], layer=9),
        replace(right[0], index=(0, 3 - right[0].index[1], row, column)),
    ):
        assert counts(faults, [wrong]) == [1, 1, 0]
    left = Repair("out", (0, 0, None, None), "unrepaired", layer=0)
    assert counts(faults, [left, right[1]]) == [1, 0, 1]


def test_every_location_is_corrected_or_an_operand() -> None:
    assert set(LOCATIONS) == {*CORRECTED, "q", "k", "v"}
    assert set(LOCATIONS) < Corrector.locations
