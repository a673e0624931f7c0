"""The fingerprint of a model: everything about it that determines the bits of a forward pass.

Tensors are read again only where torch shows that they may have changed; ``bump_generation`` tells of the changes that
torch does not count.

>>> model = nn.Linear(2, 2)
>>> before = model_fingerprint(model)
>>> with torch.no_grad():
...     _ = model.weight.add_(1.0)
>>> model_fingerprint(model) == before
False
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from monitoring.cache.fingerprints import canonical_json, digest, tensor_digest

_MATH_VARIABLES = ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "CUBLAS_WORKSPACE_CONFIG")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """The digest of one tensor and the marks by which torch shows that it may have changed since."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int
    digest: str

    def still_holds(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.version == tensor._version and self.address == tensor.data_ptr()


class _Memo:
    """What is known of one model: its generation and the digests of its tensors."""

    def __init__(self) -> None:
        self.generation = 0
        self.weights: dict[str, _Weight] = {}


_memos: weakref.WeakKeyDictionary[nn.Module, _Memo] = weakref.WeakKeyDictionary()
_memos_lock = threading.RLock()


def bump_generation(model: nn.Module) -> int:
    """Record that ``model`` changed in a way that torch does not count; return its new generation.

    Needed after writes through ``parameter.data`` or a NumPy alias, a switched adapter, a swapped module, a new
    hook. Ordinary in-place writes under ``torch.no_grad()`` (optimizer steps, bit flips in a weight, forced
    K = V) are seen without it, and then restoring the bits restores the fingerprint; a bumped
    generation never comes back.
    """
    with _memos_lock:
        memo = _memos.setdefault(model, _Memo())
        memo.generation += 1
        memo.weights.clear()
        return memo.generation


def generation(model: nn.Module) -> int:
    """Return how often ``bump_generation`` was called for this model object in this process."""
    with _memos_lock:
        memo = _memos.get(model)
        return memo.generation if memo else 0


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Return the digest of every parameter and buffer (persistent or not) by qualified name.

    Only tensors whose version counter, storage or identity moved since the last call are read again.
    """
    with _memos_lock:
        known = _memos.setdefault(model, _Memo()).weights
        current: dict[str, _Weight] = {}
        digests: dict[str, str] = {}
        for name, tensor in _tensors(model):
            weight = known.get(name)
            if tensor.is_inference():  # carries no version counter, so nothing can be remembered of it
                digests[name] = tensor_digest(tensor)
                continue
            if weight is None or not weight.still_holds(tensor):
                mark = (weakref.ref(tensor), tensor._version, tensor.data_ptr())
                weight = _Weight(*mark, digest=tensor_digest(tensor))
            current[name] = weight
            digests[name] = weight.digest
        _memos[model].weights = current
        return digests


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def execution_flags() -> dict[str, object]:
    """Return the process settings that choose between kernels which round differently."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
        "autocast": [
            [kind, str(torch.get_autocast_dtype(kind))] for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ],
        "environment": {name: os.environ[name] for name in _MATH_VARIABLES if name in os.environ},
    }


def model_fingerprint(model: nn.Module, *, refresh: bool = False) -> str:
    """Return the digest of everything about a model that determines what a forward pass gives.

    Covered: class, config, attention implementation, train/eval state of every module, all weights and
    buffers bit by bit with name, dtype and shape, the devices they are on, ``execution_flags()`` and the
    generation counter. Not covered: hooks and patched methods; name those in the view.

    Args:
        model: any module; ``model.config`` is read when there is one.
        refresh: read every tensor again instead of trusting torch's version counters.

    A repeated call costs about a millisecond per 150 tensors: unchanged ones are not read again.
    """
    with _memos_lock:
        if refresh and model in _memos:
            _memos[model].weights.clear()
        description = {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "config": _config(getattr(model, "config", None)),
            "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
            "training": [name for name, module in model.named_modules() if module.training],
            "devices": sorted({_device_class(tensor) for _, tensor in _tensors(model)}),
            "flags": execution_flags(),
            "generation": generation(model),
            "weights": weight_digests(model),
        }
        return digest(canonical_json(description))


def _config(config: object) -> object:
    """Return a model's config as plain data; transformers' own ``to_dict`` where there is one."""
    if config is None or isinstance(config, Mapping) or dataclasses.is_dataclass(config):
        return config
    to_dict = getattr(config, "to_dict", None)
    return to_dict() if callable(to_dict) else vars(config)


def _device_class(tensor: Tensor) -> str:
    device = tensor.device
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
