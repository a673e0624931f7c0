"""Build all sections of a configuration, as one typed value, from dotted fields and axes.

>>> sections = build_sections({"name": "bits", "fault.location": "q", "seed": 3}, {"fault.bit": "0:3"})
>>> sections.fault.location, sections.seed, sections.sweep
('q', 3, {'fault.bit': [0, 1, 2]})

A value that has exactly the type of its field is taken as it is. jsonargparse checks the others; it is loaded only for
them. It also converts some texts ("12" to a number, "#" to nothing); this module undoes that and refuses any other
conversion, so that a configuration means what was written.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experiments.config.axes import axis_values
from experiments.config.checks import check_at_least
from experiments.config.fault_section import FaultConfig
from experiments.config.sections import DataConfig, DetectConfig, ModelConfig, RunConfig, StopConfig
from experiments.config.slurm_section import SlurmConfig
from experiments.errors import UsageError
from fault_injection.locations import LOCATION_TABLE
from fault_injection.names import nearest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass(frozen=True)
class Sections:
    """All sections of a configuration; users make an ``ExperimentConfig``.

    Attributes:
        name: the campaign's folder below ``output_dir``.
        seed: determines the data windows and, with the rest of the run, every fault.
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
        self.stop.check_with(self.fault, self.run)


FIELDS = dataclasses.fields(Sections)


def replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """Return a copy of (nested) sections with dotted fields changed at once; check that the values fit together.

    The types of the values must have been checked before. A plan calls this for every run.
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
    return tuple(key for key in flatten(dataclasses.asdict(Sections())) if key != "sweep")


def flatten(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted names; the axes under ``sweep`` stay together."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" != "sweep":
            flat.update(flatten(value, f"{prefix}{key}."))
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
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(Sections)
    return parser


def build_sections(given: Mapping[str, Any], sweep: Any) -> Sections:
    """Return checked sections from dotted fields and axes.

    Raises:
        UsageError: a field is unknown (the message has the nearest name), or a value or its type is not allowed.
    """
    flat = copy.deepcopy(dict(given))
    for key in flat:
        if key not in known_fields():
            raise UsageError(f"{key}: no such field{nearest(key, known_fields())}")
    if not isinstance(sweep, Mapping):
        raise UsageError(f"sweep: got {type(sweep).__name__}, allowed a mapping of fields to values")
    axes = {key: _axis(key, values) for key, values in flatten(sweep).items()}
    for key, values in axes.items():
        # Fields that are swept together must also be allowed together, so the base is the first point of the grid.
        flat[key] = values[0]
    config = _parsed(flat)
    for key, values in axes.items():
        for value in values:
            replaced(config, {key: value})
    return dataclasses.replace(config, sweep=axes)


def _axis(key: str, values: Any) -> list[Any]:
    if key in ("name", "output_dir", "num_runs", "detect.record") or key.startswith(("slurm.", "stop.")):
        raise UsageError(f"sweep.{key}: this field belongs to the campaign as a whole and cannot be swept")
    if key not in known_fields():
        raise UsageError(f"sweep.{key}: no such field{nearest(key, known_fields())}")
    written = axis_values(key, copy.deepcopy(values), text=is_text(key))
    kinds: dict[type[Any], type[Any]] = {}
    typed: list[Any] = []
    for value in written:
        if isinstance(value, list) or type(value) not in kinds:
            typed.append(_typed({key: value}, f"sweep.{key}")[key])
            kinds[type(value)] = type(typed[-1])
        else:
            # A long axis of one type is checked once; an integer may be given for a float.
            typed.append(value if kinds[type(value)] is type(value) else kinds[type(value)](value))
    return _canonical_locations(typed) if key == "fault.location" else typed


def _canonical_locations(values: list[Any]) -> list[Any]:
    """Return the canonical names of locations: the identity of a run uses these, whatever alias was written."""
    try:
        names = [LOCATION_TABLE[value].name for value in values]
    except ValueError as error:
        raise UsageError(str(error)) from error
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UsageError(f"sweep.fault.location: {name!r} is given twice, once as {values[place]!r}")
    return names


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


def is_text(key: str) -> bool:
    """Return whether a field holds only a text (or ``null``)."""
    return _types()[key] in (str, str | None)


def is_optional(key: str) -> bool:
    """Return whether a field may be ``null``."""
    return type(None) in typing.get_args(_types()[key])


def _typed(flat: Mapping[str, Any], shown_key: str | None = None) -> dict[str, Any]:
    """Return the values with the types of their fields; raise ``UsageError`` if a type is wrong."""
    if all(_fits(value, _types()[key]) for key, value in flat.items()):
        return dict(flat)
    # Imported here: most configurations do not come this far.
    from jsonargparse import ArgumentError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parsed = flatten(_parser().parse_object(_nested(copy.deepcopy(dict(flat)))).as_dict())
        except ArgumentError as error:
            raise UsageError(_one_line(str(error), shown_key)) from error
    return {key: _unconverted(shown_key or key, key, given, parsed[key]) for key, given in flat.items()}


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has exactly one of the types of a field."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list):
        elements = {kind for allow in allowed if typing.get_origin(allow) is list for kind in typing.get_args(allow)}
        return bool(elements) and all(type(item) in elements for item in value)
    return type(value) in allowed


def _unconverted(shown_key: str, key: str, given: Any, parsed: Any) -> Any:
    """Undo the parser's conversion of texts ("12" to a number, "#" to nothing); refuse any other conversion."""
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


def plain(value: Any) -> Any:
    """Return a section as nested mappings, and any other value unchanged."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def flat_fields(config: Sections) -> dict[str, Any]:
    """Return every field by its dotted name; axes as ``sweep.<field>``."""
    flat = flatten({f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(Sections)})
    return {**{key: value for key, value in flat.items() if key != "sweep"}, **_prefixed(flat.get("sweep") or {})}


def _prefixed(sweep: Mapping[str, Any]) -> dict[str, Any]:
    return {f"sweep.{key}": value for key, value in sweep.items()}
