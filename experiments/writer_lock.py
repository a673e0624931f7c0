"""One writer for a shard: a lock that is a file, made atomically, and that a dead writer does not keep.

    with WriterLock(path):
        ...                    # CheckRefusedError if another live process holds it

Only atomic creation and rename are used, which also hold on network file systems. A lock left behind by a process of
this machine that no longer lives is taken over; one of another machine is not, since nobody here can know.

Public names: ``WriterLock``, ``is_held``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from pathlib import Path
from types import TracebackType

import psutil

from experiments.errors import CheckRefusedError


class WriterLock:
    """Holds ``path`` for the duration of a block."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> WriterLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create():
            self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        # Linking a finished file into place is atomic and never shows an empty lock.
        draft = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        draft.write_text(json.dumps(_identity()), encoding="utf-8")
        try:
            os.link(draft, self._path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _take_over(self) -> None:
        stale = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.stale")
        holder = self._holder()
        if holder is not None and _may_live(holder):
            raise self._refusal(holder)
        try:
            os.rename(self._path, stale)
        except FileNotFoundError:
            pass
        else:
            self._check_taken(stale, holder)
        if not self._create():
            raise CheckRefusedError(f"{self._path}: another process took this shard over at the same moment")

    def _check_taken(self, taken: Path, expected: dict[str, object] | None) -> None:
        """Put the lock back if it is no longer the dead holder's: somebody was faster."""
        found = _read(taken)
        try:
            if found != expected and found is not None:
                with contextlib.suppress(FileExistsError):
                    os.link(taken, self._path)
                raise self._refusal(found)
        finally:
            taken.unlink()

    def _refusal(self, holder: dict[str, object]) -> CheckRefusedError:
        return CheckRefusedError(
            f"{self._path}: process {holder.get('pid')} on {holder.get('host')} is writing this shard; "
            "two writers would spoil it. If that process is gone, delete the file"
        )

    def _holder(self) -> dict[str, object] | None:
        return _read(self._path)


def is_held(path: Path) -> bool:
    """Whether a process that may live holds the lock ``path``."""
    holder = _read(path)
    return holder is not None and _may_live(holder)


def _read(path: Path) -> dict[str, object] | None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return loaded if isinstance(loaded, dict) else None


def _identity() -> dict[str, object]:
    process = psutil.Process()
    return {"pid": process.pid, "host": socket.gethostname(), "started": process.create_time()}


def _may_live(holder: dict[str, object]) -> bool:
    if holder.get("host") != socket.gethostname():
        return True
    try:
        process = psutil.Process(int(str(holder.get("pid"))))
        same = abs(process.create_time() - float(str(holder.get("started")))) < 1.0
        # A zombie writes no more, and may stay one for ever where nobody waits for it.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False
