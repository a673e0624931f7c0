"""One pass of an input gives what the separate passes give: its baseline, its verdicts, and what runs begin from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_places import opened_place
from micro_campaign import micro_gpt2
from torch import Tensor

from bounds import AttentionState, Detector, Verdict
from bounds.core.sequences import by_group, groups_joined
from experiments.engine.opened_batch import OpenedBatch, Opening
from experiments.errors import CheckRefusedError
from experiments.passes.baseline import compute_baseline
from experiments.passes.subject import Subject
from monitoring.cache.cached_value import value_digest

BATCHES = [
    {"input_ids": torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(seed))} for seed in (5, 6, 7)
]


def counted(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with every forward pass."""
    passes: list[int] = []
    own = subject.forward

    def forward(*arguments: Any, **keywords: Any) -> Any:
        passes.append(len(passes))
        return own(*arguments, **keywords)

    monkeypatch.setattr(subject, "forward", forward)
    return passes


def test_one_pass_gives_what_three_give(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened_place(micro_gpt2(layers=3), BATCHES) as place:
        subject, batch = place.pairs.context.subject, place.pairs.batches[1]
        detectors = place.pairs.detectors(place.config)
        expected = compute_baseline(subject, batch, detectors)
        apart = OpenedBatch.of(subject, place.chain, batch, expected, detectors)
        assert isinstance(apart, OpenedBatch)

        passes = counted(subject, monkeypatch)
        opening = Opening(subject, place.chain, detectors, by_groups=True)
        baseline = compute_baseline(subject, batch, detectors, seconds=1.0, recorder=opening)
        opened = opening.opened(batch, baseline)
        assert isinstance(opened, OpenedBatch)
        assert len(passes) == 1

        assert torch.equal(baseline.evaluation.output, expected.evaluation.output)
        assert value_digest(baseline.evaluation) == value_digest(expected.evaluation)
        assert list(baseline.verdicts) == list(expected.verdicts)
        assert repr(baseline.verdicts) == repr(expected.verdicts)
        assert value_digest(baseline.situation.baseline) == value_digest(expected.situation.baseline)
        assert value_digest(dict(baseline.situation.visible)) == value_digest(dict(expected.situation.visible))
        assert baseline.situation.kv_equal == expected.situation.kv_equal
        assert baseline.situation.plain_logits == expected.situation.plain_logits
        assert baseline.sites == expected.sites
        assert baseline.forward_seconds == 1.0
        assert opened.differing_verdict(expected) is None
        assert value_digest(opened.rows) == value_digest(apart.rows)
        assert all(torch.equal(*pair) for pair in zip(opened.recording.hidden, apart.recording.hidden, strict=True))


def test_the_first_input_of_a_shape_is_also_run_plainly_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [*BATCHES, {"input_ids": BATCHES[0]["input_ids"][:, :12]}]
    with opened_place(micro_gpt2(layers=2), batches) as place:
        passes = counted(place.pairs.context.subject, monkeypatch)
        made = []
        for number in range(4):
            before = len(passes)
            place.pairs.baseline(number, place.config)
            made.append(len(passes) - before)
        # The place was opened with the first input.
        assert made == [0, 1, 1, 2]


class Scribbler(Detector):
    """A detector that changes what it reads."""

    name, needs, statement, cost = "scribbler", frozenset({"weights"}), "nothing", "1"
    proved = False

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        state.weights.mul_(1.0)
        return Verdict(self.name, rows_checked=1)


def test_a_detector_that_writes_is_refused_on_every_input() -> None:
    """Even where the bits happen to stay the same, and where no plain pass is made."""
    with (
        Subject(micro_gpt2(), "causal") as subject,
        pytest.raises(CheckRefusedError, match=r"a detector writes into weights of transformer\.h\.0\.attn"),
    ):
        compute_baseline(subject, BATCHES[0], [Scribbler()], seconds=1.0)


def test_groups_are_joined_to_the_calls_they_came_from() -> None:
    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4)
    weights = torch.rand(2, 6, 5, 5)
    state = AttentionState(
        query=query, key=key, value=key, logits=weights, weights=weights, out=query, scaling=0.5, kv_equal=True,
        has_bias_or_cap=False,
    )  # fmt: skip
    kept: dict[str, Tensor | float | None] = {"sums": by_group(state).weights.sum(-1), "none": None, "number": 2.0}
    joined = groups_joined(kept, 2)
    assert torch.equal(joined["sums"], weights.sum(-1))
    assert (joined["none"], joined["number"]) == (None, 2.0)
