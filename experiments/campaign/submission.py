"""The last submission of a campaign to Slurm, kept in its folder.

submission = Submission.read(folder)       # None if it was never submitted
check_over(folder)                         # CheckRefusedError while its tasks wait or run
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass

from experiments.campaign.folder import CampaignFolder
from experiments.errors import CheckRefusedError
from experiments.machine.slurm_task import SlurmTask, task_states
from experiments.tables.csv_file import write_text

FILE_NAME = "submission.json"

_WAITING_OR_RUNNING = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING"),
    *("SIGNALING", "STAGE_OUT", "STOPPED"),
)


@dataclass(frozen=True)
class Submission:
    """The last submission of a campaign.

    Attributes:
        job: the number of the array job; its task i does shard i.
        merge_job: the number of the merge job; None if Slurm refused it.
        workers: the number of shards.
        shards: the numbers of the shards that still had runs to do.
        submitted: the time of the submission, in seconds since 1970.
    """

    job: str
    merge_job: str | None
    workers: int
    shards: list[int]
    submitted: float

    def write(self, folder: CampaignFolder) -> None:
        """Write ``submission.json``."""
        write_text(folder.file(FILE_NAME), json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: CampaignFolder) -> Submission | None:
        """Return the submission in ``submission.json``; None without that file."""
        path = folder.file(FILE_NAME)
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckRefusedError(f"{path}: is no submission of this version; delete it ({error})") from error


def check_over(folder: CampaignFolder) -> None:
    """Refuse to begin while an array job of the campaign is active, because runs would be done twice.

    Tasks of that array job may begin. So may a process on a machine without Slurm, where the state of the job is
    unknown.

    Raises:
        CheckRefusedError: tasks are waiting or running, or Slurm does not say whether they are.
    """
    before, task = Submission.read(folder), SlurmTask.of(os.environ)
    if before is None or (task is not None and task.job.partition("_")[0] == before.job):
        return
    if not (shutil.which("squeue") or shutil.which("sbatch")):
        return
    states = task_states(before.job)
    if states is None:
        raise CheckRefusedError(
            f"{folder.path}: squeue does not say whether job {before.job} is over; wait until it answers, or delete "
            f"{folder.file(FILE_NAME)} if you know that it is"
        )
    active = [job for job, state in states.items() if state in _WAITING_OR_RUNNING]
    if active:
        raise CheckRefusedError(
            f"{folder.path}: {len(active)} tasks of job {before.job} are waiting or running; let them end, or: "
            f"scancel {before.job}"
        )
