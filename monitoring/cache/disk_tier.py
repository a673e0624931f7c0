"""The second tier of the forward cache: results in files, so that another process need not compute them again.

    keys/<key digest>.json               the whole key, and the digest of the file that holds its value
    objects/<content digest>.safetensors the value; equal values of different keys are one file

Files appear by atomic rename, so readers and writers of many processes need no lock. Every read checks the bytes
against their name; a damaged file is set aside as ``*.corrupt``, counted, and answered like a missing one.

    DiskTier(directory, types=(Baseline,))    ``load`` and ``store``; pass to ``ForwardCache(disk=...)``

Tensors, plain values and dicts, lists and tuples of them can be stored. Dataclasses and named tuples only if
their class is among ``types``: a file must not be able to name code to run.

>>> import tempfile
>>> from monitoring.cache.forward_cache import CacheKey
>>> key = CacheKey("baseline", "base", "m", "i", "p")
>>> with tempfile.TemporaryDirectory() as directory:
...     DiskTier(directory).store(key, {"loss": 1.5, "logits": torch.ones(2)})
...     DiskTier(directory).load(key)
{'loss': 1.5, 'logits': tensor([1., 1.])}
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from monitoring.cache.fingerprints import canonical_json, digest
from monitoring.cache.forward_cache import MISS, CacheKey

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, str, type(None))


class DiskTier:
    """Content-addressed store of cached values in one directory, shared by any number of processes.

    Args:
        directory: created if missing.
        types: dataclasses and named tuples that values may contain.

    Attributes:
        corrupt: damaged files met so far.

    Raises:
        OSError: the directory cannot be created.
    """

    def __init__(self, directory: str | os.PathLike[str], *, types: Sequence[type] = ()) -> None:
        self.directory = Path(directory)
        self.types = {kind.__qualname__: kind for kind in types}
        self.corrupt = 0
        for part in ("keys", "objects"):
            (self.directory / part).mkdir(parents=True, exist_ok=True)

    def store(self, key: CacheKey, value: Any) -> None:
        """Write a value under its key.

        Raises:
            TypeError: something in the value has no place in a file; the message names it.
            OSError: the files cannot be written; nothing half-written is left behind.
        """
        tensors: dict[str, Tensor] = {}
        layout = json.dumps(self._encode(value, "value", tensors), allow_nan=False)
        content = safetensors.torch.save(tensors, metadata={"layout": layout})
        name = digest(content)
        path = self._object(name)
        if not path.exists():
            _write_atomically(path, content)
        index = canonical_json({"key": dataclasses.asdict(key), "object": name})
        _write_atomically(self._index(key), index.encode())

    def load(self, key: CacheKey) -> Any:
        """Return the value stored under ``key`` with its original devices, or ``MISS``."""
        index = self._index(key)
        try:
            record = json.loads(index.read_bytes())
            name = record["object"]
            if record["key"] != dataclasses.asdict(key):
                raise ValueError("another key")
        except FileNotFoundError:
            return MISS
        except (ValueError, KeyError, TypeError) as error:
            return self._set_aside(index, f"unreadable index ({error})")
        try:
            content = self._object(name).read_bytes()
        except FileNotFoundError:
            return MISS
        if digest(content) != name:
            return self._set_aside(self._object(name), "content does not match its digest")
        tensors = safetensors.torch.load(content)
        return self._decode(json.loads(_metadata(content)["layout"]), tensors)

    def _index(self, key: CacheKey) -> Path:
        return self.directory / "keys" / f"{key.digest}.json"

    def _object(self, name: str) -> Path:
        return self.directory / "objects" / f"{name}.safetensors"

    def _set_aside(self, path: Path, reason: str) -> Any:
        self.corrupt += 1
        logger.warning("forward cache: %s: %s; set aside and computed again", path, reason)
        # Another process may have met the same damage and moved the file first.
        if path.exists():
            os.replace(path, path.with_name(path.name + ".corrupt"))
        return MISS

    # Layout: plain values as they are; everything else as {"<kind>": ...}.

    def _encode(self, value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is float:
            return {"float": value.hex()}
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name, "device": str(value.device)}
        if type(value) is dict:
            places = [f"{place}[{key!r}]" for key in value]
            items = [
                [self._encode(key, where, tensors), self._encode(item, where, tensors)]
                for where, (key, item) in zip(places, value.items(), strict=True)
            ]
            return {"dict": items}
        if type(value) in (list, tuple):
            items = [self._encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
            return {type(value).__name__: items}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if self.types.get(type(value).__qualname__) is type(value):
            fields = {name: getattr(value, name) for name in _field_names(value)}
            return {"type": type(value).__qualname__, "fields": self._encode(fields, place, tensors)}
        raise TypeError(f"{place}: a {type(value).__name__} cannot be written to the disk tier; is it in types=(...)?")

    def _decode(self, node: Any, tensors: dict[str, Tensor]) -> Any:
        if not isinstance(node, dict):
            return node
        match node:
            case {"float": text}:
                return float.fromhex(text)
            case {"tensor": name, "device": device}:
                return tensors[name].to(device)
            case {"dict": pairs}:
                return {self._decode(key, tensors): self._decode(item, tensors) for key, item in pairs}
            case {"list": items}:
                return [self._decode(item, tensors) for item in items]
            case {"tuple": items}:
                return tuple(self._decode(item, tensors) for item in items)
            case {"dtype": name}:
                return getattr(torch, name)
            case {"type": name, "fields": fields}:
                return _rebuilt(self._known(name), self._decode(fields, tensors))
        raise ValueError(f"disk tier: got an unknown layout node with keys {sorted(node)}")

    def _known(self, name: str) -> type:
        if name not in self.types:
            raise TypeError(f"disk tier: a stored value needs {name}, got types {sorted(self.types)}")
        return self.types[name]


def _field_names(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(value._fields)


def _rebuilt(kind: type, fields: dict[str, Any]) -> Any:
    if not dataclasses.is_dataclass(kind):
        return kind(**fields)
    copy: Any = object.__new__(kind)
    for name, item in fields.items():
        object.__setattr__(copy, name, item)
    return copy


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: a little-endian header length, then the JSON header."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
