"""Several taps in one pass say what each says alone: no tap sees or clears what another keeps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from micro_campaign import micro_gpt2
from torch import Tensor

from bounds import Detector, get_detector
from experiments.engine.fast.site_verdicts import CleanGroups
from experiments.passes.baseline import Baseline, compute_baseline
from experiments.passes.subject import Subject
from experiments.passes.taps.corrector import Corrector
from experiments.passes.taps.watcher import Watcher
from fault_injection import FaultSpec, Tap, draw_fault, injected

BATCH = {"input_ids": torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(5))}
NAMES = ("S_row", "W_sum", "W_elem", "O_row", "s@w", "oracle_q@o", "finite")


def detectors(*names: str) -> list[Detector]:
    return [get_detector(name) for name in names]


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with Subject(micro_gpt2(layers=3), "causal") as subject:
        yield subject


@pytest.fixture(scope="module")
def baseline(subject: Subject) -> Baseline:
    return compute_baseline(subject, BATCH, detectors(*NAMES))


def watcher(baseline: Baseline) -> Watcher:
    return Watcher(detectors(*NAMES), baseline.situation)


def other_watcher(baseline: Baseline) -> Watcher:
    return Watcher(detectors("W_simplex", "O_col", "comb"), baseline.situation)


def corrector(baseline: Baseline) -> Corrector:
    return Corrector(baseline.situation.visible)


def clean_groups(baseline: Baseline) -> CleanGroups:
    return CleanGroups(detectors(*NAMES), baseline.situation)


HIT = 1


def said(tap: Any) -> str:
    """Return what a tap says up to the layer of the fault: a corrector changes what comes behind."""
    if isinstance(tap, Corrector):
        return repr(tap.repairs)
    verdicts = tap.verdicts if isinstance(tap, Watcher) else tap.whole()
    return repr({key: verdict for key, verdict in verdicts.items() if key[1] <= HIT})


PAIRS: dict[str, tuple[Callable[[Baseline], Tap], ...]] = {
    "two watchers": (watcher, other_watcher),
    "a watcher twice": (watcher, watcher),
    "a watcher and a corrector": (watcher, corrector),
    "a watcher and clean groups": (watcher, clean_groups),
    "all of them": (watcher, clean_groups, other_watcher, corrector),
}


@pytest.mark.parametrize("location", ["q", "scores", "weights", "out"])
@pytest.mark.parametrize("makers", PAIRS.values(), ids=PAIRS)
def test_taps_in_one_pass_say_what_each_says_alone(
    subject: Subject, baseline: Baseline, makers: tuple[Callable[[Baseline], Tap], ...], location: str
) -> None:
    random = np.random.Generator(np.random.Philox(key=3))
    fault = draw_fault(FaultSpec(location, bits=(26,)), baseline.sites[HIT, location], random)

    def run(*taps: Tap) -> Tensor:
        with injected(subject.model, [fault]):
            return subject.forward(BATCH, *taps).output

    together = [make(baseline) for make in makers]
    output = run(*together)
    alone = [make(baseline) for make in makers]
    outputs = [run(tap) for tap in alone]
    assert [said(tap) for tap in together] == [said(tap) for tap in alone]
    # The corrector comes last, and it alone changes the output.
    assert torch.equal(output, outputs[-1])


class Stops:
    """Ends the pass with an exception in the middle of a call."""

    locations = frozenset({"weights"})
    layers = frozenset({1})

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Tensor]] = []

    def on(self, location: str, tensor: Tensor, call: Any) -> None:
        self.seen.append(weakref.ref(tensor))
        raise RuntimeError("the pass ends here")


@pytest.mark.parametrize("make", [watcher, corrector, clean_groups])
def test_a_pass_that_ends_in_a_call_leaves_nothing_in_a_tap(
    subject: Subject, baseline: Baseline, make: Callable[[Baseline], Any]
) -> None:
    tap, stops = make(baseline), Stops()
    with pytest.raises(RuntimeError, match="the pass ends here"):
        subject.forward(BATCH, tap, stops)
    gc.collect()
    assert stops.seen[0]() is None
    assert len(tap._kept) == 0
    subject.forward(BATCH, tap)
    assert len(tap._kept) == 0
