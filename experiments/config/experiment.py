"""The configuration of a campaign, from Python, from YAML, from dotted options, or from all of these.

>>> from experiments.config import FaultConfig
>>> config = ExperimentConfig(name="bits", seed=1, fault=FaultConfig(location="scores", bit=30))
>>> config == ExperimentConfig(exp_name="bits", seed=1, injection_location="scores", injection_bit=30)  # flat spelling
True
>>> load_config(["--name", "bits", "--fault.location", "q"]).fault.location  # also --config FILE, in front of the rest
'q'

Precedence: defaults, then the file, then the options; an option for a field removes a swept axis of that field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.config.building import (
    FIELDS,
    Sections,
    build_sections,
    flatten,
    is_optional,
    is_text,
    known_fields,
    plain,
)
from experiments.config.yaml_text import dump_yaml, load_yaml
from experiments.errors import MissingResourceError, UsageError
from fault_injection.names import nearest

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "default.yaml"


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
    """The immutable configuration of a campaign.

    It takes the sections by name (``fault=FaultConfig(...)``), their fields in the flat spelling
    (``injection_location="scores"``), or both; a flat spelling overrides its section.

    Raises:
        UsageError: an unknown keyword (with the nearest name), a wrong type, or a value that is not allowed.
    """

    def __init__(self, **keywords: Any) -> None:
        own = {f.name: type(f.default_factory()) for f in FIELDS if f.default_factory is not dataclasses.MISSING}
        names = [f.name for f in FIELDS]
        flat: dict[str, Any] = {}
        for key, value in sorted(keywords.items(), key=lambda item: item[0] in _FLAT):
            if key not in names and key not in _FLAT:
                raise UsageError(f"{key}: no such field{nearest(key, [*names, *_FLAT])}")
            if key in own and key != "sweep":
                if not isinstance(value, own[key]):
                    raise UsageError(f"{key}: got {type(value).__name__}, allowed {own[key].__name__}")
                flat.update(flatten(dataclasses.asdict(value), f"{key}."))
            elif key != "sweep":
                flat[_FLAT.get(key, key)] = list(value) if isinstance(value, tuple) else value
        self._take(build_sections(flat, keywords.get("sweep", {})))

    def _take(self, sections: Sections) -> None:
        for f in FIELDS:
            object.__setattr__(self, f.name, getattr(sections, f.name))

    @classmethod
    def of(cls, sections: Sections) -> ExperimentConfig:
        """Return a configuration from sections that were checked before."""
        config = object.__new__(cls)
        config._take(sections)
        return config

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"{name}: a configuration cannot be changed; use with_field")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"{name}: a configuration cannot be changed; use with_field")

    def with_field(self, key: str, value: Any) -> ExperimentConfig:
        """Return a copy in which the dotted field ``key`` (or ``sweep``) is ``value``."""
        flat = flatten({f.name: plain(getattr(self, f.name)) for f in FIELDS})
        sweep = flat.pop("sweep")
        if key == "sweep":
            return self.of(build_sections(flat, value))
        return self.of(build_sections({**flat, key: value}, {axis: v for axis, v in sweep.items() if axis != key}))

    def with_name(self, name: str) -> ExperimentConfig:
        """Return a copy with another name."""
        return self.with_field("name", name)


def config_from_mapping(mapping: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration that a nested mapping describes; missing fields have their defaults.

    Raises:
        UsageError: an unknown key (with the nearest name), a wrong type, or a value that is not allowed.
    """
    flat = flatten(mapping)
    return ExperimentConfig.of(build_sections(flat, flat.pop("sweep", None) or {}))


def load_config(arguments: Sequence[str]) -> ExperimentConfig:
    """Return the configuration that command-line options describe.

    Args:
        arguments: ``--config FILE``, ``--<dotted field> VALUE`` (or ``=VALUE``) and ``--sweep.<field> VALUES``.
            Without ``--config`` the embedded default campaign is the base.

    Raises:
        UsageError: an option or a value makes no sense.
        MissingResourceError: the configuration file does not exist.
    """
    options, sweeps, path = _split(arguments)
    merged = flatten(read_config_file(DEFAULT_CONFIG if path is None else path))
    axes = merged.pop("sweep", None) or {}
    if not isinstance(axes, Mapping):
        raise UsageError(f"sweep: got {type(axes).__name__}, allowed a mapping of fields to values")
    merged.update(options)
    kept = {key: values for key, values in flatten(axes).items() if key not in options}
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
            options.update(flatten({key: _value(key, value)}))
    return options, sweeps, path


def _value(key: str, text: str) -> Any:
    if key in known_fields() and is_text(key):
        optional = is_optional(key)
        return None if optional and text == "null" else text
    if key == "detect.detectors" and "," in text and not text.startswith("["):
        text = f"[{text}]"
    try:
        return load_yaml(text) if text else text
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: got {text!r}, which is not valid YAML: {' '.join(str(error).split())}") from error


def dump_config(config: Sections) -> str:
    """Return the configuration as YAML text; ``--config`` reads it back as an equal configuration."""
    return dump_yaml({f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(Sections)})
