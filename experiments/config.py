"""The configuration of a campaign: made in Python, read from YAML, given as dotted options, or all of these.

    config = ExperimentConfig(name="bits", seed=1, fault=FaultConfig(location="scores", bit=30))
    config = ExperimentConfig(exp_name="bits", injection_location="scores", injection_bit=30)   # flat spelling
    config = load_config(["--config", "experiments/configs/default.yaml", "--fault.location", "q"])

Precedence: defaults, then the file, then the options; an option for a field removes a swept axis of that field.

Public names: ``ExperimentConfig``, ``load_config``, ``config_from_mapping``, ``known_fields``, ``flat_fields``,
``dump_config``, ``read_config_file``, and the sections of ``experiments.config_sections``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from experiments.config_sections import (
    DataConfig,
    DetectConfig,
    FaultConfig,
    IndexConfig,
    ModelConfig,
    RunConfig,
    SlurmConfig,
    StopConfig,
    check_at_least,
)
from experiments.errors import MissingResourceError, UsageError
from experiments.sweep_axes import axis_values
from experiments.yaml_text import dump_yaml, load_yaml
from fault_injection.names import nearest

__all__ = [
    "DataConfig",
    "DetectConfig",
    "ExperimentConfig",
    "FaultConfig",
    "IndexConfig",
    "ModelConfig",
    "RunConfig",
    "SlurmConfig",
    "StopConfig",
    "config_from_mapping",
    "dump_config",
    "flat_fields",
    "known_fields",
    "load_config",
    "read_config_file",
]

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default.yaml"


@dataclass(frozen=True)
class Sections:
    """All sections of a configuration; users make an ``ExperimentConfig``.

    Attributes:
        name: the campaign's folder below ``output_dir``.
        seed: decides the data windows and, with the rest of the run, every fault.
        num_runs: repeats of every point of the grid.
        output_dir: where campaigns are written.
        sweep: axes of the grid: dotted field name -> values.
    """

    name: str = "default"
    seed: int = 0
    num_runs: int = 1
    output_dir: str = "results"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    sweep: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UsageError(f"name: got {self.name!r}, allowed letters, digits, '.', '_' and '-'")
        check_at_least("num_runs", self.num_runs, 1)
        check_at_least("seed", self.seed, 0)
        self.fault.check_bits_of(self.model.dtype)


_FLAT = {
    "exp_name": "name",
    "model_name": "model.path",
    "model_path": "model.path",
    "dtype": "model.dtype",
    "device": "model.device",
    "force_kv_equal": "model.force_kv_equal",
    "data_source": "data.source",
    "num_samples": "data.num_samples",
    "seq_len": "data.seq_len",
    "batch_size": "data.batch_size",
    "injection_layers": "fault.layers",
    "injection_layer_mode": "fault.layer_mode",
    "injection_layer_pattern": "fault.layer_pattern",
    "injection_location": "fault.location",
    "injection_bit": "fault.bit",
    "injection_kind": "fault.kind",
    "tolerance": "detect.tolerance",
    "detectors": "detect.detectors",
    "critical_loss": "detect.critical_loss",
}


class ExperimentConfig(Sections):
    """A campaign's configuration, immutable.

    Takes the sections by name (``fault=FaultConfig(...)``), their fields in the flat spelling
    (``injection_location="scores"``), or both.

    Raises:
        UsageError: an unknown keyword (with the nearest name) or a value that is not allowed.
    """

    def __init__(self, **keywords: Any) -> None:
        own = {f.name for f in dataclasses.fields(Sections)}
        flat = {_FLAT[key]: value for key, value in keywords.items() if key in _FLAT}
        unknown = [key for key in keywords if key not in own and key not in _FLAT]
        if unknown:
            raise UsageError(f"{unknown[0]}: no such field{nearest(unknown[0], [*own, *_FLAT])}")
        sections = {key: value for key, value in keywords.items() if key in own}
        config = Sections(**sections)
        for key, value in flat.items():
            value = list(value) if isinstance(value, tuple) else value
            config = replaced(config, key, value)
        for f in dataclasses.fields(Sections):
            object.__setattr__(self, f.name, getattr(config, f.name))

    def with_field(self, key: str, value: Any) -> ExperimentConfig:
        """Return a copy in which the dotted field ``key`` is ``value``."""
        return _as_config(replaced(self, key, value))

    def with_name(self, name: str) -> ExperimentConfig:
        """Return a copy with another name."""
        return self.with_field("name", name)


def replaced(config: Any, key: str, value: Any) -> Any:
    """Return a copy of a (nested) dataclass in which the dotted field ``key`` is ``value``; checks run again."""
    head, _, rest = key.partition(".")
    inner = replaced(getattr(config, head), rest, value) if rest else value
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    cls = Sections if isinstance(config, Sections) else type(config)
    return cls(**{**fields, head: inner})


def _as_config(sections: Sections) -> ExperimentConfig:
    return ExperimentConfig(**{f.name: getattr(sections, f.name) for f in dataclasses.fields(Sections)})


def known_fields() -> list[str]:
    """Return the dotted names of all fields that can be set or swept."""
    return [key for key in _flatten(dataclasses.asdict(Sections())) if key != "sweep"]


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and prefix + key != "sweep":
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return nested


@functools.cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(Sections)
    return parser


def config_from_mapping(mapping: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Return the configuration that a nested mapping describes, over the (nested) ``base``.

    Raises:
        UsageError: an unknown key (with the nearest name), a wrong type, or a value that is not allowed.
    """
    flat = {**_flatten(base or {}), **_flatten(mapping)}
    sweep = dict(flat.pop("sweep", None) or {})
    known = known_fields()
    for key in flat:
        if key not in known:
            raise UsageError(f"{key}: no such field{nearest(key, known)}")
    axes = {key: axis_values(key, value) for key, value in _flatten(sweep).items()}
    for key, values in axes.items():
        _check_axis(key, values, known)
        # Fields that are swept together must also be allowed together, so the base is the first point of the grid.
        flat[key] = values[0]
    config = _parsed(_nested(flat))
    for key, values in axes.items():
        for value in values:
            replaced(config, key, value)
    return _as_config(dataclasses.replace(config, sweep=axes))


def _check_axis(key: str, values: list[Any], known: Sequence[str]) -> None:
    if key in ("name", "output_dir", "num_runs") or key.startswith("slurm."):
        raise UsageError(f"sweep.{key}: this field belongs to the campaign as a whole and cannot be swept")
    if key not in known:
        raise UsageError(f"sweep.{key}: no such field{nearest(key, known)}")
    for value in values:
        _check_type(key, value)


def _check_type(key: str, value: Any) -> None:
    """Refuse a value of another type; whether it is allowed is decided with the rest of the configuration."""
    try:
        _parsed(_nested({key: value}), f"sweep.{key}")
    except UsageError as error:
        if f"sweep.{key}" in str(error):
            raise


def _parsed(nested: Mapping[str, Any], shown_key: str | None = None) -> Sections:
    parser = _parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.parse_object(dict(nested))
            values = parser.instantiate(namespace)
    except ArgumentError as error:
        raise UsageError(_one_line(str(error), shown_key)) from error
    return Sections(**vars(values))


def _one_line(message: str, shown_key: str | None) -> str:
    key = re.search(r'key "([^"]+)"', message)
    got = re.search(r"(?:Given value|Got value): (.*)", message)
    expected = re.findall(r"Expected an? <class '(\w+)'>", message)
    if key is None or got is None:
        return " ".join(message.split())
    kinds = " or ".join({"NoneType": "null"}.get(kind, kind) for kind in dict.fromkeys(expected)) or "another type"
    return f"{shown_key or key.group(1)}: got {got.group(1)}, allowed {kinds}"


def load_config(arguments: Sequence[str]) -> ExperimentConfig:
    """Return the configuration that command-line options describe.

    Args:
        arguments: ``--config FILE``, ``--<dotted field> VALUE`` (or ``=VALUE``) and ``--sweep.<field> VALUES``.
            Without ``--config`` the embedded default campaign is the base.

    Raises:
        UsageError: anything that cannot be meant.
        MissingResourceError: the configuration file does not exist.
    """
    options, sweeps, path = _split(arguments)
    base = read_config_file(path or DEFAULT_CONFIG)
    merged = _flatten(base)
    merged.update(options)
    axes = _flatten(merged.pop("sweep", None) or {})
    for key in options:
        axes.pop(key, None)
    axes.update(sweeps)
    return config_from_mapping({**_nested(merged), "sweep": axes})


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, with dotted keys allowed at any level."""
    path = Path(path)
    if not path.is_file():
        raise MissingResourceError(f"--config: no such file: {path}")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config: {path} must hold a mapping of fields, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _split(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    options: dict[str, Any] = {}
    sweeps: dict[str, Any] = {}
    path: str | None = None
    pending = list(arguments)
    while pending:
        token = pending.pop(0)
        if not token.startswith("--"):
            raise UsageError(f"{token}: unexpected argument; options start with --")
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not pending:
                raise UsageError(f"--{key}: needs a value")
            value = pending.pop(0)
        if key == "config":
            path = value
        elif key.startswith("sweep."):
            sweeps[key.removeprefix("sweep.")] = value
        else:
            options[key] = _scalar(key, value)
    return options, sweeps, path


def _scalar(key: str, text: str) -> Any:
    try:
        return load_yaml(text) if text else text
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: got {text!r}, which is not valid YAML: {' '.join(str(error).split())}") from error


def dump_config(config: Sections) -> str:
    """Return the configuration as YAML text that ``--config`` reads back to an equal configuration."""
    return dump_yaml({f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(Sections)})


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def flat_fields(config: Sections) -> dict[str, Any]:
    """Return every field by its dotted name; axes as ``sweep.<field>``."""
    flat = _flatten({f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(Sections)})
    return {**{key: value for key, value in flat.items() if key != "sweep"}, **_prefixed(flat.get("sweep") or {})}


def _prefixed(sweep: Mapping[str, Any]) -> dict[str, Any]:
    return {f"sweep.{key}": value for key, value in sweep.items()}
