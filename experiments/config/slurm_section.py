"""The section ``slurm`` of a campaign's configuration.

>>> SlurmConfig(partition="long", time="4:00:00", array_limit=50).partition
'long'
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from experiments.config.checks import check_at_least
from experiments.errors import UsageError

_SLURM_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
    r"|(?P<hours>\d+):(?P<of_hour>\d+):(?P<of_minute>\d+)|(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)


def slurm_seconds(time: str) -> int | None:
    """Return the seconds of a time limit in the notation of ``sbatch --time``; None for no limit (0 means that, too).

    Raises:
        UsageError: Slurm does not know this notation.

    >>> slurm_seconds("90"), slurm_seconds("1:30:00"), slurm_seconds("2-0"), slurm_seconds("UNLIMITED")
    (5400, 5400, 172800, None)
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _SLURM_TIME.fullmatch(time)
    if match is None:
        raise UsageError(f"slurm.time: got {time!r}, allowed minutes, h:mm:ss, days-hours or d-hh:mm:ss, e.g. 4:00:00")
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * part["days"] + part["h"] + part["hours"]
    minutes = part["m"] + part["of_hour"] + part["minutes"]
    return (3600 * hours + 60 * minutes + part["s"] + part["of_minute"] + part["seconds"]) or None


@dataclass(frozen=True)
class SlurmConfig:
    """Options of ``--launcher slurm``; give other options of a cluster as ``SBATCH_...`` variables.

    Attributes:
        partition: where the tasks run.
        time: the limit of one task; a task that needs longer is requeued and continues.
        gres: generic resources of one task, e.g. ``gpu:1``.
        array_limit: the largest number of tasks at one time.
        setup: lines of shell before Python starts, e.g. ``module load cuda``.
    """

    partition: str | None = None
    time: str | None = None
    gres: str | None = None
    array_limit: int | None = None
    setup: str | None = None

    def __post_init__(self) -> None:
        for key in ("partition", "gres"):
            got = getattr(self, key)
            if got is not None and re.fullmatch(r"[^\s\"'#]+", got) is None:
                raise UsageError(f"slurm.{key}: got {got!r}, allowed a text without blanks, quotes and '#'")
        if self.time is not None:
            slurm_seconds(self.time)
        check_at_least("slurm.array_limit", self.array_limit, 1)
