"""How far blocks move: against sums in exact arithmetic, and the same bits whoever is measured beside whom."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments.effects.block_outputs import BlockOutputs
from experiments.passes.block_changes import BlockWatcher

BATCH, LENGTH, WIDTH = 2, 5, 3
NUMBERS = st.floats(-100, 100, width=32)
EVERY = torch.arange(BATCH * LENGTH)


def hidden_of(data: st.DataObject, dtype: torch.dtype) -> Tensor:
    count = BATCH * LENGTH * WIDTH
    drawn = data.draw(st.lists(NUMBERS, min_size=count, max_size=count))
    return torch.tensor(drawn, dtype=dtype).view(BATCH, LENGTH, WIDTH)


def exact(before: Tensor, after: Tensor, real: Tensor) -> float:
    """Return |after - before| / |before| over the rows that count; the sums are exact."""
    squares = [Fraction(0), Fraction(0)]
    for old, new, counts in zip(
        before.flatten(0, 1).tolist(), after.flatten(0, 1).tolist(), real.tolist(), strict=True
    ):
        for a, b in zip(old, new, strict=True):
            squares[0] += counts * (Fraction(b) - Fraction(a)) ** 2
            squares[1] += counts * Fraction(a) ** 2
    return math.sqrt(squares[0] / squares[1])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_changes_are_those_of_exact_sums(data: st.DataObject, dtype: torch.dtype) -> None:
    before, other = hidden_of(data, dtype), hidden_of(data, dtype)
    before[0, 0] = 1.0
    real = torch.tensor(data.draw(st.lists(st.booleans(), min_size=9, max_size=9)))
    real = torch.cat([torch.tensor([True]), real])
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 9), unique=True)), dtype=torch.int64)
    after = before.flatten(0, 1).clone()
    after[rows] = other.flatten(0, 1)[rows]
    outputs = BlockOutputs.of([before], real)
    (found,) = outputs.changes(0, rows, after[rows], torch.zeros_like(rows), 1)
    expected = exact(before, after.view(before.shape), real)
    assert found == pytest.approx(expected, rel=1e-14, abs=0.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**32))
def test_a_run_has_the_same_bits_whichever_runs_are_measured_with_it(runs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(3, 43, 70, generator=generator)
    real = torch.rand(3 * 43, generator=generator) > 0.2
    outputs = BlockOutputs.of([clean * 0, clean], real)
    changed = torch.rand(runs, len(real), generator=generator) > 0.6
    owner, rows = changed.nonzero().unbind(1)
    values = torch.randn(len(rows), 70, generator=generator)
    shuffled = torch.randperm(len(rows), generator=generator)
    together = outputs.changes(1, rows[shuffled], values[shuffled], owner[shuffled], runs)
    for run in range(runs):
        mine = owner == run
        zeros = torch.zeros_like(rows[mine])
        assert outputs.changes(1, rows[mine], values[mine], zeros, 1) == [together[run]]


def test_nothing_that_differs_is_exactly_nothing() -> None:
    outputs = BlockOutputs.of([torch.ones(1, 4, 2)], torch.ones(4, dtype=torch.bool))
    nothing = torch.empty(0, dtype=torch.int64)
    found = outputs.changes(0, nothing, torch.empty(0, 2), nothing, 3)
    assert repr(found) == "[0.0, 0.0, 0.0]"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_and_padding_does_not_count(value: float) -> None:
    outputs = BlockOutputs.of([torch.ones(1, 3, 2)], torch.tensor([True, True, False]))
    rows = torch.tensor([1, 2])
    values = torch.tensor([[value, 1.0], [value, 1.0]])
    counted, padding = outputs.changes(0, rows, values, torch.tensor([0, 1]), 2)
    assert repr(counted) == repr(abs(value))
    assert padding == 0.0


def test_a_change_of_nothing_is_infinite_and_one_of_what_is_not_finite_is_unknown() -> None:
    broken = torch.ones(1, 2, 2)
    broken[0, 0, 1] = math.inf
    outputs = BlockOutputs.of([torch.zeros(1, 2, 2), broken], torch.tensor([True, True]))
    row, ones, owner = torch.tensor([1]), torch.full((1, 2), 3.0), torch.tensor([0])
    assert outputs.changes(0, row, ones, owner, 2) == [math.inf, 0.0]
    assert [repr(change) for change in outputs.changes(1, row, ones, owner, 2)] == ["nan", "0.0"]


def test_sizes_beyond_the_squares_of_float64() -> None:
    large = torch.full((1, 2, 2), 1e200, dtype=torch.float64)
    outputs = BlockOutputs.of([large], torch.tensor([True, True]))
    (found,) = outputs.changes(0, torch.tensor([0]), 2 * large[0, :1], torch.tensor([0]), 1)
    assert found == pytest.approx(math.sqrt(0.5), rel=1e-15)


class Adds(nn.Module):
    """A block that writes into what it is given."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden.add_(self.number), None


def test_a_watcher_compares_as_blocks_return_and_leaves_nothing_behind() -> None:
    blocks = [Adds(1.0), Adds(2.0), Adds(4.0)]
    clean = [torch.full((1, 2, 1), size) for size in (1.0, 3.0, 7.0)]
    outputs = BlockOutputs.of(clean, torch.tensor([True, True]))
    watcher = BlockWatcher(blocks, outputs, first=1)
    with watcher:
        hidden = torch.tensor([[[0.0], [1.5]]])
        for block in blocks:
            hidden, _ = block(hidden)
    assert watcher.changes == {1: pytest.approx(1.5 / 18**0.5), 2: pytest.approx(1.5 / 98**0.5)}
    assert watcher.seconds > 0
    assert not any(block._forward_hooks for block in blocks)
