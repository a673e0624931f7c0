"""The closed forms T20-T25 against attention that is simply computed again, in float64 and without shortcuts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attention_states import attend, mask_of, poked, random_state
from hypothesis import given, settings
from hypothesis import strategies as st

import bounds.effects.fault_effect as fault_effect
from bounds import AttentionState
from bounds.effects.fault_effect import effect_reason, local_effect
from bounds.effects.forms import CLOSED_FORMS
from bounds.effects.head_view import LogitMap, plain_logit_map, score_tilt, softmax_change
from fault_injection.locations import LOCATION_TABLE

TENSORS = {"q": "query", "k": "key", "v": "value", "scores": "scores", "weights": "weights", "out": "out"}


def recomputed(state: AttentionState, location: str, index: tuple[int, ...], after: float, **options) -> torch.Tensor:
    """The output when everything behind the fault is computed again: the oracle."""
    hit = poked(getattr(state, TENSORS[location]), index, after)
    if location == "out":
        return hit
    group = state.query.shape[1] // state.key.shape[1]
    value = hit if location == "v" else state.value
    keys = state.key.shape[2]
    if location in ("weights", "v"):
        weights = hit if location == "weights" else state.weights
        return weights[..., :keys] @ value.repeat_interleave(group, 1)
    if location in ("q", "k"):
        query, key = (hit, state.key) if location == "q" else (state.query, hit)
        return attend(query, key, value, state_mask(state), **options).out
    logits = hit * state.scaling
    if (cap := options.get("cap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    if (bias := options.get("bias")) is not None:
        logits = logits + bias
    logits = torch.cat([logits, state.logits[..., keys:]], -1)
    if state.visible is not None:
        logits = logits.masked_fill(~state.visible, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, -1)[..., :keys] @ value.repeat_interleave(group, 1)


def state_mask(state: AttentionState) -> torch.Tensor | None:
    return None if state.visible is None else state.visible[..., : state.key.shape[2]]


def disagreement(state, location, index, after, logit_map=None, **options) -> float:
    """Largest difference between closed form and recomputation, in units of the largest number involved."""
    expected = recomputed(state, location, index, after, **options) - state.out
    got = local_effect(state, location, index, after, logit_map)
    unit = 1 + state.value.abs().max() + (abs(after) if location == "v" else 0.0)
    return float((got - expected).abs().max() / unit)


SITUATIONS = {
    "all": {"mask": "all"},
    "causal": {},
    "window": {"mask": "window"},
    "padded": {"mask": "padded"},
    "grouped": {"kv_heads": 2},
    "single": {"kv_heads": 1, "rows": 1},
    "sharp": {"gain": 8.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 0.0], dtype=torch.float64), "kv_heads": 2},
}


@pytest.mark.parametrize("location", fault_effect.LOCATIONS)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("added", [1e-6, 0.7, -25.0, 3e3])
def test_T20_to_T25_agree_with_recomputation(location, situation, added):
    state = random_state(3, dtype=torch.float64, **SITUATIONS[situation])
    tensor = getattr(state, TENSORS[location])
    generator = torch.Generator().manual_seed(1)
    sizes = (*tensor.shape[:3], state.key.shape[2] if location == "weights" else tensor.shape[-1])
    for _ in range(6):
        index = tuple(int(torch.randint(size, (1,), generator=generator)) for size in sizes)
        after = float(tensor[index]) + added
        sinks = SITUATIONS[situation].get("sinks")
        assert disagreement(state, location, index, after, plain_logit_map(state), sinks=sinks) < 1e-12


@pytest.mark.parametrize("location", ["scores", "q", "k"])
def test_a_bias_drops_out_and_a_cap_does_not(location):
    """Only differences of logits matter: a bias needs nothing but the slope, a cap must be named."""
    bias = torch.randn(1, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    biased = random_state(4, dtype=torch.float64, bias=bias, kv_heads=2)
    capped = random_state(4, dtype=torch.float64, cap=3.0, kv_heads=2, gain=3.0)
    index = (1, 1, 7, 3)
    slope = biased.scaling
    assert disagreement(biased, location, index, 6.0, LogitMap(slope), bias=bias) < 1e-12
    assert disagreement(capped, location, index, 6.0, LogitMap(slope, 3.0), cap=3.0) < 1e-12
    assert disagreement(capped, location, index, 6.0, LogitMap(slope), cap=3.0) > 1e-3
    assert plain_logit_map(biased) is None
    with pytest.raises(ValueError, match=rf"fault in {location} of this state: it is not known how the scores become"):
        local_effect(biased, location, index, 6.0)


def test_P1_masked_scores_have_no_effect_and_masked_weights_have():
    state = random_state(5, dtype=torch.float64)
    index = (0, 1, 3, 9)
    assert not state.visible.expand(state.logits.shape)[index]
    assert not local_effect(state, "scores", index, 1e30, plain_logit_map(state)).any()
    effect = local_effect(state, "weights", index, 2.0)
    assert torch.equal(effect[0, 1, 3], 2.0 * state.value[0, 1, 9])
    assert effect.count_nonzero() == effect[0, 1, 3].count_nonzero()


def test_a_key_that_disappears():
    """A score of -inf removes its key: the others share the row. The last key of a row cannot move anything."""
    state = random_state(6, dtype=torch.float64)
    for index in [(0, 0, 5, 2), (1, 3, 11, 11)]:
        assert disagreement(state, "scores", index, -math.inf, plain_logit_map(state)) < 1e-12
    assert not local_effect(state, "scores", (0, 0, 0, 0), -40.0, plain_logit_map(state)).any()


def test_T20_holds_where_the_weight_is_all_but_one():
    """The dominant key of a row: 1 - w has no digits left in float64 unless it is summed from the others."""
    query = torch.full((1, 1, 1, 1), 30.0, dtype=torch.float64)
    key = torch.tensor([1.0, 0.1, 0.05], dtype=torch.float64).view(1, 1, 3, 1)
    value = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.25]], dtype=torch.float64).view(1, 1, 3, 2)
    state = attend(query, key, value)
    assert 1 - float(state.weights[0, 0, 0, 0]) < 1e-11
    for location, index, after in [("scores", (0, 0, 0, 0), -30.0), ("k", (0, 0, 0, 0), -1.0), ("q", (0, 0, 0, 0), -9)]:
        assert disagreement(state, location, index, after, plain_logit_map(state)) < 1e-12


def test_T21_counts_the_weight_as_it_is_cast():
    state = random_state(7, dtype=torch.bfloat16, softmax_dtype=torch.float32)
    assert state.weights.dtype == torch.float32
    index = (0, 0, 4, 1)
    after = float(state.mass[index]) * (1 + 2.0**-12)  # not a bfloat16: rounded away by the cast
    assert not local_effect(state, "weights", index, after).any()


def test_a_query_head_of_another_group_is_untouched():
    state = random_state(8, dtype=torch.float64, kv_heads=2, heads=6)
    for location in ("k", "v"):
        effect = local_effect(state, location, (0, 1, 2, 3), 5.0, plain_logit_map(state))
        touched = effect.flatten(2).any(-1)
        assert touched.tolist() == [[False] * 3 + [True] * 3, [False] * 6]
        assert not effect[0, 3:, :2].any()  # rows that do not see key 2


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-300, 300), min_size=2, max_size=8),
    added=st.lists(st.floats(-1e4, 1e4), min_size=8, max_size=8),
    scale=st.sampled_from([1.0, 1e-3, 1e-9]),
)
def test_T22_softmax_change_is_the_difference_of_two_softmaxes(logits, added, scale):
    a = torch.tensor(logits, dtype=torch.float64)
    z = torch.tensor(added[: len(logits)], dtype=torch.float64) * scale
    log_weights = torch.log_softmax(a, -1)
    weights = log_weights.exp()
    got = softmax_change(log_weights, weights, weights.argmax(-1, keepdim=True), z)
    assert float((got - (torch.softmax(a + z, -1) - weights)).abs().max()) < 1e-12
    assert abs(float(got.sum())) < 1e-12
    tilt = score_tilt(log_weights, 1 - weights, z[0])
    single = torch.softmax(a + z[0] * torch.eye(len(logits), dtype=torch.float64), -1).diagonal()
    rest = weights.sum() - weights
    safe = rest > 1e-3  # here 1 - w is exact enough for the simple formula
    assert float(((weights + score_tilt(log_weights, rest, z[0]) * rest - single) * safe).abs().max()) < 1e-12
    assert bool(torch.isfinite(tilt[safe]).all())


def test_T22_keeps_the_relative_accuracy_of_small_changes():
    a = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    weights = torch.softmax(a, -1)
    z = torch.tensor([1e-13, -2e-13, 5e-14], dtype=torch.float64)
    got = softmax_change(weights.log(), weights, weights.argmax(-1, keepdim=True), z)
    first_order = weights * (z - (weights * z).sum())
    assert torch.allclose(got, first_order, rtol=1e-9, atol=0)
    # What all columns have in common drops out before anything is rounded.
    z = torch.tensor([2.0**-20, -(2.0**-21), 0.0], dtype=torch.float64)
    apart, together = (softmax_change(weights.log(), weights, weights.argmax(-1, keepdim=True), z + c) for c in (0, 64))
    assert torch.allclose(apart, together, rtol=1e-12, atol=0)


def test_wrong_use_is_refused_by_name():
    state = random_state(9)
    with pytest.raises(ValueError, match="location: got 'logits', allowed q, k, v, scores, weights, out"):
        effect_reason(state, "logits", None)
    without = dataclasses.replace(state, scores=None)
    with pytest.raises(ValueError, match="fault in scores of this state: this state does not carry the scores"):
        local_effect(without, "scores", (0, 0, 0, 0), 1.0, plain_logit_map(without))
    # queries and keys do not need them
    kept, dropped = (local_effect(s, "q", (0, 0, 5, 1), 2.0, plain_logit_map(s)) for s in (state, without))
    assert torch.equal(kept, dropped)


def test_masks_are_as_the_state_says():
    assert mask_of("window", 12, 12).sum(-1).tolist()[:5] == [1, 2, 3, 4, 4]


def test_the_locations_that_say_so_have_a_closed_form() -> None:
    assert CLOSED_FORMS.names() == tuple(row.name for row in LOCATION_TABLE if row.closed_form)
