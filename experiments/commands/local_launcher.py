"""``--launcher local --workers N``: the shards of a campaign as processes of this machine.

Public name: ``launch_local``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.campaign import Progress
from experiments.campaign_folder import CampaignFolder
from experiments.config import ExperimentConfig
from experiments.contexts import check_plan
from experiments.plan import make_plan
from experiments.row_counter import RowCounter
from experiments.stop_request import StopRequest

PROGRAM = Path(__file__).resolve().parents[2] / "run_sweep.py"

LOOK_SECONDS = 0.2
"""How often the files of the workers are looked at."""


def launch_local(
    config: ExperimentConfig, options: Sequence[str], workers: int, stop: StopRequest, *, overwrite: bool
) -> int:
    """Run one process for each shard and wait for all; return the worst exit status.

    Every process computes with ``run.threads`` threads, as a single one would: the same bits, whatever the number of
    workers. Where there are GPUs each process sees one of them, in turn. If this process is asked to stop, so are all
    workers, and waited for.
    """
    plan = make_plan(config)
    check_plan(plan)
    folder = CampaignFolder.of(config)
    folder.check_writable()
    if overwrite:
        folder.clear_all()
    folder.check_same(config)
    _warn_of_too_many(workers, config.run.threads)
    counter = RowCounter(folder)
    done = counter.count()
    with Progress(done, len(plan.runs) - done) as progress, _started(options, workers, config) as processes:
        working = True
        while working:
            if stop.requested():
                raise KeyboardInterrupt
            time.sleep(LOOK_SECONDS)
            working = any(process.poll() is None for process in processes)
            before, done = done, counter.count()
            if done > before:
                progress.advance(done - before)
    # A process that a signal ended has a negative status; its runs are missing, like those that failed.
    statuses = [process.wait() for process in processes]
    return max(1 if status < 0 else status for status in statuses)


@contextmanager
def _started(options: Sequence[str], workers: int, config: ExperimentConfig) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the workers; whatever ends the block, none of them is left."""
    said = _Said()
    gpus = _gpus(config)
    processes: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    try:
        for number in range(1, workers + 1):
            process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *options, "--shard", f"{number}/{workers}", "--quiet"],
                env={**os.environ, **_environment(number, config.run.threads, gpus)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            processes.append(process)
            readers.append(threading.Thread(target=said.pass_on, args=(number, process), daemon=True))
            readers[-1].start()
        yield processes
    finally:
        _end(processes)
        for process, reader in zip(processes, readers, strict=False):
            reader.join()
            if process.stderr is not None:
                process.stderr.close()


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Ask those that still run to stop, and wait for them; who interrupts the wait has them killed."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    try:
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        for process in running:
            process.kill()
            process.wait()
        raise


class _Said:
    """Passes on what workers say; what all of them say, once."""

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


def _environment(number: int, threads: int, gpus: Sequence[str]) -> dict[str, str]:
    # Libraries that were not told would start a thread on every core, in every worker.
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return own | ({"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {})


def _gpus(config: ExperimentConfig) -> list[str]:
    """Return the names of the GPUs that workers are to share; none if the campaign names its device."""
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
