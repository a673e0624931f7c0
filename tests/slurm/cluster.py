"""What the tests ask of a real Slurm: jobs, their states, disturbances; every wait has a deadline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent


def within(seconds: float, condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, and fail with ``what`` if it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)


def run(*command: str) -> str:
    """Run a program that must succeed; return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Cluster:
    """The Slurm of ``start.sh``: nodes ``node0`` and ``node1``, partitions ``main`` and ``urgent``."""

    folder: Path

    def states(self, job: str) -> dict[str, str]:
        """Return the states of the tasks of a job by task name."""
        lines = run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_for(self, job: str, seconds: float = 240) -> dict[str, str]:
        """Wait until no task is left, sparing tasks that were requeued their two minutes of waiting."""

        def over() -> bool:
            states = self.states(job)
            for name, state in states.items():
                if state == "PENDING" and "BeginTime" in run("squeue", "-h", "-r", "-j", name, "-o", "%r"):
                    subprocess.run(["scontrol", "update", f"jobid={name}", "StartTime=now"], check=False)
            return not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} & set(states.values())

        within(seconds, over, f"the end of job {job}: {self.states(job)}")
        return self.states(job)

    def wait_state(self, task: str, *states: str, seconds: float = 90) -> None:
        """Wait until a task is in one of these states."""
        within(seconds, lambda: self.states(task).get(task) in states, f"{task} is {states}: {self.states(task)}")

    def process(self, folder: Path, shard: int) -> int:
        """Return the process that holds a shard."""
        return int(json.loads((folder / "shards" / f"{shard:04d}.lock").read_text())["pid"])

    def lose(self, node: str, worker: int) -> None:
        """Let a node die with the worker on it: daemon, the step's own process, and the worker itself."""
        daemon = int((self.folder / "run" / f"slurmd.{node}.pid").read_text())
        for pid in (daemon, psutil.Process(worker).ppid(), worker):
            os.kill(pid, signal.SIGKILL)
        run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    @staticmethod
    def start(folder: Path) -> Cluster:
        """Start it; raises ``CalledProcessError`` with what the script said."""
        done = subprocess.run([HERE / "start.sh", folder], capture_output=True, text=True, timeout=300, check=True)
        os.environ["SLURM_CONF"] = done.stdout.strip().partition("=")[2]
        return Cluster(folder)

    def stop(self) -> None:
        """Stop it."""
        subprocess.run([HERE / "stop.sh", self.folder], timeout=120, check=True)
