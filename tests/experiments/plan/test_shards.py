"""Who does what: parts of equal cost, runs of an input together, the same for every worker and every submission."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import DataConfig, ExperimentConfig, FaultConfig, ModelConfig, RunConfig, StopConfig
from experiments.errors import UsageError
from experiments.plan.plan import Plan, classes_of, make_plan
from experiments.plan.shards import Shard, parse_shard, run_costs, shard_numbers, shard_of


def loads(plan: Plan, count: int) -> list[int]:
    """Return the expected cost of every shard, added up run by run."""
    costs = run_costs(plan).tolist()
    return [sum(costs[run.index] for run in shard_of(plan, Shard(n, count))) for n in range(1, count + 1)]


LAYERED = {"fault.layers": [0, 11], "fault.bit": [3, 30]}


def test_an_axis_whose_period_is_the_number_of_workers_does_not_unbalance_them() -> None:
    # Dealt out one by one, worker 1 would get all of layer 0, behind which eleven blocks lie, and worker 2 all of 11.
    plan = make_plan(ExperimentConfig(num_runs=64, sweep={"fault.bit": [3, 30], "fault.layers": [0, 11]}))
    costs = run_costs(plan)
    assert costs.max() > 2 * costs.min()
    for count in (2, 4, 7):
        parts = loads(plan, count)
        assert max(parts) - min(parts) <= 2 * costs.max()


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(2, 64), min_size=1, max_size=3, unique=True),
    layers=st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True),
    dtypes=st.sampled_from([["float32"], ["float32", "bfloat16"]]),
    repeats=st.integers(1, 6),
    count=st.integers(1, 20),
)
def test_every_model_is_parted_within_the_cost_of_one_run(
    lengths: list[int], layers: list[int], dtypes: list[str], repeats: int, count: int
) -> None:
    sweep = {"data.seq_len": lengths, "fault.layers": layers, "model.dtype": dtypes}
    plan = make_plan(ExperimentConfig(num_runs=repeats, sweep=sweep))
    costs, model, numbers = run_costs(plan), classes_of(plan, "model.").number, shard_numbers(plan, count)
    assert set(numbers.tolist()) <= set(range(1, count + 1))
    for kind in range(len(dtypes)):
        total = int(costs[model == kind].sum())
        for number in range(1, count + 1):
            load = int(costs[(model == kind) & (numbers == number)].sum())
            assert abs(count * load - total) <= count * int(costs.max())


def test_runs_of_one_input_are_kept_together() -> None:
    config = ExperimentConfig(num_runs=100, data=DataConfig(num_samples=8), sweep={"fault.bit": [3, 30]})
    plan = make_plan(config)
    inputs = [run.batch_index(8) for run in plan.runs]
    assert len(set(inputs)) == 8
    for count in (1, 4, 16):
        shards = [[inputs[run.index] for run in shard_of(plan, Shard(n, count))] for n in range(1, count + 1)]
        # Cutting a row of 8 stretches into parts opens at most one more stretch with every cut.
        assert sum(len(set(shard)) for shard in shards) <= 8 + count - 1
        assert all(len(list(itertools.groupby(shard))) == len(set(shard)) for shard in shards)


def test_the_input_of_a_run_is_the_first_thing_it_draws() -> None:
    for run in make_plan(ExperimentConfig(num_runs=5)).runs:
        assert run.batch_index(7) == int(run.generator().integers(7))


def test_shards_are_the_same_on_every_machine_and_every_day() -> None:
    # Workers of one campaign find their parts alone: a change of this is a change of the format.
    plan = make_plan(ExperimentConfig(num_runs=3, sweep=LAYERED))
    assert shard_numbers(plan, 4).tolist() == [4, 1, 4, 2, 2, 3, 1, 1, 3, 2, 1, 3]


def test_every_worker_gets_its_share_of_every_model() -> None:
    plan = make_plan(ExperimentConfig(num_runs=8, sweep={"model.dtype": ["float32", "bfloat16"]}))
    for number in (1, 2):
        dtypes = [plan.config_of(run).model.dtype for run in shard_of(plan, Shard(number, 2))]
        assert dtypes == ["float32"] * 4 + ["bfloat16"] * 4


def test_there_may_be_more_workers_than_runs() -> None:
    plan = make_plan(ExperimentConfig(num_runs=2))
    parts = [len(shard_of(plan, Shard(n, 50))) for n in range(1, 51)]
    assert sorted(parts)[-3:] == [0, 1, 1]


def test_cells_are_dealt_out_by_cost() -> None:
    lengths = [16, 32, 64, 128]
    sweep = {"fault.location": ["q", "k", "v", "out"], "data.seq_len": lengths}
    plan = make_plan(ExperimentConfig(num_runs=5, stop=StopConfig(margin=0.1, minimum=4), sweep=sweep))
    one = max(run_costs(plan)) * 5
    # Dealt out in turn, each of 4 shards would have cells of one length only.
    assert len(set(loads(plan, 4))) == 1
    assert max(loads(plan, 3)) <= 4 / 3 * max(sum(loads(plan, 1)) / 3, one)
    assert sorted(loads(plan, 32)) == [0] * 16 + sorted(loads(plan, 16)), "workers beyond the number of cells are idle"
    # By hand: costs are 1, 2, 4 and 8 of each location; loads are 16, 16, 16 behind the eights and fours.
    assert shard_numbers(plan, 3)[::5].tolist() == [2, 1, 2, 1, 3, 2, 3, 2, 2, 3, 2, 3, 3, 1, 3, 1]


def test_cells_of_every_model_are_dealt_out_and_together_too() -> None:
    stop = StopConfig(margin=0.1, minimum=4)
    dtypes = ["float32", "bfloat16"]
    single = make_plan(ExperimentConfig(num_runs=5, stop=stop, sweep={"model.dtype": dtypes}))
    assert sorted(shard_numbers(single, 2)[::5].tolist()) == [1, 2], "one cell of each model, two workers"
    plan = make_plan(ExperimentConfig(num_runs=5, stop=stop, sweep={"model.dtype": dtypes, "fault.bit": [0, 1, 2, 3]}))
    for number in (1, 2):
        runs = shard_of(plan, Shard(number, 2))
        assert [plan.config_of(run).model.dtype for run in runs] == ["float32"] * 10 + ["bfloat16"] * 10


@pytest.mark.parametrize("text", ["1/100001", "1/99999999999999999999", "99999999999999999999/3", "1/" + "9" * 5000])
def test_absurd_numbers_of_shards_are_refused(text: str) -> None:
    assert parse_shard("1/100000", {}) == Shard(1, 100_000)
    with pytest.raises(UsageError, match=r"--shard: got .*, allowed i/n with 1 <= i <= n <= 100,000"):
        parse_shard(text, {})


# ------------------------------------------------------------------------------------------------- cost


def cost(**sections: object) -> int:
    (value,) = run_costs(make_plan(ExperimentConfig(**sections))).tolist()
    return int(value)


def test_what_makes_a_run_dearer() -> None:
    assert cost(data=DataConfig(seq_len=64)) < cost(data=DataConfig(seq_len=128))
    assert cost() < cost(run=RunConfig(engine="plain"))
    assert cost(run=RunConfig(scope="site")) < cost() / 5
    batches = [DataConfig(batch_size=size) for size in (1, 4)]
    assert cost(data=batches[0]) == cost(data=batches[1])
    plain = [cost(data=data, run=RunConfig(engine="plain")) for data in batches]
    assert plain[1] == 4 * plain[0]
    assert cost(model=ModelConfig(dtype="bfloat16")) == cost(model=ModelConfig(dtype="float32"))


def test_the_nearer_the_first_layer_the_dearer() -> None:
    plan = make_plan(
        ExperimentConfig(fault=FaultConfig(layer_mode="specific", layers=0), sweep={"fault.layers": [0, 5, 11]})
    )
    first, middle, last = run_costs(plan).tolist()
    # Of twelve layers known by name: 12, 7 and 1 blocks from the fault on, and the head, for 128 rows.
    assert (first - middle, middle - last) == (128 * 5, 128 * 6)


def test_repeats_that_are_propagated_are_known() -> None:
    plan = make_plan(ExperimentConfig(num_runs=5, run=RunConfig(scope="site", full_every=2)))
    costs = run_costs(plan)
    assert np.array_equal(costs > costs.min(), [True, False, True, False, True])


@pytest.mark.parametrize("axes", [["seed"], ["run.scope"]], ids=str)
def test_classes_tell_runs_apart_by_these_axes_alone(axes: list[str]) -> None:
    plan = make_plan(ExperimentConfig(num_runs=2, sweep={"seed": [5, 6], "run.scope": ["full", "site"]}))
    classes = classes_of(plan, *axes)
    position = plan.axes.index(axes[0])
    for run, number in zip(plan.runs, classes.number.tolist(), strict=True):
        assert classes.first[number].values[position] == run.values[position]
    assert len(classes.first) == 2
