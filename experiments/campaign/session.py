"""The state of a shard: one small file beside its rows, written whole when a worker begins and when it ends.

    sessions = Session.read_all(folder)             # the last session of every shard, by its number

The file marks a shard as done. It is all that ``status`` needs besides the rows: how many runs were done when the
worker began, when it began, and how it ended. A worker that was killed leaves a session that has begun and not ended.
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
"""``done``: every run was tried; ``stopped``: the worker was asked to stop; ``refused``: see ``reason``."""


@dataclass(frozen=True)
class Session:
    """One worker's time with a shard.

    Attributes:
        number, count: the shard.
        planned: how many runs the shard has.
        before: how many of them were done when the worker began.
        begun: when the worker began, in seconds since 1970; set again once the model is loaded.
        host, pid, job, restarts: the worker; ``job`` as Slurm names it, None outside Slurm.
        ended: one of ``ENDED``; None while the worker runs, and for ever if it was killed.
        done, failed: runs of this session.
        seconds: how long the session took.
        reason: why the worker stopped or refused.
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
        """Return a session of this process that begins now; write it unless ``write`` is false."""
        task = SlurmTask.of(os.environ)
        who = {"host": socket.gethostname(), "pid": os.getpid()}
        slurm = {"job": task.job if task else None, "restarts": task.restarts if task else 0}
        session = cls(shard.number, shard.count, planned, before, time.time(), **who, **slurm)  # type: ignore[arg-type]
        if write:
            session._write(folder)
        return session

    def begun_again(self, folder: CampaignFolder, before: int) -> Session:
        """Write and return a session that begins now, with ``before`` runs already done."""
        session = dataclasses.replace(self, before=before, begun=time.time())
        session._write(folder)
        return session

    def end(self, folder: CampaignFolder, ended: str, done: int, failed: int, reason: str | None = None) -> None:
        """Write how the session ended."""
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
        """Return the last session of every shard, by the shard's number.

        Raises:
            CheckRefusedError: no worker of this version wrote one of the files.
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
