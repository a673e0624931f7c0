"""The flight recorder: one strict JSON line per forward pass, whole or not at all.

    TraceWriter       appends events to a file, or swallows them when there is no file
    labelled          context manager that sets the ``probe`` of every event written inside it
    current_label     the label now

Each line goes out in one ``os.write`` on an ``O_APPEND`` descriptor, so that lines of threads and processes
never mix. Yet prefer one file per process: network file systems do not promise as much. A line cut off by
a crash is closed by the next writer, whose first line says so in ``recovered_tail``.

>>> with TraceWriter(None) as trace, labelled("bits"), labelled("00ab"):
...     current_label()
...     trace.write({"op": "baseline", "hit": False})
'bits/00ab'
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

SCHEMA = 1
PHASES = ("baseline", "injection", "bounds", "detection")
ORIGINAL_FIELDS = ("ts", "probe", "view_id", "prompt_hash", "top_k", "op", "wall_ms", "hit")
FIELDS = (
    *ORIGINAL_FIELDS,
    *("schema", "writer", "run_id", "pid", "tid", "seq", "mono_ns", "model_fp", "params_fp", "trial_id", "fault"),
    *("batch_id", "batch_size", "rows", "status", "error", "device_ms"),
)
_WRITER_FIELDS = ("schema", "writer", "pid", "tid", "seq", "mono_ns", "recovered_tail", "nonfinite")
_LIVE_LINE_S = 0.05

_label: ContextVar[str | None] = ContextVar("trace_label", default=None)


def current_label() -> str | None:
    """Return the label of the running context (thread, task), or None."""
    return _label.get()


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Label every event of this context until the end of the block; a nested label is joined with ``/``.

    New threads start without a label; run them in ``contextvars.copy_context()`` to hand it on.
    """
    outer = _label.get()
    token = _label.set(label if outer is None else f"{outer}/{label}")
    try:
        yield
    finally:
        _label.reset(token)


class TraceWriter:
    """Appends events to a JSON-lines file, from any number of threads.

    Args:
        path: the file; missing directories are created. None: every write is a no-op.
        run_id: the ``run_id`` of events that do not bring their own.

    Attributes:
        lines, dropped, recovered_tail: lines written; events that came after ``close``; torn lines closed.

    Raises:
        OSError: the file cannot be opened for appending; ``filename`` and the message hold the path.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, run_id: str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.run_id = run_id
        self.lines = self.dropped = self.recovered_tail = 0
        self._lock = threading.Lock()
        self._unreported = 0
        self._torn = False
        self._begin_sequence()
        self._fd = None if self.path is None else _open_for_append(self.path)
        if self._fd is not None and _tail_is_torn(self._fd):
            self._close_torn_line(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one event; fields it lacks are filled in (``status`` "ok") or null, others are kept.

        A float that is NaN or infinite is written as null and its name is listed under ``nonfinite``. After
        ``close`` the event is dropped and counted.

        Raises:
            TypeError: a field that JSON cannot hold, or one that only the writer may set.
            OSError: the line could not be written.
        """
        if self.path is None:
            return
        reserved = [name for name in _WRITER_FIELDS if name in event]
        if reserved:
            raise TypeError(f"trace event: {', '.join(reserved)} is set by the writer")
        defaults = {"ts": time.time(), "probe": current_label(), "run_id": self.run_id, "status": "ok"}
        filled = {name: event.get(name) for name in FIELDS} | {**event}
        filled |= {name: value for name, value in defaults.items() if filled[name] is None}
        nonfinite: list[str] = []
        plain = _strict(filled, "", nonfinite)
        if nonfinite:
            plain["nonfinite"] = nonfinite
        with self._lock:
            if self._fd is None:
                self.dropped += 1
                return
            if self._torn:
                self._close_torn_line(self._fd)
            self._append(self._fd, self._stamped(plain))
            self.lines += 1
            self._seq += 1
            self._unreported = 0

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _begin_sequence(self) -> None:
        self._pid = os.getpid()
        self._writer = os.urandom(4).hex()
        self._seq = 0

    def _stamped(self, plain: dict[str, Any]) -> bytes:
        if os.getpid() != self._pid:  # a forked child numbers its own lines
            self._begin_sequence()
        plain |= {"schema": SCHEMA, "writer": self._writer, "pid": self._pid, "seq": self._seq}
        plain |= {"tid": threading.get_native_id(), "mono_ns": time.monotonic_ns()}
        if self._unreported:
            plain["recovered_tail"] = self._unreported
        return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"

    def _close_torn_line(self, fd: int) -> None:
        self._append(fd, b"\n")
        self._torn = False
        self.recovered_tail += 1
        self._unreported += 1

    def _append(self, fd: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):  # once, unless the disk is full or a limit is hit
                written += os.write(fd, line[written:])
        except OSError as error:
            self._torn = self._torn or written > 0
            raise OSError(error.errno, f"trace line not written: {error.strerror}", str(self.path)) from error


def _open_for_append(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = error.strerror or errno.errorcode.get(error.errno or 0, "unknown error")
        raise OSError(error.errno, f"trace file cannot be opened for appending: {reason}", str(path)) from error


def _tail_is_torn(fd: int) -> bool:
    """Whether the file ends inside a line; looked at twice, as another live writer may be half way through one."""
    for patience in (_LIVE_LINE_S, 0.0):
        size = os.fstat(fd).st_size
        if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
            return False
        time.sleep(patience)
    return True


def _strict(value: Any, place: str, nonfinite: list[str]) -> Any:
    """Return ``value`` as strict JSON data; places of NaN and infinities are added to ``nonfinite``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        nonfinite.append(place)
        return None
    if isinstance(value, Mapping):
        prefix = f"{place}." if place else ""
        return {str(key): _strict(item, f"{prefix}{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item, f"{place}.{index}", nonfinite) for index, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return _strict({field.name: getattr(value, field.name) for field in fields(value)}, place, nonfinite)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # NumPy and torch scalars
        return _strict(value.item(), place, nonfinite)
    raise TypeError(f"trace event: {place} is {type(value).__name__}, which JSON cannot hold")
