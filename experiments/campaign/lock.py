"""One writer for a shard: a lock file that is made atomically, and that others can take over from a dead writer.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as folder:
...     with WriterLock(Path(folder) / "0001.lock") as lock:       # CheckRefusedError if a live process holds it
...         lock.check()                                           # ... or has taken it over meanwhile
...         lock.is_own()
True

The lock uses only atomic links and renames, which also work on network file systems. A process takes over an abandoned
lock if it knows that the holder writes no more, that is if

- the holder was a process of this machine and is dead;
- the holder was an earlier start of this very Slurm task, which was requeued: Slurm starts a task again when the
  earlier one has ended, or when its node has not answered for so long that it counts as down;
- Slurm says that the holder's job is over, or waits to begin.

Without Slurm nobody can know whether a process of another machine lives. Then the lock is left alone, and the refusal
names its holder.

A node that counts as down may be cut off and still compute. Therefore a process that takes a lock over from another
machine first replaces the files that the lock protects by copies (``detach``). If the earlier holder still appends, it
writes to files that no longer have a name, or fails. Until the copies are made, the lock names the earlier holder.
Afterwards ``check`` tells the earlier holder that it has lost the lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

from experiments.errors import CheckRefusedError
from experiments.machine.slurm_task import SlurmTask, is_gone

CHECK_SECONDS = 5.0
"""How often ``check`` reads the file."""


class WriterLock:
    """Holds ``path`` for the duration of a block.

    Attributes:
        path: the file.
        from_elsewhere: whether it was taken over from a process of another machine.

    Args:
        path: the file; its folder is made if it does not exist.
        count: into how many shards its holder divides the campaign.
        detach: replaces the protected files by copies; called before a lock is taken over from another machine.
    """

    def __init__(self, path: Path, count: int = 1, detach: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._count, self._detach = count, detach
        self.from_elsewhere = False
        self._identity: dict[str, object] = {}
        self._checked = 0.0

    def __enter__(self) -> WriterLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._identity = {**_identity(), "count": self._count}
        if not _create(self.path, self._identity):
            self._take_over()
        self._checked = time.monotonic()
        return self

    def is_own(self) -> bool:
        """Whether the file still names this process."""
        return _read(self.path) == self._identity

    def check(self) -> None:
        """Raise ``CheckRefusedError`` if another process has taken the lock over; read it every few seconds at most."""
        now = time.monotonic()
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            holder = _read(self.path)
            if holder != self._identity:
                who = f"taken over by {_named(holder)}" if holder else "deleted"
                raise CheckRefusedError(f"{self.path}: was {who}; this process stops writing")

    def check_beside(self) -> None:
        """Raise ``CheckRefusedError`` if a process that may live divides this campaign into another number of shards.

        Two processes that divide a campaign differently would do each other's runs again. Each checks after it has its
        own lock, so at least one of them finds the other.
        """
        for path in sorted(self.path.parent.glob("*.lock")):
            holder = _read(path)
            count = holder.get("count", self._count) if holder else self._count
            if holder is not None and count != self._count and path != self.path and _may_live(holder):
                raise CheckRefusedError(
                    f"{path}: {_named(holder)} is doing one of {count} shards of this campaign, this process one of "
                    f"{self._count}: runs would be done twice. Let it end, or use the same number of shards"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_own():
            self.path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Replace the lock of a dead process. One process at a time may try; meanwhile the path always has a lock."""
        self._refuse_if_held()
        claims = self._claim()
        try:
            # Another process may have been faster between the first check and the claim.
            self._refuse_if_held()
            if not self.path.exists():
                if not _create(self.path, self._identity):
                    raise CheckRefusedError(f"{self.path}: another process took this shard at the same moment")
                return
            holder = _read(self.path) or {}
            self.from_elsewhere = holder.get("host") != self._identity["host"]
            if self.from_elsewhere:
                self._detach()
            os.replace(_draft(self.path, self._identity), self.path)
        finally:
            for claim in claims:
                if _read(claim) == self._identity or not is_held(claim):
                    claim.unlink(missing_ok=True)

    def _claim(self) -> list[Path]:
        """Claim this lock; return all claims on it, our own last. Earlier claims belong to processes that were killed.

        A dead claim is not replaced; the next claim takes the next number. So only links decide, and no live claim is
        removed.
        """
        claims: list[Path] = []
        while True:
            claims.append(self.path.with_name(f"{self.path.name}.takeover{len(claims) or ''}"))
            if _create(claims[-1], self._identity):
                return claims
            if holder := read_holder(claims[-1]):
                raise CheckRefusedError(
                    f"{claims[-1]}: {holder} is taking this shard over; if that process is gone, delete the file"
                )

    def _refuse_if_held(self) -> None:
        holder = _read(self.path)
        if holder is not None and _may_live(holder):
            raise self._refusal(holder)

    def _refusal(self, holder: dict[str, object]) -> CheckRefusedError:
        return CheckRefusedError(
            f"{self.path}: {_named(holder)} is writing this shard; "
            "two writers would spoil it. If that process is gone, delete the file"
        )


def _named(holder: dict[str, object]) -> str:
    job = f" (Slurm job {holder['job']})" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}"


def _draft(path: Path, identity: dict[str, object]) -> Path:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_text(json.dumps(identity), encoding="utf-8")
    return draft


def _create(path: Path, identity: dict[str, object]) -> bool:
    """Make a lock unless it exists. Linking a finished file into place is atomic and never shows an empty lock."""
    draft = _draft(path, identity)
    try:
        os.link(draft, path)
    except FileExistsError:
        # A network file system that asks its server twice may report its own link as existing.
        return draft.stat().st_nlink == 2
    finally:
        draft.unlink()
    return True


def read_holder(path: Path) -> str | None:
    """Return a description of the holder of a lock; None if no process that may live holds it."""
    holder = _read(path)
    return _named(holder) if holder is not None and _may_live(holder) else None


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
    identity = {"pid": process.pid, "host": socket.gethostname(), "started": process.create_time()}
    task = SlurmTask.of(os.environ)
    return identity if task is None else {**identity, **dataclasses.asdict(task)}


def _may_live(holder: dict[str, object]) -> bool:
    if holder.get("host") != socket.gethostname():
        return not _is_over(holder)
    try:
        process = psutil.Process(int(str(holder.get("pid"))))
        same = abs(process.create_time() - float(str(holder.get("started")))) < 1.0
        # A zombie writes no more, and may stay a zombie for ever if no process waits for it.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False


def _is_over(holder: dict[str, object]) -> bool:
    """Whether Slurm knows that a holder on another machine has ended."""
    job, cluster, restarts = holder.get("job"), holder.get("cluster"), holder.get("restarts")
    if not isinstance(job, str) or not isinstance(cluster, str) or not isinstance(restarts, int):
        return False
    own = SlurmTask.of(os.environ)
    if own is not None and (own.job, own.cluster) == (job, cluster):
        return own.restarts > restarts
    return is_gone(job, cluster)
