"""The flight recorder: one strict JSON line per forward pass, whole or not at all.

    TraceWriter       appends events to a file, or swallows them when there is no file
    labelled          context manager that sets the ``probe`` of every event written inside it
    current_label     the label now

Each line goes out in one ``os.write`` on an ``O_APPEND`` descriptor under the file's advisory lock, so that lines
of threads and processes never mix. Yet prefer one file per process: network file systems may not promise
as much. A line that a crash cut off is closed by the next writer, whose next line says so in ``recovered_tail``.

>>> with TraceWriter(None) as trace, labelled("bits"), labelled("00ab"):
...     current_label()
...     trace.write({"op": "baseline", "hit": False})
'bits/00ab'
"""

from __future__ import annotations

import errno
import fcntl
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
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

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
        self._fd: int | None = None
        if self.path is not None:
            self._open(self.path)

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
            if os.getpid() != self._pid:  # forked: a lock of its own, and its own numbering
                os.close(self._fd)
                self._open(self.path)
            self._append(self._fd, plain)

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _open(self, path: Path) -> None:
        self._pid = os.getpid()
        self._writer = os.urandom(4).hex()
        self._seq = 0
        self._fd = _open_for_append(path)
        with _locked(self._fd):
            self._close_torn_line(self._fd)

    def _append(self, fd: int, event: dict[str, Any]) -> None:
        with _locked(fd):
            self._close_torn_line(fd)
            event |= {"schema": SCHEMA, "writer": self._writer, "pid": self._pid, "seq": self._seq}
            event |= {"tid": threading.get_native_id(), "mono_ns": time.monotonic_ns()}
            if self._unreported:
                event["recovered_tail"] = self._unreported
            self._write(fd, json.dumps(event, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n")
        self.lines += 1
        self._seq += 1
        self._unreported = 0

    def _close_torn_line(self, fd: int) -> None:
        """End a line that a dead writer or a full disk left incomplete; the caller holds the lock."""
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            self._write(fd, b"\n")
            self.recovered_tail += 1
            self._unreported += 1

    def _write(self, fd: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):  # once, unless the disk is full or a limit is hit
                written += os.write(fd, line[written:])
        except OSError as error:
            raise OSError(error.errno, f"trace line not written: {error.strerror}", str(self.path)) from error


def _open_for_append(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = error.strerror or "unknown error"
        raise OSError(error.errno, f"trace file cannot be opened for appending: {reason}", str(path)) from error


@contextmanager
def _locked(fd: int) -> Iterator[None]:
    """Hold the file's lock: without it, a line that a live process is writing looks torn."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.debug("trace: this file system has no locks; use one trace file per process")
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


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
