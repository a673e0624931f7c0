r"""The table of launchers, which start the workers of a campaign.

    launcher = LAUNCHERS.find("slurm")
    launcher.launch(Order(config, options, workers=16), stop)          # the exit status

A launcher is a row here and one module with two functions. ``launch(order, stop)`` starts the workers and returns the
exit status. ``show(order)`` prints, for ``--dry-run``, what ``launch`` would do. The module is imported when the
launcher is used.

>>> print(*launcher_help().splitlines()[:2], sep="\n")
  --launcher local --workers N
                          N processes on this machine, one shard each, then merge
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.registry import Registry, loaded

if TYPE_CHECKING:
    from experiments.config import ExperimentConfig
    from experiments.machine.stop_request import StopRequest

_WIDTH, _INDENT = 90, " " * 26


@dataclass(frozen=True)
class Order:
    """The request to a launcher.

    Attributes:
        config: the campaign's configuration.
        options: the options of the command line that give this configuration.
        workers: the number of shards.
        overwrite: forget an earlier campaign of this name.
        grace: ``--grace`` in seconds; None if it was not given.
        quiet: no progress bar.
    """

    config: ExperimentConfig
    options: Sequence[str]
    workers: int
    overwrite: bool = False
    grace: int | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Launcher:
    """One way to start workers.

    Attributes:
        meaning: what it does, for ``--help`` and ``--list launchers``.
        module: where ``launch`` and ``show`` are.
        waits: whether ``launch`` returns only after the workers have ended. Then the tables are made.
    """

    meaning: str
    module: str
    waits: bool = True

    def launch(self, order: Order, stop: StopRequest) -> int:
        """Start the workers; return the exit status."""
        status: int = loaded(f"{self.module}:launch")(order, stop)
        return status

    def show(self, order: Order) -> None:
        """Print what ``launch`` would do; change nothing."""
        loaded(f"{self.module}:show")(order)


LAUNCHERS: Registry[Launcher] = Registry(
    "--launcher",
    {
        "local": Launcher(
            "N processes on this machine, one shard each, then merge",
            "experiments.launchers.local",
        ),
        "slurm": Launcher(
            "N tasks of a Slurm array job, then a merge job; see docs/cluster.md and --slurm.<field>; "
            "with --dry-run: show the scripts",
            "experiments.launchers.slurm",
            waits=False,
        ),
    },
)


def launcher_help() -> str:
    """Return the text of ``--help`` about launchers."""
    lines = []
    for name, launcher in LAUNCHERS.items():
        lines.append(f"  --launcher {name} --workers N")
        lines += [_INDENT + line for line in textwrap.wrap(launcher.meaning, _WIDTH)]
    return "\n".join(lines)
