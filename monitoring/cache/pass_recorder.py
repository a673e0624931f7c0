"""One forward pass, timed, counted and traced together.

    Stopwatch      wall time of a block, and its time on the device, once the device has finished
    PassCall       one requested result: its key and the fields that its trace line always has
    PassRecorder   changes the counters and writes the line of a hit, a miss or an error in one locked step
    LineFields     what a caller may add to the line of a pass

>>> watch = Stopwatch()
>>> with watch.running():
...     _ = sum(range(10))
>>> watch.wall_s > 0, watch.device_ms
(True, None)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.fingerprints import short
from monitoring.cache.forward_cache import CacheKey, ForwardCache
from monitoring.trace.trace_writer import FIELDS, PHASES, TraceWriter

Details = Callable[[Any], Mapping[str, object]]
_OWN_WORDING = ("rows", "details")


class LineFields(TypedDict, total=False):
    """Fields that a caller may add to the trace line of a pass.

    All of it goes into the trace line. ``rows``: sequences that went through the model (default: the first
    dimension of the input). ``phase``: baseline, injection, bounds or detection (default: injection if
    there is a fault). ``details``: a function of the result that gives further fields, such as ``loss``, or
    ``phase_ms``, how much of ``wall_ms`` other phases took: ``{"bounds": 1.5, "detection": 0.2}``.
    """

    run_id: str
    trial_id: str
    fault: object
    phase: str
    rows: int
    details: Details


@dataclass(frozen=True)
class PassCall:
    """One requested result."""

    key: CacheKey
    line: Mapping[str, object]
    rows: int
    details: Details | None

    @staticmethod
    def build(key: CacheKey, default_rows: int, top_k: object, batch_id: int | None, fields: LineFields) -> PassCall:
        """Join a key and the caller's fields; a field that does not exist is refused."""
        unknown = sorted(set(fields) - set(LineFields.__annotations__))
        if unknown:
            allowed = ", ".join(LineFields.__annotations__)
            raise TypeError(f"trace fields: got {', '.join(unknown)}, allowed are {allowed}")
        _check_phases([fields["phase"]] if "phase" in fields else [])
        rows = fields.get("rows", default_rows)
        line: dict[str, object] = {
            "op": key.op,
            "view_id": key.view_id,
            "model_fp": short(key.model_fp),
            "prompt_hash": short(key.input_fp),
            "params_fp": short(key.params_fp),
            "top_k": top_k,
            "rows": rows,
            "batch_id": batch_id,
        }
        line |= {name: value for name, value in fields.items() if name not in _OWN_WORDING}
        return PassCall(key, line, rows, fields.get("details"))

    def describe(self, value: object) -> dict[str, object]:
        """Return the further fields that ``details`` finds in a result."""
        found = dict(self.details(value)) if self.details else {}
        taken = sorted(set(found) & set(FIELDS))
        if taken:
            raise ValueError(f"details: {', '.join(taken)} belong to every trace line; choose other names")
        phase_ms = found.get("phase_ms")
        _check_phases(phase_ms if isinstance(phase_ms, Mapping) else [])
        return found


class Stopwatch:
    """Times one block; on an accelerator it waits for the work before and after, so the time is the block's.

    Args:
        device: where the work runs; None or a CPU needs no waiting.

    Attributes:
        wall_s: wall time in seconds, also after an exception.
        device_ms: time between the first and the last kernel in milliseconds; None without CUDA.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.wall_s = 0.0
        self.device_ms: float | None = None
        self._device = device
        self._cuda = device is not None and device.type == "cuda"

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        self._synchronise()
        first, last = self._event(), self._event()
        start = time.perf_counter()
        try:
            self._mark(first)
            yield
            self._mark(last)
            self._synchronise()
            if first is not None and last is not None:
                self.device_ms = float(first.elapsed_time(last))
        finally:
            self.wall_s = time.perf_counter() - start

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(enable_timing=True) if self._cuda else None

    def _mark(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.record(torch.cuda.current_stream(self._device))

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        elif self._device is not None and self._device.type == "mps":
            torch.mps.synchronize()


class PassRecorder:
    """Counts and traces the fate of a call, both under the cache's lock, so that they always agree.

    Args:
        cache: its lock guards the counters.
        trace: receives one line per recorded call.
        stats: the counters.
    """

    def __init__(self, cache: ForwardCache, trace: TraceWriter, stats: BackendStats) -> None:
        self._lock = cache.lock
        self._trace = trace
        self._stats = stats

    def hit(self, call: PassCall, value: object, wall_s: float, *, coalesced: bool = False) -> None:
        """Record a result that was served without a pass."""
        found = call.describe(value)
        with self._lock:
            self._trace.write({**call.line, **found, "hit": True, "wall_ms": wall_s * 1e3})
            self._stats.record_hit(wall_s, coalesced=coalesced)

    def miss(
        self, call: PassCall, found: Mapping[str, object], watch: Stopwatch, *, uncached: bool = False, share: int = 0
    ) -> None:
        """Record a computed result; ``share``: how many results the timed batch gave, 0 without a batch."""
        wall_s = watch.wall_s / (share or 1)
        device_ms = None if watch.device_ms is None else watch.device_ms / (share or 1)
        event = {**call.line, **found, "hit": False, "wall_ms": wall_s * 1e3, "device_ms": device_ms}
        with self._lock:
            self._trace.write(event | {"batch_size": share or None})
            self._stats.record_miss(wall_s, rows=call.rows, uncached=uncached)

    def error(self, call: PassCall, watch: Stopwatch, error: BaseException, *, share: int = 0) -> None:
        """Record a computation that raised: one line for the whole of a batch."""
        event = {**call.line, "hit": None, "wall_ms": watch.wall_s * 1e3, "batch_size": share or None}
        with self._lock:
            self._trace.write(event | {"status": "error", "error": f"{type(error).__name__}: {error}"})
            self._stats.record_error()


def _check_phases(names: Iterable[str]) -> None:
    for name in names:
        if name not in PHASES:
            raise ValueError(f"phase: got {name!r}, allowed are {', '.join(PHASES)}")
