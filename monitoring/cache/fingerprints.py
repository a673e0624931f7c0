"""The fingerprints that make a cache key exact.

A cached result may be served again only if *everything* that determines its bits is the same. Four
functions each cover one part of that:

=====================  ==================================================================================
``model_fingerprint``  every weight and buffer bit, config, attention implementation, device, math flags
``input_fingerprint``  every bit of the input tensors (or a prompt), shapes, batch composition class
``params_fingerprint`` everything else: layers, statistics collected, ``top_k``
``view_id``            which perturbed view of the model was run (fault, null rerun, K = V, adapter)
=====================  ==================================================================================

``model_fingerprint`` has a file of its own, ``monitoring.cache.model_fingerprints``. All digests are BLAKE2b-128, 32
hexadecimal digits; ``short`` keeps the first 12 for the trace.

>>> params_fingerprint({"layers": [0, 1], "dtype": torch.float32}) == params_fingerprint({"layers": [0, 1]})
False
>>> view_id(scaled=0.501), view_id(scaled=0.504), view_id(kv="K<-V", null=3), view_id()
('scaled:0.501', 'scaled:0.504', 'null:3+kv:K<-V', 'base')
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SHORT_DIGITS = 12
_VIEW_PARTS = ("null", "scaled", "fault", "kv", "adapter")


def short(fingerprint: str) -> str:
    """Return the 12-digit form of a fingerprint that goes into the trace."""
    return fingerprint[:SHORT_DIGITS]


def digest(*parts: bytes | str) -> str:
    """Return the BLAKE2b-128 of length-prefixed ``parts``, so that ("ab", "c") and ("a", "bc") differ."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's dtype, shape and raw bytes, wherever it lives.

    Bits are hashed, not values: 0.0 and -0.0 differ, as do two NaNs with different payloads. Strides and
    the device do not matter.

    Raises:
        ValueError: a tensor without readable bytes (meta device, sparse layout).
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(f"fingerprint: got a tensor on {tensor.device} with layout {tensor.layout}, need its bytes")
    state = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def canonical_json(value: object) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, exact floats, strict RFC 8259.

    Lists and tuples are the same; sets are sorted; dataclasses are their fields; NaN and infinities,
    torch dtypes and devices are tagged; mappings with keys that are not strings become sorted pairs.

    >>> canonical_json({"b": (1, 2.0), "a": float("nan")})
    '{"a":{"__float__":"nan"},"b":[1,2.0]}'

    Raises:
        TypeError: a value that has no canonical text.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: object) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"__float__": repr(float(value))}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
        return {"__map__": sorted(([_plain(k), _plain(v)] for k, v in value.items()), key=json.dumps)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"__set__": sorted((_plain(item) for item in value), key=json.dumps)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (torch.dtype, torch.device, os.PathLike)):
        return {f"__{type(value).__name__}__": str(value)}
    raise TypeError(
        f"canonical JSON: got {type(value).__name__}, allowed are JSON values, dataclasses and torch dtypes"
    )


# ------------------------------------------------------------------------------------------- inputs and params


def params_fingerprint(params: Mapping[str, object]) -> str:
    """Return the digest of everything that shapes a result but is neither model, input nor view."""
    return digest(canonical_json(params))


def input_fingerprint(
    batch: str | Tensor | Mapping[str, Tensor | None], composition: tuple[int, int] | None = None
) -> str:
    """Return the digest of a model input.

    Args:
        batch: keyword tensors of a forward call (``input_ids``, ``attention_mask``, ``position_ids``...), one
            tensor, or a prompt. Every name, dtype, shape and byte counts; an entry that is None is left out, as
            calling the model with None is calling it without.
        composition: ``(batch size, padded length)`` in which the input is really run, where that differs from its
            own shape: a matrix product may round one row differently in another batch. None: the input's own
            shape says it all.
    """
    if isinstance(batch, str):
        return digest("text", batch, repr(composition))
    tensors = {"input": batch} if isinstance(batch, Tensor) else batch
    parts: list[str] = []
    for name in sorted(tensors):
        tensor = tensors[name]
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"input fingerprint: {name!r} is {type(tensor).__name__}, allowed are tensors and None")
        parts += [name, tensor_digest(tensor)]
    if not parts:
        raise ValueError("input fingerprint: got a batch without a tensor")
    return digest("tensors", *parts, repr(composition))


def view_id(**parts: object) -> str:
    """Name a view of the model: ``base``, or its parts joined by ``+`` in one fixed order.

    Args:
        **parts: ``null=k`` a rerun without a fault; ``scaled=x`` a scaled adapter; ``fault=spec`` any fault
            (its canonical JSON is hashed); ``kv="K<-V"``; ``adapter=name``. Floats keep every digit.
    """
    unknown = set(parts) - set(_VIEW_PARTS)
    if unknown:
        raise TypeError(f"view_id: got {', '.join(sorted(unknown))}, allowed are {', '.join(_VIEW_PARTS)}")
    names = []
    for kind in _VIEW_PARTS:
        if kind not in parts:
            continue
        part = parts[kind]
        if kind == "fault":
            value = digest(canonical_json(part))
        else:  # 1e+22 is written 1e22: the plus sign joins parts
            value = repr(part).replace("e+", "e") if isinstance(part, float) else str(part)
        if not value or "+" in value:
            raise ValueError(f"view_id: {kind}={part!r} must be non-empty and without '+'")
        names.append(f"{kind}:{value}")
    return "+".join(names) or "base"
