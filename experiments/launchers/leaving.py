"""How a worker leaves when it is asked to stop.

    with StopRequest() as stop:
        ...
        leave(stop)              # asks Slurm to start the task again, then raises KeyboardInterrupt

This module loads before anything heavy, because a signal can come in the first second.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from experiments.machine.slurm_task import SlurmTask, requeue
from experiments.machine.stop_request import StopRequest

OF_LAUNCHER = "RUN_SWEEP_OF_LAUNCHER"
"""This variable is set for workers: the process that started them talks to Slurm for all of them."""

KILL_SECONDS = 60.0
"""How long a requeued task waits for Slurm to end it."""


def leave(stop: StopRequest) -> NoReturn:
    """End a campaign that was asked to stop. A task that Slurm still counts as running asks to be started again.

    Raises:
        KeyboardInterrupt: always; the exit status is that of an interruption.
    """
    stop.finished()
    task = SlurmTask.of(os.environ)
    if task is not None and stop.signal is not None and OF_LAUNCHER not in os.environ:
        refused = requeue(task)
        print(f"{stop.signal.name}: task {task.job} {refused or 'asked Slurm to start it again'}", file=sys.stderr)
        if refused is None:
            stop.wait_for_the_end(KILL_SECONDS)
    raise KeyboardInterrupt
