"""Read the values of one axis of a grid from the command line or from YAML.

>>> axis_values("fault.bit", "0:4")
[0, 1, 2, 3]
>>> axis_values("fault.location", "scores,weights")
['scores', 'weights']
>>> axis_values("fault.bit", [30, [0, 31], "8:24:8"])
[30, [0, 31], 8, 16]
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from experiments.config.yaml_text import load_yaml
from experiments.errors import UsageError

_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")


def axis_values(key: str, values: Any, *, text: bool = False) -> list[Any]:
    """Return the values of the axis ``key``.

    Args:
        key: the dotted field, for messages.
        values: a comma list or a ``start:stop[:step]`` range as text, or a list (whose texts may be ranges).
        text: whether the field holds texts: then numbers, ranges and YAML are not interpreted.

    Raises:
        UsageError: an axis or range is empty, a text is not valid YAML, or a value is given twice.
    """
    written = isinstance(values, str)
    if isinstance(values, str):
        stripped = values.strip()
        parts = load_list(key, stripped) if stripped.startswith("[") else [part.strip() for part in stripped.split(",")]
        parts = [] if parts == [""] else parts
        written = not stripped.startswith("[")
    else:
        parts = list(values) if isinstance(values, (list, tuple)) else [values]
    expanded = [value for part in parts for value in ([part] if text else _expanded(key, part, parsed=written))]
    if not expanded:
        raise UsageError(f"sweep.{key}: got no values")
    for position, value in enumerate(expanded):
        if any(value == other and type(value) is type(other) for other in expanded[:position]):
            raise UsageError(f"sweep.{key}: {value!r} is given twice")
    return expanded


def load_list(key: str, text: str) -> list[Any]:
    """Read a YAML list."""
    loaded = _loaded(key, text)
    return loaded if isinstance(loaded, list) else [loaded]


def _loaded(key: str, text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"sweep.{key}: got {text!r}, which is not valid YAML") from error


def _expanded(key: str, part: Any, *, parsed: bool) -> list[Any]:
    if not isinstance(part, str):
        return [part]
    match = _RANGE.fullmatch(part)
    if match is None:
        return [_loaded(key, part) if parsed and part else part]
    start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step == 0 or not range(start, stop, step):
        raise UsageError(f"sweep.{key}: the range {part} is empty")
    return list(range(start, stop, step))
