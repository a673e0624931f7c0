"""How a shard stands: one small file beside its rows, written whole when a worker begins and when it ends.

    sessions = Session.read_all(folder)             # the last session of every shard, by its number

It is the done marker of a shard, and all that ``status`` needs besides the rows: what was there when the worker began,
when that was, and how it ended. A worker that was killed leaves one that has begun and not ended.

Public names: ``Session``, ``ENDED``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.campaign.folder import CampaignFolder
from experiments.errors import CheckRefusedError
from experiments.machine.slurm_task import SlurmTask
from experiments.plan.shards import Shard
from experiments.tables.csv_file import write_text

ENDED = ("done", "stopped", "refused")
"""``done``: every run of the shard was tried; ``stopped``: it was asked to stop; ``refused``: see ``reason``."""


@dataclass(frozen=True)
class Session:
    """One worker's time with a shard.

    Attributes:
        number, count: the shard.
        planned: its runs.
        before: how many of them were done when the worker began.
        begun: when that was, in seconds since 1970; once its model is loaded, when it was.
        host, pid, job, restarts: who; ``job`` as Slurm names it, None outside of Slurm.
        ended: one of ``ENDED``; None while it runs, and for ever if it was killed.
        done, failed: runs of this session.
        seconds: how long it took.
        reason: why it stopped or refused.
    """

    number: int
    count: int
    planned: int
    before: int
    begun: float
    host: str
    pid: int
    job: str | None
    restarts: int
    ended: str | None = None
    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    reason: str | None = None

    @classmethod
    def begin(cls, folder: CampaignFolder, shard: Shard, planned: int, before: int, *, write: bool = True) -> Session:
        """Return a session of this process that begins now, and write it unless ``write`` is false."""
        task = SlurmTask.of(os.environ)
        who = {"host": socket.gethostname(), "pid": os.getpid()}
        slurm = {"job": task.job if task else None, "restarts": task.restarts if task else 0}
        session = cls(shard.number, shard.count, planned, before, time.time(), **who, **slurm)  # type: ignore[arg-type]
        if write:
            session._write(folder)
        return session

    def begun_again(self, folder: CampaignFolder, before: int) -> Session:
        """Write and return it as one that begins now and found so many runs done."""
        session = dataclasses.replace(self, before=before, begun=time.time())
        session._write(folder)
        return session

    def end(self, folder: CampaignFolder, ended: str, done: int, failed: int, reason: str | None = None) -> None:
        """Write how it ended."""
        seconds = time.time() - self.begun
        last = dataclasses.replace(self, ended=ended, done=done, failed=failed, seconds=seconds, reason=reason)
        last._write(folder)

    def remove(self, folder: CampaignFolder) -> None:
        """Delete its file, if there is one."""
        self._path(folder).unlink(missing_ok=True)

    def _path(self, folder: CampaignFolder) -> Path:
        return folder.shards / f"{Shard(self.number, self.count).file_name}.session.json"

    def _write(self, folder: CampaignFolder) -> None:
        write_text(self._path(folder), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read_all(cls, folder: CampaignFolder) -> dict[int, Session]:
        """Return the last session of every shard by its number.

        Raises:
            CheckRefusedError: a file that no worker of this version wrote.
        """
        found: dict[int, Session] = {}
        for path in sorted(folder.shards.glob("*.session.json")):
            if re.fullmatch(r"\d{4,}\.session\.json", path.name):
                try:
                    session = cls(**json.loads(path.read_text(encoding="utf-8")))
                except (ValueError, TypeError) as error:
                    raise CheckRefusedError(f"{path}: is no session of this version; delete it ({error})") from error
                found[session.number] = session
        return found
