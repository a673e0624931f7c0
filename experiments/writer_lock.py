"""One writer for a shard: a lock that is a file, made atomically, and that a dead writer does not keep.

    with WriterLock(path):
        ...                    # CheckRefusedError if another live process holds it

Only atomic links and renames are used, which also hold on network file systems. A lock left behind by a process of
this machine that no longer lives is taken over; one of another machine is not, since nobody here can know.

Public names: ``WriterLock``, ``is_held``.
"""

from __future__ import annotations

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
        if not _create(self._path):
            self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Replace the lock of a dead process. One at a time may try, and the path is never without a lock meanwhile."""
        self._refuse_if_held()
        claim = self._path.with_name(f"{self._path.name}.takeover")
        if not _create(claim):
            raise CheckRefusedError(
                f"{claim}: another process is taking this shard over; if none is (it was killed), delete the file"
            )
        try:
            # Somebody may have been faster between the first look and the claim.
            self._refuse_if_held()
            if not self._path.exists():
                if not _create(self._path):
                    raise CheckRefusedError(f"{self._path}: another process took this shard at the same moment")
                return
            os.replace(_draft(self._path), self._path)
        finally:
            claim.unlink()

    def _refuse_if_held(self) -> None:
        holder = _read(self._path)
        if holder is not None and _may_live(holder):
            raise self._refusal(holder)

    def _refusal(self, holder: dict[str, object]) -> CheckRefusedError:
        return CheckRefusedError(
            f"{self._path}: process {holder.get('pid')} on {holder.get('host')} is writing this shard; "
            "two writers would spoil it. If that process is gone, delete the file"
        )


def _draft(path: Path) -> Path:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(_identity()), encoding="utf-8")
    return draft


def _create(path: Path) -> bool:
    """Make a lock unless there is one. Linking a finished file into place is atomic and never shows an empty lock."""
    draft = _draft(path)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


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
