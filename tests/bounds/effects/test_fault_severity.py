"""Predicted severities against the exact closed forms, one fault at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_states import random_state

from bounds.effects.fault_effect import LOCATIONS, local_effect
from bounds.effects.fault_severity import severity_terms
from bounds.effects.head_view import LogitMap

TENSORS = {"q": "query", "k": "key", "v": "value", "scores": "scores", "weights": "weights", "out": "out"}
SITUATIONS = {
    "all": {"mask": "all"},
    "causal": {},
    "grouped": {"kv_heads": 2},
    "windowed and grouped": {"mask": "window", "kv_heads": 1},
    "padded": {"mask": "padded"},
    "sharp": {"gain": 12.0},
    "more keys than rows": {"rows": 5, "keys": 9},
    "sinks": {"sinks": torch.linspace(-1, 2, 4)},
    "float64": {"dtype": torch.float64},
}


def faults(state, location: str, count: int, seed: int):
    """Random elements and new values, from nothing to enormous, as (N, 4) indices and before and after."""
    tensor, random = getattr(state, TENSORS[location]), np.random.default_rng(seed)
    columns = state.key.shape[2] if location == "weights" else tensor.shape[-1]
    sizes = (*tensor.shape[:3], columns)
    indices = torch.tensor(np.stack([random.integers(size, size=count) for size in sizes], -1))
    before = tensor[tuple(indices.T)].double()
    change = torch.tensor(random.choice([-1.0, 1.0], count) * 10.0 ** random.uniform(-6, 6, count))
    after = before + change * (1 if location != "weights" else 1e-3)
    if location == "weights":
        after = after.to(tensor.dtype).double()
    after[0] = before[0]
    return indices, before, after


def expected(state, location: str, index, after: float) -> float:
    """The largest change of a row in units of its length, from the exact effect of this one fault."""
    moved = local_effect(state, location, tuple(index), after, LogitMap(state.scaling)).norm(dim=-1)
    return float(torch.where(moved == 0, 0.0, moved / state.out.double().norm(dim=-1)).max())


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_severity_is_the_largest_relative_change_of_a_row(situation: str, location: str) -> None:
    state = random_state(3, **SITUATIONS[situation])
    indices, before, after = faults(state, location, 60, seed=5)
    found = severity_terms(state, location).severity(indices, before, after)
    assert found.dtype == torch.float64
    for index, new, got in zip(indices.tolist(), after.tolist(), found.tolist(), strict=True):
        # Terms are kept in float32.
        assert got == pytest.approx(expected(state, location, index, new), rel=2e-4, abs=1e-7), (index, new)
    assert found[0] == 0
    assert bool((found > 0).any())


def test_a_weight_that_is_nearly_one_still_has_something_to_lose() -> None:
    """The other weights are 1e-18 together; the score that keeps them down falls by 100."""
    state = random_state(1, mask="all", rows=1, keys=3)
    scores = torch.tensor([60.0, -100.0, -104.0]).expand(2, 4, 1, 3) * 1.0
    logits = scores * state.scaling
    weights = torch.softmax(logits, -1)
    from attention_states import replaced

    state = replaced(state, scores=scores, logits=logits, weights=weights, mass=weights, out=weights @ state.value)
    assert float(1 - weights.double()[0, 0, 0, 0]) < 1e-16
    index = torch.tensor([[0, 0, 0, 0]])
    found = severity_terms(state, "scores").severity(
        index, torch.tensor([60.0]).double(), torch.tensor([-900.0]).double()
    )
    exact = expected(state, "scores", (0, 0, 0, 0), -900.0)
    assert exact > 0.1
    assert float(found) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_infinitely_severe(location: str, value: float) -> None:
    state = random_state(0)
    index, before = torch.tensor([[0, 1, 3, 2]]), torch.tensor([0.5], dtype=torch.float64)
    after = torch.tensor([value], dtype=torch.float64)
    assert float(severity_terms(state, location).severity(index, before, after)) == math.inf


def test_hidden_keys_move_nothing_through_the_softmax() -> None:
    state = random_state(0)
    index, before = torch.tensor([[0, 1, 3, 9]]), torch.tensor([0.5], dtype=torch.float64)
    assert float(severity_terms(state, "scores").severity(index, before, before + 1e3)) == 0


def test_memory_is_counted() -> None:
    terms = severity_terms(random_state(0), "scores")
    assert terms.nbytes == 4 * (2 * (2 * 4 * 12 * 12) + 2 * 4 * 12)


def test_an_unknown_location_is_refused() -> None:
    with pytest.raises(ValueError, match="location: got 'logits', allowed q, k, v, scores, weights, out"):
        severity_terms(random_state(0), "logits")
