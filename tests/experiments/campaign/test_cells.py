"""Which runs a cell still needs: the same ones in whatever order they are done, and however often that is cut short."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.campaign.cells import Cell, Cells
from experiments.config import ExperimentConfig, StopConfig
from experiments.plan.plan import PlannedRun, make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.plan.stopping import StopRule, confidence_sequence


def planned(count: int) -> list[PlannedRun]:
    return [PlannedRun(f"{repeat:016x}", repeat, repeat, (), "") for repeat in range(count)]


def sequential(outcomes: Sequence[bool], rule: StopRule) -> tuple[int, bool]:
    """The rule, read as it stands: look after so many repeats, and stop when the interval is narrow enough."""
    for size in rule.looks(len(outcomes)):
        low, high = confidence_sequence(sum(outcomes[:size]), size, rule.confidence)
        if (high - low) / 2 <= rule.margin:
            return size, True
    return len(outcomes), False


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0, 1), st.floats(0.03, 0.3), st.integers(0, 2**32))
def test_what_is_needed_depends_on_the_rows_alone(repeats: int, rate: float, margin: float, seed: int) -> None:
    order, rule = random.Random(seed), StopRule(margin, minimum=10, growth=1.4)
    outcomes = [order.random() < rate for _ in range(repeats)]
    expected = sequential(outcomes, rule)
    done: list[bool | None] = [None] * repeats
    for _ in range(10_000):
        # A session that begins with what is on disk and is killed after some runs.
        cell, left = Cell(planned(repeats), list(done), rule), order.randint(1, 60)
        while (due := cell.due()) and left:
            order.shuffle(due)
            for run in due[:left]:
                done[run.repeat] = outcomes[run.repeat]
                cell.note(run.repeat, outcomes[run.repeat])
            left -= min(left, len(due))
        if not due:
            break
    assert (cell.trials, cell.stopped) == expected
    assert [repeat for repeat, counts in enumerate(done) if counts is not None] == list(range(expected[0]))
    unneeded = [run.repeat for run in cell.unneeded()]
    assert unneeded == list(range(expected[0], repeats))


def test_a_run_that_raised_holds_its_cell_until_it_is_done() -> None:
    rule = StopRule(0.4, minimum=4, growth=2)
    cell = Cell(planned(20), [None] * 20, rule)
    for run in cell.due():
        cell.note(run.repeat, None if run.repeat == 2 else False)
    assert cell.due() == []
    assert (cell.looks, cell.stopped, cell.unneeded()) == (0, False, [])
    assert cell.row().estimate is None
    again = Cell(planned(20), list(cell.counted), rule)
    assert [run.repeat for run in again.due()] == [2]
    again.note(2, True)
    assert (again.row().runs, again.row().successes) == (4, 1)


def test_the_row_of_a_cell() -> None:
    cell = Cell(planned(100), [repeat % 10 == 0 for repeat in range(100)], StopRule(0.01, minimum=50))
    row = cell.row()
    assert (row.runs, row.successes, row.looks, row.stopped) == (100, 10, 3, False)
    assert (row.estimate, row.low, row.high) == (0.1, *confidence_sequence(10, 100, 0.95))
    assert cell.unneeded() == []


SWEEP = {"fault.location": ["q", "scores", "v"], "fault.bit": [3, 30], "seed": [0, 1]}


@pytest.mark.parametrize("count", [1, 2, 5, 12, 20])
def test_a_cell_belongs_to_one_shard(count: int) -> None:
    plan = make_plan(ExperimentConfig(num_runs=7, stop=StopConfig(margin=0.1), sweep=SWEEP))
    shards = [shard_of(plan, Shard(number, count)) for number in range(1, count + 1)]
    assert sorted(run.index for shard in shards for run in shard) == list(range(len(plan.runs)))
    owners = {}
    for number, shard in enumerate(shards):
        for run in shard:
            assert owners.setdefault(run.values, number) == number
    sizes = [len(shard) // 7 for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    for shard in shards:
        seeds = [run.values[2] for run in shard]
        assert len(list(itertools.groupby(seeds))) == len(set(seeds))  # one context after the other


def test_without_a_margin_shards_are_as_they_were_and_every_run_is_needed() -> None:
    plan = make_plan(ExperimentConfig(num_runs=7, sweep=SWEEP))
    mine = shard_of(plan, Shard(2, 3))
    assert mine == shard_of(plan, Shard(2, 3))
    grid = Cells(plan, mine, {})
    assert [list(needed) for needed in grid.rounds(mine)] == [mine]
    assert (grid.unneeded(), grid.line()) == (set(), None)
