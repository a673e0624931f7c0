from __future__ import annotations

import hashlib
import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import DetectConfig, ExperimentConfig, RunConfig, load_config
from experiments.errors import UsageError
from experiments.plan import plan as plan_module
from experiments.plan.plan import canonical_json, context_values, make_plan
from experiments.plan.shards import Shard, parse_shard, run_costs, shard_of


def ids(config: ExperimentConfig) -> list[str]:
    return [run.run_id for run in make_plan(config).runs]


SMALL = {"fault.location": ["q", "scores"], "fault.bit": [3, 30], "seed": [0, 1]}


# ------------------------------------------------------------------------------------------------- the grid


def test_the_default_campaign_has_768_different_runs() -> None:
    config = load_config([])
    plan = make_plan(config)
    assert len({run.run_id for run in plan.runs}) == 768
    assert plan.axes == ("fault.location", "fault.bit")
    assert [run.index for run in plan.runs] == list(range(768))
    assert [run.repeat for run in plan.runs[:5]] == [0, 1, 2, 3, 0]
    assert plan.runs[0].values == ("q", 0)
    assert plan.runs[-1].values == ("out", 31)


def test_the_plan_is_the_product_of_the_axes_with_repeats_innermost() -> None:
    plan = make_plan(ExperimentConfig(num_runs=2, sweep=SMALL))
    expected = [(*values, repeat) for values in itertools.product(*SMALL.values()) for repeat in range(2)]
    assert [(*run.values, run.repeat) for run in plan.runs] == expected


def test_a_campaign_without_axes_has_its_repeats() -> None:
    plan = make_plan(ExperimentConfig(num_runs=3))
    assert [run.values for run in plan.runs] == [(), (), ()]
    assert [run.repeat for run in plan.runs] == [0, 1, 2]


def test_the_configuration_of_a_run_has_its_values_in_place() -> None:
    config = ExperimentConfig(num_runs=2, sweep={**SMALL, "fault.layers": [None, [0, 1]]})
    plan = make_plan(config)
    for run in plan.runs:
        own = plan.config_of(run)
        assert isinstance(own, ExperimentConfig)
        assert (own.fault.location, own.fault.bit, own.seed, own.fault.layers) == run.values
        assert own.data == config.data
    assert plan.config == config


def test_a_run_is_found_by_its_id() -> None:
    plan = make_plan(ExperimentConfig(num_runs=2, sweep=SMALL))
    assert plan.by_id(plan.runs[5].run_id) is plan.runs[5]
    with pytest.raises(UsageError, match="'0000000000000000' is not in this plan of 16 runs"):
        plan.by_id("0000000000000000")


def test_runs_of_one_point_share_their_configuration_and_points_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1, 1.0 and True are equal, [1] cannot be hashed, and few configurations are kept.
    sweep = {"fault.bit": [1, [1], None], "fault.include_masked": [True, False], "detect.tolerance": [1, 0.0]}
    plan = make_plan(ExperimentConfig(num_runs=2, sweep=sweep))
    for kept in (8192, 2):
        monkeypatch.setattr(plan_module, "KEPT_CONFIGS", kept)
        for one, other in zip(plan.runs[::2], plan.runs[1::2], strict=True):
            config = plan.config_of(one)
            assert config is plan.config_of(other)
            found = (config.fault.bit, config.fault.include_masked, config.detect.tolerance)
            assert repr(found) == repr(one.values)
    assert plan == make_plan(ExperimentConfig(num_runs=2, sweep=sweep))


def test_the_values_of_a_context_tell_models_data_and_seeds_apart() -> None:
    sweep = {"seed": [0, 1], "fault.bit": [3, 30], "model.dtype": ["float32", "float64"], "data.seq_len": [8, 16]}
    plan = make_plan(ExperimentConfig(num_runs=2, sweep=sweep))
    found: dict[str, set[Any]] = {}
    for run in plan.runs:
        found.setdefault(context_values(plan, run), set()).add((run.values[0], *run.values[2:]))
    assert [len(values) for values in found.values()] == [1] * 8


# ------------------------------------------------------------------------------------------------- identity


def test_run_ids_never_change() -> None:
    """Regression values: with other ids, results on disk would belong to no run."""
    default = ids(load_config([]))
    assert (default[0], default[1], default[767]) == ("686d24c4f44e4f15", "bdfb54435f0fe28d", "42f01d81fa8ac69f")
    flat = ExperimentConfig(injection_layers=[0, 1], injection_location="scores", injection_bit=15, num_runs=10)
    assert ids(flat)[9] == "1b44bc8b716f834d"


def test_an_id_is_the_hash_of_what_determines_the_run() -> None:
    # The rule in full, written out once more.
    config = ExperimentConfig(num_runs=2, sweep={"fault.bit": [[0, 31]]})
    determining: dict[str, Any] = {
        "model.path": "reference", "model.dtype": "float32", "model.force_kv_equal": False,
        "model.trust_remote_code": False, "model.revision": None, "data.source": "pydoc", "data.num_samples": 16,
        "data.seq_len": 128, "data.batch_size": 1, "data.field": None, "data.split": "test",
        "fault.location": "scores", "fault.bit": [0, 31], "fault.kind": "bitflip", "fault.rate": None,
        "fault.layers": None, "fault.layer_mode": None, "fault.layer_pattern": None, "fault.index.batch": None,
        "fault.index.head": None, "fault.index.row": None, "fault.index.col": None, "fault.include_masked": False,
        "fault.aim": "uniform", "seed": 0,
    }  # fmt: skip
    text = json.dumps(determining, sort_keys=True, separators=(",", ":"))
    assert ids(config) == [
        hashlib.blake2b(f"{text}#{repeat}".encode(), digest_size=32).hexdigest()[:16] for repeat in (0, 1)
    ]


@pytest.mark.parametrize("order", list(itertools.permutations(SMALL)))
def test_ids_do_not_depend_on_the_order_of_axes_or_values(order: tuple[str, ...]) -> None:
    random.seed(len(order[0]))
    shuffled = {key: random.sample(SMALL[key], len(SMALL[key])) for key in order}
    one = make_plan(ExperimentConfig(num_runs=2, sweep=SMALL))
    other = make_plan(ExperimentConfig(num_runs=2, sweep=shuffled))
    what = {run.run_id: (dict(zip(one.axes, run.values, strict=True)), run.repeat) for run in one.runs}
    assert {run.run_id: (dict(zip(other.axes, run.values, strict=True)), run.repeat) for run in other.runs} == what


def test_ids_do_not_depend_on_whether_a_value_is_swept() -> None:
    swept = make_plan(ExperimentConfig(num_runs=2, sweep=SMALL))
    for run in swept.runs[:: len(swept.runs) // 4]:
        location, bit, seed = run.values
        fixed = ExperimentConfig(num_runs=2, injection_location=location, injection_bit=bit, seed=seed)
        assert ids(fixed)[run.repeat] == run.run_id


def test_a_whole_number_on_a_float_axis_is_the_same_run_as_a_fixed_one() -> None:
    common = ["--fault.location", "q", "--fault.bit", "null", "--fault.kind", "bit_error_rate", "--num_runs", "1"]
    assert ids(load_config([*common, "--sweep.fault.rate", "1"])) == ids(load_config([*common, "--fault.rate", "1"]))


def test_a_campaign_with_more_repeats_contains_the_runs_of_one_with_fewer() -> None:
    few, many = (set(ids(ExperimentConfig(num_runs=n, sweep=SMALL))) for n in (2, 5))
    assert few < many


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"}, {"output_dir": "/elsewhere"}, {"detect": DetectConfig(detectors=["finite"], tolerance=1.0)},
        {"critical_loss": 0.5}, {"run": RunConfig(reuse_baseline=False, threads=2)}, {"device": "cpu"},
    ],
    ids=str,
)  # fmt: skip
def test_ids_do_not_depend_on_where_how_and_by_whom_a_run_is_watched(changes: dict[str, Any]) -> None:
    assert ids(ExperimentConfig(num_runs=2, sweep=SMALL, **changes)) == ids(ExperimentConfig(num_runs=2, sweep=SMALL))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"model_path": "reference-kv"}, {"dtype": "float64"}, {"force_kv_equal": True}, {"seq_len": 64},
        {"data_source": "synthetic"}, {"num_samples": 8}, {"batch_size": 2}, {"injection_location": "k"},
        {"injection_bit": 3}, {"injection_kind": "zero"}, {"injection_layers": 0}, {"injection_layers": [0]},
        {"injection_layer_mode": "first"}, {"injection_layer_pattern": "h"},
    ],
    ids=str,
)  # fmt: skip
def test_ids_depend_on_everything_that_determines_a_run(changes: dict[str, Any]) -> None:
    assert not set(ids(ExperimentConfig(num_runs=3, **changes))) & set(ids(ExperimentConfig(num_runs=3)))


def test_four_seeds_give_four_times_as_many_runs() -> None:
    plan = make_plan(ExperimentConfig(num_runs=4, sweep={"seed": [0, 1, 2, 3], "fault.bit": [1, 2]}))
    assert len({run.run_id for run in plan.runs}) == 32


def test_an_id_is_sixteen_hexadecimal_digits() -> None:
    for run in make_plan(ExperimentConfig(num_runs=50)).runs:
        assert len(run.run_id) == 16
        assert set(run.run_id) <= set("0123456789abcdef")


def test_two_points_that_are_one_run_are_refused() -> None:
    with pytest.raises(UsageError, match=r"two runs of the grid are identical|is given twice"):
        make_plan(ExperimentConfig(sweep={"fault.bit": [1, 1]}))


def test_a_combination_that_is_not_allowed_is_refused_before_anything_runs() -> None:
    config = ExperimentConfig(
        injection_location="out", dtype="float64", sweep={"model.dtype": ["float64", "bfloat16"], "fault.bit": [3, 15]}
    )
    assert len(make_plan(config).runs) == 4
    with pytest.raises(UsageError, match=r"fault\.bit: got 20, allowed 0\.\.15 for bfloat16"):
        make_plan(config.with_field("sweep", {"model.dtype": ["float64", "bfloat16"], "fault.bit": [3, 20]}))


def test_combinations_of_sizes_that_do_not_fit_are_refused_before_anything_runs() -> None:
    config = ExperimentConfig(
        data=load_config(["--data.num_samples", "12", "--data.batch_size", "1"]).data,
        sweep={"data.num_samples": [12, 9], "data.batch_size": [1, 4]},
    )
    with pytest.raises(UsageError, match=r"data\.num_samples: got 9, allowed a multiple of data\.batch_size \(4\)"):
        make_plan(config)


def test_combinations_of_layers_that_do_not_fit_are_refused_before_anything_runs() -> None:
    config = ExperimentConfig(
        injection_layers=0, sweep={"fault.layer_mode": ["random", "specific"], "fault.layers": [0, None]}
    )
    with pytest.raises(UsageError, match=r"fault\.layer_mode: specific needs fault\.layers"):
        make_plan(config)


# ------------------------------------------------------------------------------------------------- randomness


def test_a_generator_is_that_of_the_run_and_of_nothing_else() -> None:
    plan = make_plan(ExperimentConfig(num_runs=3))
    first, again = (plan.runs[0].generator().integers(2**63, size=8).tolist() for _ in range(2))
    assert first == again
    random.seed(1)
    plan.runs[1].generator().random()
    assert plan.runs[0].generator().integers(2**63, size=8).tolist() == first
    assert make_plan(ExperimentConfig(num_runs=3)).runs[0].generator().integers(2**63, size=8).tolist() == first


def test_runs_draw_different_numbers() -> None:
    plan = make_plan(ExperimentConfig(num_runs=200, sweep={"seed": [0, 1]}))
    assert len({run.generator().integers(2**63) for run in plan.runs}) == 400


# ------------------------------------------------------------------------------------------------- shards


GRIDS = st.dictionaries(
    st.sampled_from(["seed", "fault.bit", "fault.index.row", "data.seq_len"]),
    st.lists(st.integers(2, 9), min_size=1, max_size=3, unique=True),
    max_size=2,
)


@settings(max_examples=40)
@given(sweep=GRIDS, repeats=st.integers(1, 4), count=st.integers(1, 40))
def test_shards_part_the_plan(sweep: dict[str, list[int]], repeats: int, count: int) -> None:
    plan = make_plan(ExperimentConfig(num_runs=repeats, sweep=sweep))
    parts = [shard_of(plan, Shard(number, count)) for number in range(1, count + 1)]
    assert sorted(run.index for part in parts for run in part) == list(range(len(plan.runs)))
    costs = run_costs(plan)
    loads = [sum(int(costs[run.index]) for run in part) for part in parts]
    assert max(abs(count * load - sum(loads)) for load in loads) <= count * int(costs.max())


def test_a_shard_does_the_runs_of_one_model_and_data_set_together() -> None:
    plan = make_plan(
        ExperimentConfig(
            num_runs=2, sweep={"fault.bit": [1, 2, 3], "seed": [0, 1], "model.dtype": ["float32", "float64"]}
        )
    )
    for number in (1, 2):
        contexts = [(run.values[1], run.values[2]) for run in shard_of(plan, Shard(number, 2))]
        assert len(list(itertools.groupby(contexts))) == len(set(contexts))


def test_the_file_of_a_shard_has_its_number_in_four_digits() -> None:
    assert (Shard().file_name, Shard(3, 16).file_name) == ("0001", "0003")


@pytest.mark.parametrize(("text", "shard"), [("1/1", Shard(1, 1)), ("3/16", Shard(3, 16)), ("16/16", Shard(16, 16))])
def test_shard_texts(text: str, shard: Shard) -> None:
    assert parse_shard(text, {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "9"}) == shard


@pytest.mark.parametrize(
    "text", ["4/3", "0/3", "0/0", "-1/3", "1", "1/", "/3", "a/b", "1/2/3", "", " 1/2", "1.0/2", "1/2\n"]
)
def test_bad_shard_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--shard: got .*, allowed i/n with 1 <= i <= n"):
        parse_shard(text, {})


def slurm(**values: object) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in values.items()}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({}, Shard(1, 1)),
        ({"SLURM_JOB_ID": "17"}, Shard(1, 1)),
        (slurm(ID=0, COUNT=4, MIN=0, MAX=3, STEP=1), Shard(1, 4)),
        (slurm(ID=3, COUNT=4, MIN=0, MAX=3, STEP=1), Shard(4, 4)),
        (slurm(ID=1, COUNT=16, MIN=1, MAX=16, STEP=1), Shard(1, 16)),
        (slurm(ID=16, COUNT=16, MIN=1, MAX=16), Shard(16, 16)),
        (slurm(ID=9, COUNT=3, MIN=5, MAX=13, STEP=4), Shard(2, 3)),
    ],
    ids=str,
)
def test_a_slurm_array_task_is_a_shard(environment: dict[str, str], shard: Shard) -> None:
    assert parse_shard(None, environment) == shard


@pytest.mark.parametrize(
    "environment",
    [
        slurm(ID=5, COUNT=3, MIN=0, MAX=5, STEP=1), slurm(ID=0, COUNT=3, MIN=1, MAX=3, STEP=1),
        slurm(ID="x", COUNT=3, MIN=0), slurm(ID=1, COUNT="", MIN=0), slurm(ID=1, COUNT=3, MIN="a"),
        slurm(ID=1, COUNT=3, MIN=0, STEP=0), slurm(ID=1, COUNT=0, MIN=0),
    ],
    ids=str,
)  # fmt: skip
def test_slurm_variables_that_make_no_sense_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK"):
        parse_shard(None, environment)


# ------------------------------------------------------------------------------------------------- the rest


def test_a_hundred_thousand_runs_are_planned() -> None:
    plan = make_plan(
        ExperimentConfig(num_runs=400, sweep={"fault.bit": list(range(32)), "fault.index.row": list(range(8))})
    )
    assert len({run.run_id for run in plan.runs}) == 102_400
    assert len(shard_of(plan, Shard(7, 100))) == 1024


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_refuses_what_json_has_no_number_for(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": value})


def test_canonical_json_is_sorted_and_without_blanks() -> None:
    assert canonical_json({"b": [1, 0.1], "a": None}) == '{"a":null,"b":[1,0.1]}'
