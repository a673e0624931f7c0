"""Which detectors look at which layers of a pass with faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from micro_campaign import micro_gpt2

from bounds import AttentionState, Detector, Verdict, get_detector
from experiments.passes.baseline import Baseline, compute_baseline
from experiments.passes.subject import Subject
from experiments.passes.taps.watcher import Watcher
from fault_injection import Fault, FaultSpec, draw_fault, injected

BATCH = {"input_ids": torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))}
PROVED = ("W_sum", "P_q", "s@w")


class Looking(Detector):
    """No theorem rules out its false positives; it notes what it was shown."""

    name, needs, statement, cost = "looking", frozenset({"out"}), "nothing", "1"
    proved = False
    seen: ClassVar[list[tuple[int | None, bool]]] = []

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        self.seen.append((state.layer, state.projected is not None))
        return Verdict(self.name, rows_checked=1)


def detectors(*names: str) -> list[Detector]:
    return [Looking() if name == "looking" else get_detector(name) for name in names]


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with Subject(micro_gpt2(layers=4), "causal") as subject:
        yield subject


@pytest.fixture(scope="module")
def baseline(subject: Subject) -> Baseline:
    return compute_baseline(subject, BATCH, detectors(*PROVED, "finite", "oracle_s@w"))


def faults(baseline: Baseline, layers: tuple[int, ...], bit: int = 30) -> list[Fault]:
    random = np.random.Generator(np.random.Philox(key=3))
    return [draw_fault(FaultSpec("weights", bits=(bit,)), baseline.sites[layer, "weights"], random) for layer in layers]


def watched(subject: Subject, baseline: Baseline, names: tuple[str, ...], hit: tuple[int, ...], **more: Any) -> Watcher:
    watcher = Watcher(detectors(*names), baseline.situation, layers=frozenset(range(min(hit), 4)), **more)
    watcher.origins = lambda core: {}
    with injected(subject.model, faults(baseline, hit)):
        subject.forward(BATCH, watcher)
    return watcher


@pytest.mark.parametrize("hit", [(1,), (0, 2), (3,)], ids=str)
def test_behind_the_fault_only_those_look_that_can_fire_there(
    subject: Subject, baseline: Baseline, hit: tuple[int, ...]
) -> None:
    names = (*PROVED, "finite", "looking", "oracle_s@w")
    everywhere = watched(subject, baseline, names, hit)
    assert set(everywhere.verdicts) == {(name, layer) for name in names for layer in range(min(hit), 4)}
    at_faults = watched(subject, baseline, names, hit, injected=frozenset(hit))
    expected = {(name, layer) for name in names for layer in hit}
    expected |= {(name, layer) for name in ("finite", "looking") for layer in range(min(hit), 4)}
    assert set(at_faults.verdicts) == expected
    for key in expected:
        assert repr(at_faults.verdicts[key]) == repr(everywhere.verdicts[key])
    assert any(verdict.fired for verdict in at_faults.verdicts.values())


def test_where_nobody_looks_no_tensor_is_asked_for(subject: Subject, baseline: Baseline) -> None:
    names = ("W_sum", "oracle_s@w")
    watcher = watched(subject, baseline, names, (1, 2), injected=frozenset({1, 2}))
    assert watcher.layers == {1, 2}
    assert set(watcher.modules) == {1, 2}
    assert set(watcher.verdicts) == {(name, layer) for name in names for layer in (1, 2)}
    assert Watcher(detectors(*names), baseline.situation, injected=frozenset({2})).layers == {2}
    assert Watcher(detectors(*names), baseline.situation).layers is None
    assert Watcher(detectors("finite"), baseline.situation, injected=frozenset({2})).layers is None


@pytest.mark.parametrize("needed", [False, True])
def test_where_operands_come_from_is_asked_where_somebody_reads_it(
    subject: Subject, baseline: Baseline, monkeypatch: pytest.MonkeyPatch, needed: bool
) -> None:
    if needed:
        monkeypatch.setattr(Looking, "needs", frozenset({"out", "projected"}))
    Looking.seen.clear()
    watched(subject, baseline, ("looking", "P_q"), (1,), injected=frozenset({1}))
    assert Looking.seen == [(1, True), (2, needed), (3, needed)]


def test_proved_detectors_are_silent_behind_a_fault_that_keeps_the_pass_finite(
    subject: Subject, baseline: Baseline
) -> None:
    """What is left out by looking at the injected layer alone."""
    for bit in (22, 26, 29):
        watcher = Watcher(detectors("W_sum", "W_elem", "s@w", "O_row"), baseline.situation)
        with injected(subject.model, faults(baseline, (1,), bit)):
            subject.forward(BATCH, watcher)
        behind = [verdict for (_, layer), verdict in watcher.verdicts.items() if layer != 1]
        assert len(behind) == 12
        assert not any(verdict.fired for verdict in behind)
