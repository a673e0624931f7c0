"""The configuration of a campaign with the origin of each value.

A campaign does not store origins. They are derived from the resolved values, the defaults of the schema, the embedded
default campaign, and the arguments in ``provenance.json``. If none of these explains a value, it is marked ``set``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.config import read_config_file
from experiments.config.building import Sections, flat_fields, flatten
from experiments.config.experiment import DEFAULT_CONFIG
from experiments.plan.plan import canonical_json

ORIGINS = ("sweep", "option", "file", "set", "default")
"""The possible origins of a value, the more deliberate ones first."""


@dataclass(frozen=True)
class Setting:
    """One field: its dotted name, its value as text, and where the value comes from (one of ``ORIGINS``)."""

    field: str
    value: str
    origin: str


def setting_list(
    settings: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], arguments: Sequence[str] | None
) -> list[Setting]:
    """Return every field of a configuration.

    Args:
        settings: fields by dotted name, as ``config.yaml`` has them.
        axes: swept fields and their values.
        arguments: the command line of the campaign; ``None`` if it is not known.
    """
    options, file = _given_options(arguments or ())
    embedded = flatten(read_config_file(DEFAULT_CONFIG)) if arguments is not None and file is None else {}
    defaults = flat_fields(Sections())

    def origin(key: str, value: Any) -> str:
        if key in axes:
            return "sweep"
        if any(key == option or key.startswith(f"{option}.") for option in options):
            return "option"
        if key in defaults and defaults[key] == value:
            return "default"
        return "file" if file is not None or (key in embedded and embedded[key] == value) else "set"

    listed = [
        Setting(key, _axis_text(axes[key]) if key in axes else _text(value), origin(key, value))
        for key, value in settings.items()
    ]
    return sorted(listed, key=lambda setting: ORIGINS.index(setting.origin))


def _given_options(arguments: Sequence[str]) -> tuple[set[str], str | None]:
    """Return the fields that options name, and the file that ``--config`` names."""
    options: set[str] = set()
    file: str | None = None
    for token, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if token.startswith("--"):
            key, equals, value = token[2:].partition("=")
            options.add(key)
            file = (value if equals else following) if key == "config" else file
    return options, file


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _axis_text(values: Sequence[Any]) -> str:
    shown = [value if isinstance(value, str) else canonical_json(value) for value in values]
    if len(shown) > 3 and all(type(value) is int for value in values):
        steps = {after - before for before, after in itertools.pairwise(values)}
        if len(steps) == 1 and (step := steps.pop()) != 0:
            return f"{values[0]}:{values[-1] + step}" + ("" if step == 1 else f":{step}") + f" ({len(values)} values)"
    return ", ".join(shown[:64]) + (f", ... ({len(shown)} values)" if len(shown) > 64 else "")
