"""``--launcher local --workers N``: do the shards of a campaign in processes of this machine.

launch(Order(config, options, workers=2), stop)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from experiments.campaign.folder import CampaignFolder
from experiments.campaign.states import shards_left
from experiments.campaign.submission import check_over
from experiments.campaign.worker import Progress
from experiments.config import ExperimentConfig
from experiments.inputs.plan_check import check_plan
from experiments.launchers.leaving import OF_LAUNCHER
from experiments.launchers.registry import Order
from experiments.machine.stop_request import TERM_SECONDS, StopRequest
from experiments.plan.plan import make_plan
from experiments.plan.shards import Shard

PROGRAM = Path(__file__).resolve().parents[2] / "run_sweep.py"

LOOK_SECONDS = 0.2
"""How often the files of the workers are read."""

WAIT_SECONDS = 0.05
"""How often to check whether workers that were asked to stop have ended."""


PATIENCE_SECONDS = 10.0
"""How long to wait for workers after their grace time: they close their files then."""


def launch(order: Order, stop: StopRequest) -> int:
    """Run one process for each shard that still has runs to do, and wait for all; return the worst exit status.

    Every process computes with ``run.threads`` threads, as a single process would, so the bits do not depend on the
    number of workers. On a machine with GPUs each process sees one of them, in turn. If this process is asked to stop,
    it passes the signal on to all workers and waits for them.

    Raises:
        KeyboardInterrupt: this process was asked to stop before all runs were done; no worker is left.
    """
    config, plan = order.config, make_plan(order.config)
    folder = CampaignFolder.of(config)
    check_over(folder)
    check_plan(plan)
    folder.check_writable()
    if order.overwrite:
        folder.clear_all()
    folder.check_same(config)
    shards = [Shard(number, order.workers) for number in shards_left(folder, plan, order.workers)]
    _warn_of_too_many(len(shards), config.run.threads)
    counter = RowCounter(folder)
    done = counter.count()
    options = [*order.options, "--grace", f"{stop.grace:.0f}"]
    bar = Progress(done, len(plan.runs) - done, quiet=order.quiet)
    with bar as progress, _started(options, shards, config, stop) as processes:
        working = True
        while working:
            if stop.requested():
                raise KeyboardInterrupt
            time.sleep(LOOK_SECONDS)
            working = any(process.poll() is None for process in processes)
            before, done = done, counter.count()
            if done > before:
                progress.advance(done - before)
    # A process that a signal ended has a negative status; its runs are missing, like failed runs.
    statuses = [process.wait() for process in processes]
    if stop.requested() and any(statuses):
        # A signal to all processes of a job can end the workers before this loop sees it.
        raise KeyboardInterrupt
    return max((1 if status < 0 else status for status in statuses), default=0)


def show(order: Order) -> None:
    """Print nothing: the plan already shows everything."""


@contextmanager
def _started(
    options: Sequence[str], shards: Sequence[Shard], config: ExperimentConfig, stop: StopRequest
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the workers for a block; when the block ends, for any reason, no worker is left."""
    lines = _WorkerLines()
    gpus = _gpus(config)
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for place, shard in enumerate(shards):
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *options, "--shard", f"{shard.number}/{shard.count}", "--quiet"],
                env={**os.environ, **_environment(place, config.run.threads, gpus)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
            readers.append(threading.Thread(target=lines.pass_on, args=(shard.number, process), daemon=True))
            readers[-1].start()
        yield processes
    finally:
        _end(processes, stop)
        for process, reader in zip(processes, readers, strict=False):
            reader.join()
            if process.stderr is not None:
                process.stderr.close()


def _end(processes: Sequence[subprocess.Popen[str]], stop: StopRequest) -> None:
    """Pass the request to stop on to running workers, and wait for them; if the wait is interrupted, kill them.

    Workers have their grace time, and a little more to close their files; then they are killed. Signals that come
    meanwhile are passed on, too: a later signal can only shorten the wait.
    """
    running = [process for process in processes if process.poll() is None]
    # The alarm of this process would end the wait before the workers' alarms end their current passes.
    stop.finished()
    end = time.monotonic() + _longest(stop, stop.signal) + PATIENCE_SECONDS

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal end
        if callable(noted := handlers[signal.Signals(number)]):
            noted(number, frame)
            stop.finished()
        for process in running:
            process.send_signal(number)
        end = min(end, time.monotonic() + _longest(stop, number) + PATIENCE_SECONDS)

    try:
        for number in handlers:
            signal.signal(number, pass_on)
        for process in running:
            process.send_signal(stop.signal or signal.SIGTERM)
        while any(process.poll() is None for process in running) and time.monotonic() < end:
            time.sleep(WAIT_SECONDS)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def _longest(stop: StopRequest, number: int | None) -> float:
    """Return how long a worker may take after a signal. After Ctrl-C workers get SIGTERM."""
    return stop.grace if number == signal.SIGUSR1 else min(stop.grace, TERM_SECONDS)


class _WorkerLines:
    """Passes on the lines that workers print; a line that several workers print is printed once."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._lock = threading.Lock()

    def pass_on(self, number: int, process: subprocess.Popen[str]) -> None:
        """Write the lines of one worker to standard error, until it has ended."""
        for line in process.stderr or ():
            with self._lock:
                if line not in self._lines:
                    self._lines.add(line)
                    tqdm.write(f"worker {number}: {line.rstrip()}", file=sys.stderr)


class RowCounter:
    """Counts complete rows without headers: all finished runs, and the failures since the counter was made."""

    def __init__(self, folder: CampaignFolder) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[int, int, int, int]] = {}
        self._failures_before = self._all_rows(".failures")

    def count(self) -> int:
        """Return the number of rows now."""
        return self._all_rows("") + max(0, self._all_rows(".failures") - self._failures_before)

    def _all_rows(self, suffix: str) -> int:
        return sum(self._rows(path) for path in self._folder.shard_files(suffix))

    def _rows(self, path: Path) -> int:
        try:
            with path.open("rb") as stream:
                found = path.stat()
                inode, offset, quotes, rows = self._seen.get(path, (found.st_ino, 0, 0, 0))
                if inode != found.st_ino or found.st_size < offset:
                    offset = quotes = rows = 0
                stream.seek(offset)
                # A newline inside a quoted cell ends no row.
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    offset += len(line)
                    quotes += line.count(b'"')
                    rows += quotes % 2 == 0
        except FileNotFoundError:
            return 0
        self._seen[path] = (found.st_ino, offset, quotes, rows)
        return max(0, rows - 1)


def _environment(place: int, threads: int, gpus: Sequence[str]) -> dict[str, str]:
    # Without these variables libraries would start a thread on every core, in every worker.
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), OF_LAUNCHER: str(os.getpid())}
    return own | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})


def _gpus(config: ExperimentConfig) -> list[str]:
    """Return the names of the GPUs that workers share; an empty list if the campaign names its device."""
    devices = {config.model.device, *map(str, config.sweep.get("model.device", ()))}
    if not devices <= {"auto", "cuda"} or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def _warn_of_too_many(workers: int, threads: int) -> None:
    cores = len(os.sched_getaffinity(0))
    if workers * threads > cores:
        print(f"{workers} workers x {threads} threads on {cores} cores: more than fit; they will slow each other down",
              file=sys.stderr)  # fmt: skip
