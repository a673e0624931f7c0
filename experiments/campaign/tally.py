"""What a worker does with its shard, counted, and written down when it leaves.

    with Tally(folder, lock, Session.begin(folder, shard, planned, before)) as tally:
        tally.start_work(before)     # what is left is known, or the model loaded
        tally.check()                # the shard is still this worker's
        tally.done += 1

Public name: ``Tally``.
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
        folder, session, shard: where, since when, and which part.
        done, failed: runs of this session.
        stopped: whether it left before the end of the shard.

    Args:
        noted: whether the session is on disk. One that is not (an earlier campaign is still there) is written down
            when work starts; if it is refused before, nothing is.
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
        # If the shard is another worker's by now, so is its session.
        if not (self._noted and self._lock.is_own()):
            return
        if not self.folder.config_file.is_file():
            # No campaign came of it, so there is none whose shard could stand somehow.
            self.session.remove(self.folder)
        else:
            self.session.end(self.folder, ended, self.done, self.failed, str(error) if error else None)

    def start_work(self, before: int) -> None:
        """Note that what follows is work: ``before`` runs are done, and the clock of the rate begins here."""
        self._noted = True
        self.session = self.session.begun_again(self.folder, before)

    def check(self) -> None:
        """Raise ``CheckRefusedError`` if another worker has taken the shard over."""
        self._lock.check()
