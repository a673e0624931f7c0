"""Nested results as values: copied in, copied out, measured and checked.

A forward pass gives a nested structure: logits, a loss, per-layer statistics. The cache must own its copy and
lend copies only, or one caller's in-place edit would rewrite the baseline of every later run. Three functions
share one walk over dicts, lists, tuples, named tuples and dataclasses:

    clone_value(value)    an independent copy: tensors detached and cloned, containers rebuilt
    value_nbytes(value)   sum of the tensors' ``nbytes`` (NumPy arrays too; plain values count 0)
    value_digest(value)   BLAKE2b-128 over plain values and raw tensor bytes, each with its place

>>> value = {"logits": torch.zeros(2, 3), "loss": 1.5}
>>> copy = clone_value(value)
>>> _ = copy["logits"].fill_(7.0)
>>> value["logits"].sum().item(), value_nbytes(value)
(0.0, 24)
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from monitoring.cache.fingerprints import digest, tensor_digest

Leaf = Callable[[str, Any], Any]
V = TypeVar("V")

_IMMUTABLE = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    enum.Enum,
    np.generic,
    torch.dtype,
    torch.device,
    torch.Size,
)


def clone_value(value: V) -> V:
    """Return a copy that shares no tensor memory and no container with ``value``.

    Raises:
        TypeError: something inside is neither a known container, a tensor, an array nor immutable;
            the message names the place.
    """

    def copied(_: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    result: V = map_leaves(value, copied)
    return result


def value_nbytes(value: object) -> int:
    """Return the bytes of all tensors and arrays inside ``value``."""
    sizes: list[int] = []
    map_leaves(value, lambda _, leaf: sizes.append(leaf.nbytes) if _is_array(leaf) else None)
    return sum(sizes)


def value_digest(value: object) -> str:
    """Return a digest that changes with any bit of any tensor and with any plain value or its place."""
    parts: list[str | bytes] = []

    def note(place: str, leaf: Any) -> None:
        parts.extend((place, type(leaf).__name__))
        if isinstance(leaf, np.ndarray):
            parts.extend((str(leaf.dtype), str(leaf.shape), leaf.tobytes()))
        else:
            parts.append(tensor_digest(leaf) if isinstance(leaf, Tensor) else repr(leaf))

    map_leaves(value, note)
    return digest(*parts)


def map_leaves(value: Any, leaf: Leaf, place: str = "value") -> Any:
    """Rebuild ``value`` with ``leaf(place, item)`` in the place of every tensor, array and plain item.

    Raises:
        TypeError: an item that could be changed behind the cache's back.
    """
    if isinstance(value, (Tensor, *_IMMUTABLE)) or (isinstance(value, np.ndarray) and not value.dtype.hasobject):
        return leaf(place, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(value, leaf, place)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, map_leaves(item, leaf, f"{place}[{key!r}]")) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, leaf, f"{place}[{index}]") for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    raise TypeError(
        f"{place}: cannot keep a {type(value).__name__}; allowed are tensors, arrays, plain values, "
        "and dicts, lists, tuples and dataclasses of them"
    )


def _map_dataclass(value: Any, leaf: Leaf, place: str) -> Any:
    mapped = {
        field.name: map_leaves(getattr(value, field.name), leaf, f"{place}.{field.name}")
        for field in dataclasses.fields(value)
    }
    if isinstance(value, Mapping):  # transformers' ModelOutput: a dict and a dataclass at once
        return type(value)(**mapped)
    # Built without __init__, whose checks and derivations the original has already been through.
    copy = object.__new__(type(value))
    for name, item in mapped.items():
        object.__setattr__(copy, name, item)
    return copy


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, (Tensor, np.ndarray))
