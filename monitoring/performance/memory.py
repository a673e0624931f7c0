"""How much memory a pass takes: CUDA peaks, the resident set of the process, and live tensor bytes.

Three measures, from coarse to exact:

* ``MemoryWatch`` - what the performance monitor records: the allocator's peaks on CUDA, the resident set on
  a CPU.
* ``ResidentPeak`` - the peak of the resident set during a block. On Linux it resets and reads the kernel's
  own high-water mark (``VmHWM``), so no allocation is too short to be seen; the kernel's counters are
  batched per core, which makes the number uncertain by some hundred kilobytes. Elsewhere a thread samples
  every ``interval`` seconds and misses what lives shorter. Both see the whole process, other threads
  included, and memory the allocator keeps after a tensor died is still resident: use it for size, not for
  differences between two passes.
* ``tensor_peak`` - the peak of live tensor bytes that a call adds, counted per operation: same number every
  time.

``give_back_free_memory`` returns memory to the system that the C library holds free.

>>> import torch
>>> tensor_peak(lambda: torch.zeros(1000) + torch.ones(1000))  # two operands and their sum, 4 bytes each
12000
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

logger = logging.getLogger(__name__)

BYTES_PER_MB = 2**20
METHODS = ("high_water", "sampled")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class MemoryReading:
    """Memory in MB (2**20 bytes); a measure that the device does not have is None."""

    peak_allocated_mb: float | None = None
    peak_reserved_mb: float | None = None
    resident_mb: float | None = None
    peak_resident_mb: float | None = None


class MemoryWatch:
    """Peaks since it was made: of the caching allocator on CUDA, of the resident set in ``window`` on a CPU.

    On CUDA, making one resets the device's peak statistics for everybody who reads them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak = 0
        self._open: ResidentPeak | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def window(self) -> Iterator[None]:
        """Watch the resident set during the block; a window within a window adds nothing."""
        if self.device.type == "cuda" or self._open is not None:
            yield
            return
        with ResidentPeak() as self._open:
            try:
                yield
            finally:
                self._peak = max(self._peak, self._open.peak_bytes)
                self._open = None

    def reading(self) -> MemoryReading:
        """Return the peaks so far, those of an open window included. Without any window the peak is None."""
        if self.device.type == "cuda":
            return MemoryReading(
                peak_allocated_mb=torch.cuda.max_memory_allocated(self.device) / BYTES_PER_MB,
                peak_reserved_mb=torch.cuda.max_memory_reserved(self.device) / BYTES_PER_MB,
            )
        peak = max(self._peak, self._open.peak_bytes if self._open else 0)
        return MemoryReading(
            resident_mb=resident_bytes() / BYTES_PER_MB,
            peak_resident_mb=peak / BYTES_PER_MB if peak else None,
        )


class ResidentPeak:
    """Context manager: the peak of this process's resident set during the block, in bytes.

    Args:
        method: ``"high_water"`` (Linux) or ``"sampled"``; by default the first that works here.
        interval: seconds between two samples of ``"sampled"``.

    Blocks may nest and overlap, in several threads too.
    """

    _high_water_blocks: list[ResidentPeak] = []  # noqa: RUF012 - shared on purpose, guarded by _lock
    _lock = threading.RLock()

    def __init__(self, method: str | None = None, interval: float = 0.002) -> None:
        if method is None:
            method = "high_water" if high_water_works() else "sampled"
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, allowed: {', '.join(METHODS)}")
        if not interval > 0:
            raise ValueError(f"interval: got {interval!r} seconds, allowed: a positive number")
        self.method = method
        self.interval = interval
        self._seen = 0
        self._active = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_bytes(self) -> int:
        """The peak so far within the block, or of the whole block after its end."""
        if self._active:
            self._look()
        return self._seen

    def __enter__(self) -> Self:
        if self.method == "high_water":
            with self._lock:
                self._reset_mark()
                self._high_water_blocks.append(self)
        else:
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, name="resident-peak", daemon=True)
            self._thread.start()
        self._seen = resident_bytes()
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        self._look()
        self._active = False
        if self.method == "high_water":
            with self._lock:
                self._high_water_blocks.remove(self)

    @classmethod
    def _reset_mark(cls) -> None:
        """Reset the kernel's mark, one a process, after every open block has taken note of it."""
        with cls._lock:
            for block in cls._high_water_blocks:
                block._look()
            _CLEAR_REFS.write_text("5")  # 5 resets the mark and touches no page, see proc(5)

    def _look(self) -> None:
        with self._lock:
            now = _status_bytes("VmHWM") if self.method == "high_water" else resident_bytes()
            self._seen = max(self._seen, now)

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self._look()


def resident_bytes() -> int:
    """Return the resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def give_back_free_memory() -> None:
    """Return freed pages to the system if the C library would keep them (glibc); otherwise do nothing.

    This is worth some milliseconds after large tensors have died: new allocations seldom fit into their holes.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def high_water_works() -> bool:
    """Say whether this system lets a process reset and read its own resident high-water mark."""
    try:
        ResidentPeak._reset_mark()
        _status_bytes("VmHWM")
    except OSError as error:
        logger.debug("no high-water mark on this system, sampling instead: %s", error)
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


class _LiveBytes(TorchDispatchMode):
    """Follow every storage that an operation creates until it dies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            key = storage._cdata
            if key in self._sizes or key not in given:
                self._follow(key, storage)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, key: int, storage: torch.UntypedStorage) -> None:
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()  # an operation with out= may have resized it
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, lambda _: self._died(key))

    def _died(self, key: int) -> None:
        del self._watched[key]
        self.live -= self._sizes.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_meta]
    return [tensor.untyped_storage() for tensor in tensors]


def tensor_peak(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Run ``call(*args, **kwargs)`` and return the peak of the tensor bytes it held at one time.

    Counts every storage that an operation of this thread creates, from its creation until its last
    reference dies; views share a storage, tensors that existed before the call count nothing, the result
    counts while the call runs. Scratch space that a kernel takes and returns within one operation is not
    seen. The count is exact, not sampled: the same call gives the same number.
    """
    with _LiveBytes() as bytes_held:
        call(*args, **kwargs)
    return bytes_held.peak
