"""How a worker that was asked to stop leaves; loaded before anything heavy, since it can be asked in its first second.

    with StopRequest() as stop:
        ...
        leave(stop)              # KeyboardInterrupt, after Slurm was asked to begin the task again

Public names: ``leave``, ``OF_LAUNCHER``, ``KILL_SECONDS``.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from experiments.machine.slurm_task import SlurmTask, requeue
from experiments.machine.stop_request import StopRequest

OF_LAUNCHER = "RUN_SWEEP_OF_LAUNCHER"
"""Set for workers: who began them speaks with Slurm for all of them."""

KILL_SECONDS = 60.0
"""How long a task that will be begun again waits for Slurm to end it."""


def leave(stop: StopRequest) -> NoReturn:
    """End a campaign that was asked to stop: a task of Slurm asks to be begun again where that is what Slurm wants.

    Raises:
        KeyboardInterrupt: always; the exit status is that of an interruption.
    """
    stop.finished()
    task = SlurmTask.of(os.environ)
    if task is not None and stop.signal is not None and OF_LAUNCHER not in os.environ:
        refused = requeue(task)
        print(f"{stop.signal.name}: task {task.job} {refused or 'asked Slurm to begin it again'}", file=sys.stderr)
        if refused is None:
            stop.wait_for_the_end(KILL_SECONDS)
    raise KeyboardInterrupt
