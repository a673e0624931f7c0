"""The two scripts of a campaign on a cluster: an array job of workers, and a merge job that follows it.

    files = BatchFiles(folder, config, workers=16)
    print(files.run(), files.merge())          # run.sbatch and merge.sbatch, as they are written

They can be read, changed and submitted by hand: task i of the array does shard i.

>>> array_text([1, 2, 3, 7, 9, 10])
'1-3,7,9-10'
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.campaign.folder import CampaignFolder
from experiments.config import ExperimentConfig, flat_fields
from experiments.config.slurm_section import slurm_seconds
from experiments.errors import UsageError

PROGRAM = Path(__file__).resolve().parents[2] / "run_sweep.py"

WARNING_SECONDS = 120
"""How long before the time limit Slurm warns a worker, if the limit is long enough."""


def warning_seconds(time: str | None) -> int:
    """Return how many seconds before the time limit Slurm sends SIGUSR1: at most a quarter of the limit."""
    limit = None if time is None else slurm_seconds(time)
    return WARNING_SECONDS if limit is None else max(1, min(WARNING_SECONDS, limit // 4))


def array_text(numbers: Iterable[int]) -> str:
    """Return rising numbers in the notation of ``sbatch --array``."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)


@dataclass(frozen=True)
class BatchFiles:
    """The scripts of one campaign for a given number of workers.

    Attributes:
        folder, config: the campaign.
        workers: the number of shards.
        grace: ``--grace`` of the workers; None: three quarters of the warning.
        quiet: whether workers get ``--quiet``.

    Raises:
        UsageError: a line of ``#SBATCH`` cannot name one of the paths.
    """

    folder: CampaignFolder
    config: ExperimentConfig
    workers: int
    grace: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for what, path in (("output_dir and name", self._path), ("the current folder", Path.cwd())):
            # Slurm ends the text at a quote, and a backslash turns all its replacements off.
            if re.search(r'[\x00-\x1f\x7f"\\]', str(path)):
                raise UsageError(
                    f"{what}: got {str(path)!r}, allowed for --launcher slurm: a path without control characters, "
                    "double quotes and backslashes"
                )

    def run(self) -> str:
        """Return the script of a worker."""
        slurm, warning = self.config.slurm, warning_seconds(self.config.slurm.time)
        options = {"partition": slurm.partition, "time": slurm.time, "gres": slurm.gres}
        command = [
            sys.executable, "-u", str(PROGRAM), "--config", str(self._path / "config.yaml"),
            "--output_dir", str(self._path.parent), *self._changed_options(),
        ]  # fmt: skip
        grace = max(1, warning * 3 // 4) if self.grace is None else self.grace
        shard = f'--shard "$SLURM_ARRAY_TASK_ID/{self.workers}" --grace {grace}' + (" --quiet" if self.quiet else "")
        return "\n".join(
            [
                *self._head(self.config.name, "slurm-%A_%a.out"),
                "#SBATCH --requeue",
                f"#SBATCH --signal=B:USR1@{warning}",
                f"#SBATCH --cpus-per-task={self.config.run.threads}",
                *(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None),
                "",
                f"# Task i of the array does shard i of {self.workers}; what is done already is not done again.",
                f"export OMP_NUM_THREADS={self.config.run.threads}",
                *self._setup(),
                "# exec: Slurm signals the process of this script, and that has to be Python.",
                f"exec {shlex.join(command)} {shard}",
                "",
            ]
        )

    def merge(self) -> str:
        """Return the script that merges the workers' rows into the tables."""
        partition = self.config.slurm.partition
        return "\n".join(
            [
                *self._head(f"{self.config.name}-merge", "slurm-%j-merge.out"),
                *([f"#SBATCH --partition={partition}"] if partition else []),
                "",
                *self._setup(),
                f"exec {shlex.join([sys.executable, '-u', str(PROGRAM), 'merge', str(self._path)])}",
                "",
            ]
        )

    @property
    def _path(self) -> Path:
        return self.folder.path.absolute()

    def _head(self, name: str, output: str) -> list[str]:
        # Slurm replaces % in the pattern of an output file, and nowhere else.
        logs = str(self._path / "logs").replace("%", "%%")
        return [
            "#!/bin/bash",
            f"#SBATCH --job-name={name}",
            f'#SBATCH --chdir="{Path.cwd()}"',
            f'#SBATCH --output="{logs}/{output}"',
            "#SBATCH --open-mode=append",
            "#SBATCH --ntasks=1",
        ]

    def _setup(self) -> list[str]:
        return ["set -e", *self.config.slurm.setup.splitlines()] if self.config.slurm.setup else []

    def _changed_options(self) -> list[str]:
        """Return the options of section ``run`` that differ from the campaign's file; they may differ."""
        if not self.folder.config_file.is_file():
            return []
        begun, now = flat_fields(self.folder.config()), flat_fields(self.config)
        changed = [key for key in now if key.startswith("run.") and now[key] != begun.get(key)]
        return [text for key in changed for text in (f"--{key}", "null" if now[key] is None else str(now[key]))]
