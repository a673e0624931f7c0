from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from experiments.config import (
    DataConfig,
    DetectConfig,
    ExperimentConfig,
    FaultConfig,
    IndexConfig,
    ModelConfig,
    config_from_mapping,
    dump_config,
    flat_fields,
    known_fields,
    load_config,
    read_config_file,
)
from experiments.config.yaml_text import load_yaml
from experiments.errors import MissingResourceError, UsageError
from experiments.plan.plan import make_plan
from fault_injection import LOCATIONS
from fault_injection.faults.kinds import KINDS

WIDTHS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
CONFIGS = sorted((Path(__file__).parents[3] / "experiments" / "configs").glob("*.yaml"))


def file_with(tmp_path: Path, text: str) -> str:
    path = tmp_path / "campaign.yaml"
    path.write_text(text)
    return str(path)


# --------------------------------------------------------------------------------------------------- precedence


def test_defaults_below_the_file_below_the_options(tmp_path: Path) -> None:
    path = file_with(tmp_path, "name: mine\nseed: 3\ndata: {seq_len: 32}\nfault.location: k\n")
    config = load_config(["--seed", "7", "--config", path, "--data.num_samples=4"])
    assert (config.name, config.seed, config.fault.location) == ("mine", 7, "k")
    assert (config.data.seq_len, config.data.num_samples, config.data.batch_size) == (32, 4, 1)
    assert config.model == ModelConfig()


def test_a_file_replaces_the_default_campaign_and_does_not_add_to_it(tmp_path: Path) -> None:
    config = load_config(["--config", file_with(tmp_path, "name: mine\n")])
    assert config.sweep == {}
    assert config.num_runs == 1


def test_without_a_file_the_default_campaign_is_the_base() -> None:
    config = load_config([])
    assert (config.name, config.seed, config.num_runs) == ("default", 0, 4)
    assert config.sweep == {"fault.location": list(LOCATIONS), "fault.bit": list(range(32))}


def test_the_last_of_two_equal_options_counts() -> None:
    assert load_config(["--seed", "1", "--seed=2"]).seed == 2


def test_an_option_removes_the_swept_axis_of_its_field_and_no_other() -> None:
    config = load_config(["--fault.location", "scores"])
    assert config.fault.location == "scores"
    assert list(config.sweep) == ["fault.bit"]


def test_an_option_of_a_group_of_fields_removes_their_axes() -> None:
    grid = next(str(path) for path in CONFIGS if path.stem == "grid")
    config = load_config(["--config", grid, "--fault.index", "{row: 3}"])
    assert config.fault.index.row == 3
    assert "fault.index.row" not in config.sweep


def test_an_option_of_a_group_keeps_the_other_fields_of_the_file(tmp_path: Path) -> None:
    path = file_with(tmp_path, "fault: {location: k, include_masked: true}\n")
    config = load_config(["--config", path, "--fault", "{kind: zero}"])
    assert config.fault == FaultConfig(location="k", include_masked=True, kind="zero")


def test_an_axis_option_replaces_the_axis_of_the_file_and_keeps_the_others() -> None:
    config = load_config(["--sweep.fault.bit", "30,31", "--sweep.seed", "0:3"])
    assert config.sweep == {"fault.location": list(LOCATIONS), "fault.bit": [30, 31], "seed": [0, 1, 2]}


def test_axes_may_be_nested_in_the_file(tmp_path: Path) -> None:
    nested = file_with(tmp_path, "sweep: {fault: {bit: 0:3, location: [q, k]}, model.dtype: float32}\n")
    assert load_config(["--config", nested]).sweep == {
        "fault.bit": [0, 1, 2],
        "fault.location": ["q", "k"],
        "model.dtype": ["float32"],
    }


def test_dotted_keys_and_sections_are_the_same(tmp_path: Path) -> None:
    dotted = file_with(tmp_path, "fault.index.row: 3\nfault: {index.col: 4, kind: zero}\n")
    fault = load_config(["--config", dotted]).fault
    assert fault == FaultConfig(kind="zero", index=IndexConfig(row=3, col=4))


# ------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fault.bitt", "3"], "fault.bitt: no such field; did you mean 'fault.bit'"),
        (["--faultbit", "3"], "faultbit: no such field; did you mean 'fault.bit'"),
        (["--modle.path", "x"], "modle.path: no such field; did you mean 'model.path'"),
        (["--zzz", "3"], "zzz: no such field"),
        (["--sweep.fault.locaton", "q,k"], "sweep.fault.locaton: no such field; did you mean 'fault.location'"),
        (["--sweep.fault", "3"], "sweep.fault: no such field"),
        (["--fault", "3"], "fault: no such field"),
        (["--fault.index", "3"], "fault.index: no such field"),
        (["--seed.x", "3"], "seed.x: no such field"),
    ],
)
def test_unknown_options_are_refused_with_the_nearest(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        load_config(arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", "sed: no such field; did you mean 'seed'"),
        ("fault: {bits: 1}", "fault.bits: no such field; did you mean 'fault.bit'"),
        ("fault: {index: {rwo: 1}}", "fault.index.rwo: no such field; did you mean 'fault.index.row'"),
        ("data: 5", "data: no such field"),
        ("fault: null", "fault: no such field"),
        ("detect: [finite]", "detect: no such field"),
        ("sweep: {fault.bitt: 0:4}", "sweep.fault.bitt: no such field; did you mean 'fault.bit'"),
        ("sweep: {fault: {bitt: 0:4}}", "sweep.fault.bitt: no such field; did you mean 'fault.bit'"),
        ("sweep: {sweep.seed: [1]}", "sweep.sweep.seed: no such field"),
        ("1: 2", "1: no such field"),
        ("fault: {1: 2}", "fault.1: no such field"),
        ("sweep: {3: [1]}", "sweep.3: no such field"),
    ],
)
def test_unknown_keys_of_a_file_are_refused_with_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        load_config(["--config", file_with(tmp_path, text)])


@pytest.mark.parametrize("text", ["sweep: [fault.bit]", "sweep: fault.bit", "sweep: 5", "sweep: [[fault.bit, 3]]"])
def test_axes_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"^sweep: "):
        load_config(["--config", file_with(tmp_path, text)])
    with pytest.raises(UsageError, match=r"^sweep: "):
        config_from_mapping(load_yaml(text))


def test_a_sweep_option_without_a_field_is_refused() -> None:
    with pytest.raises(UsageError, match="sweep"):
        load_config(["--sweep", "fault.bit"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"injection_locaton": "q"}, "injection_locaton: no such field; did you mean 'injection_location'"),
        ({"num_run": 3}, "num_run: no such field; did you mean 'num_runs'"),
        ({"fault.bit": 3}, "fault.bit: no such field"),
        ({"sweep": {"fault.bitt": [1]}}, "sweep.fault.bitt: no such field; did you mean 'fault.bit'"),
        ({"sweep": {"num_runs": [1, 2]}}, "sweep.num_runs: this field belongs to the campaign as a whole"),
        ({"sweep": {"fault.bit": []}}, "sweep.fault.bit: got no values"),
        ({"sweep": {"fault.location": ["q", "weigths"]}}, "fault.location: got 'weigths', .*did you mean 'weights'"),
        ({"sweep": {"fault.bit": [40]}}, "fault.bit: got 40, allowed 0..31 for float32"),
    ],
)
def test_keywords_that_cannot_be_meant_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        ExperimentConfig(**keywords)


def test_axes_given_in_python_are_written_as_everywhere() -> None:
    assert ExperimentConfig(sweep={"fault.bit": "0:4"}).sweep == {"fault.bit": [0, 1, 2, 3]}


@pytest.mark.parametrize("key", ["name", "output_dir", "num_runs", "slurm.time"])
def test_what_belongs_to_the_whole_campaign_cannot_be_swept(key: str) -> None:
    with pytest.raises(UsageError, match=rf"sweep\.{key}: this field belongs to the campaign as a whole"):
        load_config([f"--sweep.{key}", "1,2"])


# ------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1.5"], "seed: got 1.5, allowed int"),
        (["--seed", "x"], "seed: got x, allowed int"),
        (["--seed", "true"], "seed: got True, allowed int"),
        (["--seed", "-1"], "seed: got -1, allowed 0 or more"),
        (["--seed", ""], "seed: got"),
        (["--num_runs", "0"], "num_runs: got 0, allowed 1 or more"),
        (["--num_runs", "1e2"], "num_runs: got 100.0, allowed int"),
        (["--name", "../x"], "name: got '../x', allowed letters, digits"),
        (["--name", ".hidden"], "name: got '.hidden'"),
        (["--name", "a/b"], "name: got 'a/b'"),
        (["--model.path="], "model.path: got an empty text"),
        (["--model.dtype", "floot32"], "model.dtype: got 'floot32', .*did you mean 'float32'"),
        (["--model.device", "gpu"], "model.device: got 'gpu', allowed auto, cpu, cuda, cuda:N"),
        (["--model.force_kv_equal", "1"], "model.force_kv_equal: got 1, allowed bool"),
        (["--data.source", "txt:x"], "data.source: got 'txt:x', .*did you mean 'text'"),
        (["--data.source", "pydoc:x"], "data.source: got 'pydoc:x'"),
        (["--data.source", "text"], "data.source: got 'text'"),
        (["--data.seq_len", "1"], "data.seq_len: got 1, allowed 2 or more"),
        (["--data.num_samples", "3", "--data.batch_size", "2"], "data.num_samples: got 3, allowed a multiple"),
        (["--fault.location", "scroes"], "fault.location: got 'scroes', .*did you mean 'scores'"),
        (["--fault.kind", "bit_flip"], "fault.kind: got 'bit_flip', .*did you mean 'bitflip'"),
        (["--fault.bit", "1.0"], "fault.bit: got 1.0, allowed int or list or str or null"),
        (["--fault.bit", "expnent"], "fault.bit: got 'expnent', .*did you mean 'exponent'"),
        (["--fault.bit", "[]"], "fault.bit: got an empty list"),
        (["--fault.bit", "[3, 3]"], "fault.bit: 3 is given twice"),
        (["--fault.bit", "-1"], "fault.bit: got -1, allowed 0 or more"),
        (["--fault.bit", "null", "--fault.kind", "bit_error_rate"], "fault.rate: kind 'bit_error_rate' needs a rate"),
        (["--fault.bit", "null", "--fault.rate", "0.1"], "fault.rate: kind 'bitflip' has no use for a rate"),
        (["--fault.kind", "zero", "--fault.bit", "3"], "fault.bit: kind 'zero' has no use for a bit"),
        (["--fault.layers", "[0, 1.5]"], "fault.layers: got 1.5"),
        (["--fault.layers", "[]"], "fault.layers: got an empty list"),
        (["--fault.layers", "-1"], "fault.layers: got -1, allowed 0 or more"),
        (["--fault.layer_mode", "specific"], "fault.layer_mode: specific needs fault.layers or fault.layer_pattern"),
        (["--fault.layer_mode", "randm"], "fault.layer_mode: got 'randm', .*did you mean 'random'"),
        (["--fault.layer_pattern", "("], r"fault.layer_pattern: '\(' is no regular expression"),
        (["--fault.index.row", "-1"], "fault.index.row: got -1, allowed 0 or more"),
        (["--fault.aim", "largest"], "fault.aim: got 'largest', allowed uniform"),
        (["--detect.tolerance", "x"], "detect.tolerance: got x, allowed float"),
        (["--detect.tolerance", ".nan"], "detect.tolerance: got nan, allowed a finite number"),
        (["--detect.tolerance", "-1e-3"], "detect.tolerance: got -0.001, allowed a finite number of 0 or more"),
        (["--detect.critical_loss", ".inf"], "detect.critical_loss: got inf"),
        (["--detect.detectors", "[finit]"], "detect.detectors: .*got 'finit', .*did you mean 'finite'"),
        (["--detect.detectors", "finite"], "detect.detectors: got finite, allowed list"),
        (["--detect.detectors", "[finite, finite]"], "detect.detectors: a name is given twice"),
        (["--detect.correct", "3"], "detect.correct: got 3, allowed bool"),
        (["--run.threads", "0"], "run.threads: got 0, allowed 1 or more"),
        (["--run.engine", "fats"], "run.engine: got 'fats', allowed auto, plain, fast; did you mean 'fast'"),
        (
            ["--run.engine", "fast", "--run.reuse_baseline", "false"],
            "run.engine: got 'fast', allowed auto or plain if run.reuse_baseline is false",
        ),
        (["--run.scope", "sites"], "run.scope: got 'sites', allowed full, site; did you mean 'site'"),
        (["--run.batch_runs", "0"], "run.batch_runs: got 0, allowed 1 or more"),
        (["--run.batch_runs", "1.5"], "run.batch_runs: got 1.5, allowed int or null"),
        (["--run.full_every", "10"], "run.full_every: got 10, allowed null unless run.scope is site"),
        (["--run.full_every", "0", "--run.scope", "site"], "run.full_every: got 0, allowed 1 or more"),
        (["--run.full_every", "4", "--sweep.run.scope", "site,full"], "run.full_every: got 4, allowed null unless"),
        (["--detect.layers", "al"], "detect.layers: got 'al', allowed injected, all; did you mean 'all'"),
        (["--stop.margin", "0.6"], "stop.margin: got 0.6, allowed a number between 0 and 0.5"),
        (["--sweep.seed", "1.5"], "sweep.seed: got 1.5, allowed int"),
        (["--sweep.seed", "0,true"], "sweep.seed: got True, allowed int"),
        (["--sweep.fault.bit", "0.5"], "sweep.fault.bit: got 0.5"),
        (["--sweep.fault.bit", "0:33"], "fault.bit: got 32, allowed 0..31 for float32"),
        (["--sweep.fault.location", "q,weigths"], "fault.location: got 'weigths', .*did you mean 'weights'"),
        (["--sweep.fault.location", "q,"], r"(sweep\.)?fault.location: got ''"),
        (["--sweep.fault.layer_pattern", "h,("], r"fault.layer_pattern: '\(' is no regular expression"),
        (["--sweep.fault.location", "{"], "fault.location: got '{'"),
        (["--seed", "[1"], r"seed: got '\[1', which is not valid YAML"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_on_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}") as refusal:
        load_config(arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "keywords",
    [
        {"num_runs": "10"}, {"seed": 1.5}, {"seed": True}, {"injection_bit": 15.0}, {"injection_bit": "15"},
        {"injection_bit": True}, {"injection_layers": "0,1"}, {"injection_layers": [0, "1"]}, {"tolerance": "1e-5"},
        {"name": 5}, {"fault": "scores"}, {"data": {"seq_len": 8}}, {"detectors": "finite"}, {"num_runs": None},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_types_given_in_python_are_refused_too(keywords: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExperimentConfig(**keywords)


@pytest.mark.parametrize("arguments", [["x"], ["--seed"], ["-s", "3"], ["--"], ["--seed", "1", "2"], ["--=3"]])
def test_what_is_no_option_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        load_config(arguments)


def test_a_missing_file_is_a_missing_resource(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match=r"--config: no such file: .*nowhere\.yaml"):
        load_config(["--config", str(tmp_path / "nowhere.yaml")])
    with pytest.raises(MissingResourceError, match="--config: no such file"):
        load_config(["--config", str(tmp_path)])


@pytest.mark.parametrize("arguments", [["--config", ""], ["--config="]])
def test_an_empty_file_name_is_refused_and_does_not_mean_the_default_campaign(arguments: list[str]) -> None:
    # As from `--config "$UNSET"`.
    with pytest.raises((UsageError, MissingResourceError), match="--config"):
        load_config(arguments)


@pytest.mark.parametrize("text", ["a: b: c", "[1, 2", "{", "seed: 1\nseed: 2\n"])
def test_a_file_that_is_no_yaml_is_refused_on_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"--config: .* is not valid YAML") as refusal:
        load_config(["--config", file_with(tmp_path, text)])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- a\n", "list"), ("5", "int"), ("text", "str")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(UsageError, match=f"must hold a mapping of fields, got {kind}"):
        load_config(["--config", file_with(tmp_path, text)])


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_config(["--config", str(tmp_path / "x.yaml")])


# --------------------------------------------------------------------------------------------------- YAML traps


def test_numbers_and_ranges_in_a_file_are_what_they_look_like(tmp_path: Path) -> None:
    text = "detect: {tolerance: 1e-6, critical_loss: 1E-2}\nsweep:\n  fault.bit: 1:32\n  fault.index.row: [0:2, 7]\n"
    config = load_config(["--config", file_with(tmp_path, text)])
    assert config.detect.tolerance == 1e-6
    assert config.detect.critical_loss == 1e-2
    assert config.sweep == {"fault.bit": list(range(1, 32)), "fault.index.row": [0, 1, 7]}


def test_a_whole_number_is_allowed_where_a_float_is_and_becomes_one(tmp_path: Path) -> None:
    config = load_config(["--config", file_with(tmp_path, "detect: {tolerance: 1}\n")])
    assert (config.detect.tolerance, type(config.detect.tolerance)) == (1.0, float)


@pytest.mark.parametrize("text", ["/data/a #2.txt", "/data/a: b.txt", "/data/'a'.txt", "/data/a{1}.txt"])
def test_an_option_that_is_a_text_is_taken_as_it_is(text: str) -> None:
    assert load_config(["--model.path", text]).model.path == text
    assert load_config(["--data.source", f"text:{text}"]).data.source == f"text:{text}"


def test_a_campaign_may_be_named_after_a_day() -> None:
    assert load_config(["--name", "2024-01-01"]).name == "2024-01-01"


# ---------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_embedded_campaigns_load_plan_and_read_back(path: Path, tmp_path: Path) -> None:
    config = load_config(["--config", str(path)])
    dumped = file_with(tmp_path, dump_config(config))
    again = load_config(["--config", dumped])
    assert again == config
    assert flat_fields(again) == flat_fields(config)
    assert dump_config(again) == dump_config(config)
    assert [run.run_id for run in make_plan(again).runs] == [run.run_id for run in make_plan(config).runs]


BITS = st.one_of(
    st.none(),
    st.integers(0, 31),
    st.sampled_from(["sign", "exponent", "mantissa"]),
    st.lists(st.integers(0, 31), min_size=1, max_size=3, unique=True),
)
FAULTS = st.builds(
    FaultConfig,
    location=st.sampled_from(LOCATIONS),
    bit=BITS,
    kind=st.sampled_from(["bitflip", "stuck_at_0", "stuck_at_1"]),
    layers=st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    layer_pattern=st.one_of(st.none(), st.sampled_from([r"h\.[0-3]\.attn$", "1:2", "a: b", "12", " x"])),
    index=st.builds(IndexConfig, row=st.one_of(st.none(), st.integers(0, 9))),
    include_masked=st.booleans(),
)
CONFIGURATIONS = st.builds(
    ExperimentConfig,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
    seed=st.integers(0, 2**70),
    num_runs=st.integers(1, 9),
    output_dir=st.sampled_from(["results", "/tmp/a b", "1e5", "~", "é"]),
    model=st.builds(ModelConfig, path=st.sampled_from(["reference", "12", "a: b", "1e-6"]), revision=st.none()),
    data=st.builds(
        DataConfig, source=st.sampled_from(["pydoc", "text:/a #b.txt"]), field=st.sampled_from([None, "no"])
    ),
    fault=FAULTS,
    detect=st.builds(DetectConfig, tolerance=st.floats(0, 1e300), critical_loss=st.floats(0, 1e-300)),
)


@pytest.mark.parametrize("pattern", ["#", "null", "12", "1:2", "a: b", " x", "[h]", "h,", "~", "true", "-"])
def test_a_text_that_yaml_would_read_otherwise_stays_a_text(pattern: str) -> None:
    config = ExperimentConfig(injection_layer_pattern=pattern, output_dir=pattern, model=ModelConfig(path=pattern))
    again = config_from_mapping(load_yaml(dump_config(config)))
    assert (again.fault.layer_pattern, again.output_dir, again.model.path) == (pattern, pattern, pattern)


@settings(max_examples=25, phases=(Phase.explicit, Phase.generate))
@given(config=CONFIGURATIONS)
def test_what_is_written_is_read_back_equal(config: ExperimentConfig) -> None:
    assert config_from_mapping(load_yaml(dump_config(config))) == config


@pytest.mark.parametrize(
    "sweep",
    [
        {"fault.bit": [30, [0, 31], "sign", None]},
        {"detect.tolerance": [1e-6, 0.1]},
        {"model.dtype": ["float32", "float64"]},
        {"fault.layers": [None, 0, [0, 1]]},
        {"fault.layer_pattern": ["1", "h,", "a: b", "#"]},
        {"seed": [0, 1], "fault.location": ["q"]},
    ],
    ids=str,
)
def test_axes_are_written_and_read_back_equal(sweep: dict[str, Any]) -> None:
    config = ExperimentConfig(sweep=sweep)
    again = config_from_mapping(load_yaml(dump_config(config)))
    assert again.sweep == sweep
    assert again == config, "a campaign begun from Python could not be resumed"
    assert [run.run_id for run in make_plan(again).runs] == [run.run_id for run in make_plan(config).runs]


def test_every_field_can_be_given_as_an_option_and_is_dumped() -> None:
    defaults = flat_fields(ExperimentConfig())
    assert set(known_fields()) == set(defaults)
    for key in ("fault.index.col", "data.split", "model.trust_remote_code", "slurm.gres", "run.threads"):
        assert key in known_fields()


# ------------------------------------------------------------------------------------------------- flat spelling


def test_the_flat_spelling_is_that_of_the_sections() -> None:
    flat = ExperimentConfig(
        exp_name="demo",
        injection_layers=[0, 1],
        injection_layer_mode="specific",
        injection_location="scores",
        injection_bit=15,
        tolerance=1e-5,
        num_runs=10,
    )
    assert flat == ExperimentConfig(
        name="demo",
        num_runs=10,
        fault=FaultConfig(location="scores", bit=15, layers=[0, 1], layer_mode="specific"),
        detect=DetectConfig(tolerance=1e-5),
    )
    assert config_from_mapping(load_yaml(dump_config(flat))) == flat


def test_flat_spelling_and_sections_may_be_mixed() -> None:
    config = ExperimentConfig(fault=FaultConfig(location="q", kind="stuck_at_1"), injection_bit=3, exp_name="x")
    assert config.fault == FaultConfig(location="q", kind="stuck_at_1", bit=3)


def test_a_tuple_of_layers_is_a_list_of_layers() -> None:
    assert ExperimentConfig(injection_layers=(0, 1)) == ExperimentConfig(injection_layers=[0, 1])


@pytest.mark.parametrize(
    "keywords",
    [
        [("dtype", "float64"), ("injection_bit", 40), ("injection_location", "v")],
        [("injection_layer_mode", "specific"), ("injection_layers", [0])],
        [("num_samples", 6), ("batch_size", 6)],
    ],
    ids=str,
)
def test_the_order_of_keywords_does_not_matter(keywords: list[tuple[str, Any]]) -> None:
    assert ExperimentConfig(**dict(keywords)) == ExperimentConfig(**dict(reversed(keywords)))


# ------------------------------------------------------------------------------------------- bits of every dtype


def test_other_names_of_locations_give_the_same_configuration_and_the_same_runs() -> None:
    plain = ExperimentConfig(fault=FaultConfig(location="q"), sweep={"fault.location": ["q", "weights"]})
    other = ExperimentConfig(fault=FaultConfig(location="query"), sweep={"fault.location": ["keys", "weights"]})
    other = other.with_field("sweep", {"fault.location": ["queries", "probabilities"]})
    assert other == plain
    assert [run.run_id for run in make_plan(other).runs] == [run.run_id for run in make_plan(plain).runs]
    with pytest.raises(UsageError, match=r"sweep\.fault\.location: 'q' is given twice, once as 'query'"):
        ExperimentConfig(sweep={"fault.location": ["q", "query"]})


def test_effects_are_drawn_for_only_where_they_are_predicted() -> None:
    with pytest.raises(UsageError, match=r"fault\.aim: got 'effect', allowed .* weights, out \(got logits\)"):
        FaultConfig(location="logits", aim="effect")
    assert FaultConfig(location="logits", aim="bits").location == "logits"


@pytest.mark.parametrize(("dtype", "width"), list(WIDTHS.items()))
@pytest.mark.parametrize("location", LOCATIONS)
def test_the_highest_bit_is_allowed_and_the_next_is_not(dtype: str, width: int, location: str) -> None:
    # Some architectures compute scores and weights, and with rotation q and k, of a narrow model in float32.
    upcast = width < 32 and location in ("q", "k", "scores", "weights")
    highest = (32 if upcast else width) - 1
    ExperimentConfig(dtype=dtype, injection_location=location, injection_bit=highest)
    name = "float32" if upcast else dtype
    with pytest.raises(UsageError, match=rf"^fault\.bit: got {highest + 1}, allowed 0\.\.{highest} for {name}"):
        ExperimentConfig(model=ModelConfig(dtype=dtype), fault=FaultConfig(location=location, bit=[0, highest + 1]))


def test_a_bit_that_one_of_the_swept_dtypes_lacks_is_refused() -> None:
    arguments = ["--fault.location", "out", "--sweep.model.dtype", "float64,float32", "--sweep.fault.bit", "10,40"]
    with pytest.raises(UsageError, match=r"fault\.bit: got 40, allowed 0\.\.31 for float32"):
        make_plan(load_config(arguments))


def test_a_bit_that_every_swept_dtype_has_is_allowed() -> None:
    arguments = ["--fault.location", "out", "--sweep.model.dtype", "float64", "--sweep.fault.bit", "10,40"]
    assert len(make_plan(load_config(arguments)).runs) == 8


@pytest.mark.parametrize(
    "arguments",
    [
        ["--fault.bit", "null", "--fault.kind", "bit_error_rate", "--sweep.fault.rate", "1e-4,1e-3"],
        ["--fault.layer_mode", "specific", "--sweep.fault.layers", "0,1"],
        ["--data.num_samples", "6", "--sweep.data.batch_size", "2,3"],
        ["--fault.bit", "null", "--sweep.fault.kind", "zero,random_value,bitflip"],
    ],
    ids=lambda arguments: arguments[-2],
)
def test_axes_that_need_each_other_or_a_fixed_field_are_allowed(arguments: list[str]) -> None:
    plan = make_plan(load_config(arguments))
    for run in plan.runs[:: plan.config.num_runs]:
        plan.config_of(run)


@pytest.mark.parametrize(
    ("options", "propagated"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6]),
        (["--run.scope", "site"], []),
        (["--run.scope", "site", "--run.full_every", "1"], [0, 1, 2, 3, 4, 5, 6]),
        (["--run.scope", "site", "--run.full_every", "3"], [0, 3, 6]),
    ],
    ids=str,
)
def test_which_repeats_are_propagated(options: list[str], propagated: list[int]) -> None:
    run = load_config([*options, "--run.engine", "fast", "--run.batch_runs", "64"]).run
    assert [repeat for repeat in range(7) if run.propagates(repeat)] == propagated


@pytest.mark.parametrize(
    "axes",
    [
        ["--sweep.run.engine", "plain,fast", "--sweep.run.reuse_baseline", "true,false"],
        ["--sweep.run.scope", "site,full", "--sweep.run.full_every", "null,4"],
    ],
    ids=str,
)
def test_execution_that_is_not_allowed_in_one_point_of_the_grid_is_refused(axes: list[str]) -> None:
    with pytest.raises(UsageError, match=r"^run\.(engine|full_every): got"):
        make_plan(load_config(axes))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_configured(kind: str) -> None:
    rate = 1e-3 if kind == "bit_error_rate" else None
    assert FaultConfig(kind=kind, rate=rate).spec().kind == kind


# -------------------------------------------------------------------------------------------------- immutability


def test_configurations_cannot_be_changed() -> None:
    config = ExperimentConfig()
    for target, name in ((config, "seed"), (config.fault, "bit"), (config.fault.index, "row"), (config, "sweep")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(target, name, 3)
        with pytest.raises(dataclasses.FrozenInstanceError):
            delattr(target, name)


def test_configurations_can_be_copied_and_sent_to_another_process() -> None:
    config = ExperimentConfig(injection_layers=[0, 1], sweep={"fault.bit": [1, [2, 3]]})
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert isinstance(copied, ExperimentConfig)
    assert dataclasses.replace(config, seed=3) == config.with_field("seed", 3)


def test_a_misspelt_attribute_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        ExperimentConfig().nmu_runs = 3


def test_what_was_given_can_be_changed_afterwards_without_changing_the_configuration() -> None:
    layers, sweep, detectors = [0, 1], {"fault.bit": [1, 2]}, ["finite"]
    config = ExperimentConfig(injection_layers=layers, sweep=sweep, detectors=detectors)
    layers.append(99)
    detectors.append("nonsense")
    sweep["fault.bit"].append(99)
    sweep["nonsense"] = [1]
    assert config == ExperimentConfig(injection_layers=[0, 1], sweep={"fault.bit": [1, 2]}, detectors=["finite"])


def test_with_field_leaves_the_original_alone() -> None:
    config = ExperimentConfig(name="a", sweep={"seed": [0, 1]})
    other = config.with_field("fault.index.row", 3).with_name("b")
    assert (config.name, config.fault.index.row) == ("a", None)
    assert (other.name, other.fault.index.row, other.sweep) == ("b", 3, {"seed": [0, 1]})
    assert isinstance(other, ExperimentConfig)
    with pytest.raises(UsageError, match=r"fault\.index\.row: got -1"):
        config.with_field("fault.index.row", -1)


@pytest.mark.parametrize("key", ["fault.bitt", "sed", "fault.bit.x"])
def test_with_field_refuses_what_is_no_field(key: str) -> None:
    with pytest.raises(UsageError, match=rf"{key}: no such field"):
        ExperimentConfig().with_field(key, 3)


def test_read_config_file_returns_what_is_written(tmp_path: Path) -> None:
    path = file_with(tmp_path, "seed: 1\nfault: {bit: 0:4}\n")
    assert read_config_file(path) == {"seed": 1, "fault": {"bit": "0:4"}}
