"""Count what a worker does with its shard, and write the counts when it leaves.

with Tally(folder, lock, Session.begin(folder, shard, planned, before)) as tally:
tally.start_work(before)     # the remaining runs are known, or the model is loaded
tally.check()                # raises if another worker has taken the shard over
tally.done += 1
"""

from __future__ import annotations

from types import TracebackType

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.lock import WriterLock
from experiments.campaign.session import Session
from experiments.plan.shards import Shard


class Tally:
    """Counts what a worker does with a shard and writes down how it ended.

    Attributes:
        folder, session, shard: the campaign, the worker's session, and its part of the campaign.
        done, failed: runs of this session.
        stopped: whether the worker left before the end of the shard.

    Args:
        noted: whether the session is on disk. If it is not (an earlier campaign is still in the folder), it is written
            when work starts; if the worker is refused before that, it is never written.
    """

    def __init__(self, folder: CampaignFolder, lock: WriterLock, session: Session, noted: bool = True) -> None:
        self.folder, self.session, self._lock = folder, session, lock
        self.shard = Shard(session.number, session.count)
        self._noted = noted
        self.done = self.failed = 0
        self.stopped = False

    def __enter__(self) -> Tally:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = "stopped" if self.stopped or isinstance(error, KeyboardInterrupt) else "refused" if error else "done"
        # If another worker has taken the shard over, the session file belongs to that worker.
        if not (self._noted and self._lock.is_own()):
            return
        if not self.folder.config_file.is_file():
            # The campaign was refused before it began: a session without a campaign would mean nothing.
            self.session.remove(self.folder)
        else:
            self.session.end(self.folder, ended, self.done, self.failed, str(error) if error else None)

    def start_work(self, before: int) -> None:
        """Start the clock of the rate: from here on the worker executes runs, and ``before`` runs are done."""
        self._noted = True
        self.session = self.session.begun_again(self.folder, before)

    def check(self) -> None:
        """Raise ``CheckRefusedError`` if another worker has taken the shard over."""
        self._lock.check()
