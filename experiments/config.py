"""The configuration of a campaign: made in Python, read from YAML, given as dotted options, or all of these.

    config = ExperimentConfig(name="bits", seed=1, fault=FaultConfig(location="scores", bit=30))
    config = ExperimentConfig(exp_name="bits", injection_location="scores", injection_bit=30)   # flat spelling
    config = load_config(["--config", "experiments/configs/default.yaml", "--fault.location", "q"])

Precedence: defaults, then the file, then the options; an option for a field removes a swept axis of that field.

Public names: ``ExperimentConfig``, ``load_config``, ``config_from_mapping``, ``known_fields``, ``flat_fields``,
``dump_config``, ``read_config_file``, and the sections of ``experiments.config_sections``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
    (``injection_location="scores"``), or both; a flat spelling counts more than its section.

    Raises:
        UsageError: an unknown keyword (with the nearest name), a wrong type, or a value that is not allowed.
    """

    def __init__(self, **keywords: Any) -> None:
        own = {f.name: type(f.default_factory()) for f in _FIELDS if f.default_factory is not dataclasses.MISSING}
        names = [f.name for f in _FIELDS]
        flat: dict[str, Any] = {}
        for key, value in sorted(keywords.items(), key=lambda item: item[0] in _FLAT):
            if key not in names and key not in _FLAT:
                raise UsageError(f"{key}: no such field{nearest(key, [*names, *_FLAT])}")
            if key in own and key != "sweep":
                if not isinstance(value, own[key]):
                    raise UsageError(f"{key}: got {type(value).__name__}, allowed {own[key].__name__}")
                flat.update(_flatten(dataclasses.asdict(value), f"{key}."))
            elif key != "sweep":
                flat[_FLAT.get(key, key)] = list(value) if isinstance(value, tuple) else value
        self._take(_build(flat, keywords.get("sweep", {})))

    def _take(self, sections: Sections) -> None:
        for f in _FIELDS:
            object.__setattr__(self, f.name, getattr(sections, f.name))

    @classmethod
    def of(cls, sections: Sections) -> ExperimentConfig:
        """Return sections that were checked as a configuration."""
        config = object.__new__(cls)
        config._take(sections)
        return config

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"{name}: a configuration cannot be changed; use with_field")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{name}: a configuration cannot be changed; use with_field")

    def with_field(self, key: str, value: Any) -> ExperimentConfig:
        """Return a copy in which the dotted field ``key`` (or ``sweep``) is ``value``."""
        flat = _flatten({f.name: _plain(getattr(self, f.name)) for f in _FIELDS})
        sweep = flat.pop("sweep")
        if key == "sweep":
            return self.of(_build(flat, value))
        return self.of(_build({**flat, key: value}, {axis: v for axis, v in sweep.items() if axis != key}))

    def with_name(self, name: str) -> ExperimentConfig:
        """Return a copy with another name."""
        return self.with_field("name", name)


_FIELDS = dataclasses.fields(Sections)


def replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a copy of (nested) sections with dotted fields changed at once; what is allowed together is checked.

    For values whose types were checked before; a plan calls this for every run.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    below: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            fields[head] = value
    fields.update({head: replaced(fields[head], inner) for head, inner in below.items()})
    return (Sections if isinstance(config, Sections) else type(config))(**fields)


@functools.cache
def known_fields() -> tuple[str, ...]:
    """Return the dotted names of all fields that can be set or swept."""
    return tuple(key for key in _flatten(dataclasses.asdict(Sections())) if key != "sweep")


def _flatten(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings by dotted names; the axes below ``sweep`` stay together."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" != "sweep":
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
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


def config_from_mapping(mapping: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration that a nested mapping describes, over the defaults.

    Raises:
        UsageError: an unknown key (with the nearest name), a wrong type, or a value that is not allowed.
    """
    flat = _flatten(mapping)
    return ExperimentConfig.of(_build(flat, flat.pop("sweep", None) or {}))


def _build(given: Mapping[str, Any], sweep: Any) -> Sections:
    """Return checked sections from dotted fields and axes."""
    flat = copy.deepcopy(dict(given))
    for key in flat:
        if key not in known_fields():
            raise UsageError(f"{key}: no such field{nearest(key, known_fields())}")
    if not isinstance(sweep, Mapping):
        raise UsageError(f"sweep: got {type(sweep).__name__}, allowed a mapping of fields to values")
    axes = {key: _axis(key, values) for key, values in _flatten(sweep).items()}
    for key, values in axes.items():
        # Fields that are swept together must also be allowed together, so the base is the first point of the grid.
        flat[key] = values[0]
    config = _parsed(flat)
    for key, values in axes.items():
        for value in values:
            replaced(config, {key: value})
    return dataclasses.replace(config, sweep=axes)


def _axis(key: str, values: Any) -> list[Any]:
    if key in ("name", "output_dir", "num_runs") or key.startswith("slurm."):
        raise UsageError(f"sweep.{key}: this field belongs to the campaign as a whole and cannot be swept")
    if key not in known_fields():
        raise UsageError(f"sweep.{key}: no such field{nearest(key, known_fields())}")
    written = axis_values(key, copy.deepcopy(values), text=_is_text(key))
    return [_typed({key: value}, f"sweep.{key}")[key] for value in written]


@functools.cache
def _types() -> dict[str, Any]:
    """Return the annotation of every field by its dotted name."""

    def below(cls: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                yield from below(hint, f"{prefix}{name}.")
            else:
                yield prefix + name, hint

    return dict(below(Sections, ""))


def _is_text(key: str) -> bool:
    """Whether a field holds a text and nothing else (but for ``null``)."""
    return _types()[key] in (str, str | None)


def _typed(flat: Mapping[str, Any], shown_key: str | None = None) -> dict[str, Any]:
    """Return the values as their fields' types have them; ``UsageError`` for another type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parsed = _flatten(_parser().parse_object(_nested(copy.deepcopy(dict(flat)))).as_dict())
        except ArgumentError as error:
            raise UsageError(_one_line(str(error), shown_key)) from error
    return {key: _unconverted(shown_key or key, key, given, parsed[key]) for key, given in flat.items()}


def _unconverted(shown_key: str, key: str, given: Any, parsed: Any) -> Any:
    """Undo what the parser reads into a text ("12" as a number, "#" as nothing); refuse any other conversion."""
    hint = _types()[key]
    whole_to_float = type(given) is int and type(parsed) is float
    missing = given is None and type(None) not in typing.get_args(hint)
    if not missing and (whole_to_float or _kinds(given) == _kinds(parsed)):
        return parsed
    if isinstance(given, str) and (hint is str or str in typing.get_args(hint)):
        return given
    kinds = " or ".join(getattr(kind, "__name__", str(kind)) for kind in typing.get_args(hint) or (hint,))
    raise UsageError(f"{shown_key}: got {given!r}, allowed {kinds.replace('NoneType', 'null')}")


def _kinds(value: Any) -> Any:
    return [_kinds(item) for item in value] if isinstance(value, list) else type(value)


def _parsed(flat: Mapping[str, Any]) -> Sections:
    sections: Any = Sections
    return typing.cast(Sections, _instance(sections, _nested(_typed(flat))))


def _instance(cls: type[Any], nested: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: _instance(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in nested.items()
        }
    )


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
    merged = _flatten(read_config_file(DEFAULT_CONFIG if path is None else path))
    axes = merged.pop("sweep", None) or {}
    if not isinstance(axes, Mapping):
        raise UsageError(f"sweep: got {type(axes).__name__}, allowed a mapping of fields to values")
    merged.update(options)
    kept = {key: values for key, values in _flatten(axes).items() if key not in options}
    return config_from_mapping({**merged, "sweep": {**kept, **sweeps}})


def read_config_file(path: str | Path) -> dict[Any, Any]:
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
    return content


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
        elif key == "sweep":
            raise UsageError("--sweep: needs a field, e.g. --sweep.fault.bit 0:32")
        elif key.startswith("sweep."):
            sweeps[key.removeprefix("sweep.")] = value
        else:
            options.update(_flatten({key: _value(key, value)}))
    return options, sweeps, path


def _value(key: str, text: str) -> Any:
    if key in known_fields() and _is_text(key):
        optional = type(None) in typing.get_args(_types()[key])
        return None if optional and text == "null" else text
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
