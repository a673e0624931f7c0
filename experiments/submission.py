"""What was submitted to Slurm for a campaign, remembered in its folder.

    submission = Submission.read(folder)       # None if it was never submitted

Public name: ``Submission``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from experiments.campaign_folder import CampaignFolder
from experiments.csv_file import write_text
from experiments.errors import CheckRefusedError


@dataclass(frozen=True)
class Submission:
    """The last submission of a campaign.

    Attributes:
        job: the number of the array job; its task i does shard i.
        merge_job: the number of the merge job; None if that was refused.
        workers: how many shards there are.
        shards: those of them that had something left to do.
        submitted: when, in seconds since 1970.
    """

    job: str
    merge_job: str | None
    workers: int
    shards: list[int]
    submitted: float

    def write(self, folder: CampaignFolder) -> None:
        """Write ``submission.json``."""
        write_text(folder.file("submission.json"), json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: CampaignFolder) -> Submission | None:
        """Return what ``submission.json`` says; None if there is none."""
        path = folder.file("submission.json")
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckRefusedError(f"{path}: is no submission of this version; delete it ({error})") from error
