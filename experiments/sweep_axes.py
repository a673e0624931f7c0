"""The values of one axis of a grid, as they are written on the command line or in YAML.

Public names: ``axis_values``.

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

from experiments.errors import UsageError
from experiments.yaml_text import load_yaml

_RANGE = re.compile(r"(-?\d+):(-?\d+)(?::(-?\d+))?")


def axis_values(key: str, values: Any) -> list[Any]:
    """Return the values of the axis ``key``.

    Args:
        key: the dotted field, for messages.
        values: a comma list or a ``start:stop[:step]`` range as text, or a list (whose texts may be ranges).

    Raises:
        UsageError: an empty axis or range, or a value that is given twice.
    """
    if isinstance(values, str):
        text = values.strip()
        parts = load_list(key, text) if text.startswith("[") else [part.strip() for part in text.split(",")]
    else:
        parts = values if isinstance(values, list) else [values]
    expanded = [value for part in parts for value in _expanded(key, part, parsed=not isinstance(values, list))]
    if not expanded:
        raise UsageError(f"sweep.{key}: got no values")
    for position, value in enumerate(expanded):
        if any(value == other and type(value) is type(other) for other in expanded[:position]):
            raise UsageError(f"sweep.{key}: {value!r} is given twice")
    return expanded


def load_list(key: str, text: str) -> list[Any]:
    """Read a YAML list."""
    try:
        loaded = load_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"sweep.{key}: got {text!r}, which is not a valid list") from error
    return loaded if isinstance(loaded, list) else [loaded]


def _expanded(key: str, part: Any, *, parsed: bool) -> list[Any]:
    if not isinstance(part, str):
        return [part]
    match = _RANGE.fullmatch(part)
    if match is None:
        return [load_yaml(part) if parsed and part else part]
    start, stop, step = int(match[1]), int(match[2]), int(match[3] or 1)
    if step == 0 or not range(start, stop, step):
        raise UsageError(f"sweep.{key}: the range {part} is empty")
    return list(range(start, stop, step))
