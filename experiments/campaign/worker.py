"""Run a campaign, or one shard of it. Each run counts exactly once, however often the worker is stopped.

    status = run_campaign(config, shard=Shard(1, 1), overwrite=False, arguments=sys.argv[1:])
    status = run_campaign(..., stopping=stop.requested)      # leaves between two passes when that is true

The worker passes runs of one model and one data set to the engine in windows, and gets them back in any order. It
appends their rows as they come (``shard_files``). A run that raises an error is recorded with its traceback and does
not stop the others; the next session tries it again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from experiments.campaign.cells import Cells, grid_of
from experiments.campaign.folder import CampaignFolder
from experiments.campaign.lock import WriterLock
from experiments.campaign.provenance import ShardProvenance
from experiments.campaign.session import Session
from experiments.campaign.shard_files import ShardFiles
from experiments.campaign.tally import Tally
from experiments.config import ExperimentConfig
from experiments.engine.contexts import Contexts, check_runs, context_key
from experiments.engine.kept_proofs import KeptProofs
from experiments.engine.pairs import PairedRunner
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.inputs.plan_check import check_plan
from experiments.machine.environment import environment_facts, set_determinism
from experiments.plan.plan import Plan, PlannedRun, context_values, make_plan
from experiments.plan.shards import Shard, shard_of
from experiments.runs.record import RunRecord
from monitoring import TraceWriter

logger = logging.getLogger(__name__)

LOG_EVERY_SECONDS = 30.0
WINDOW = 4096
"""The largest number of runs in one window."""


@dataclass(frozen=True)
class CampaignStatus:
    """The result of a session: runs done before, done now, and failed now; and whether it stopped before the end."""

    folder: CampaignFolder
    before: int
    done: int
    failed: int
    seconds: float
    stopped: bool = False


def run_campaign(
    config: ExperimentConfig,
    *,
    shard: Shard,
    overwrite: bool,
    arguments: Sequence[str],
    stopping: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> CampaignStatus:
    """Execute the missing runs of a shard, until ``stopping`` is true; ``quiet``: without a progress bar.

    If the plan, the model, the data or one of the two checks is refused before the first run, no file of the campaign
    remains. If a worker is refused later, the session of its shard records the reason.

    Raises:
        UsageError, MissingResourceError, CheckRefusedError: see the exit statuses of ``run_sweep.py``.
    """
    plan = make_plan(config)
    folder = CampaignFolder.of(config)
    folder.check_writable()
    if not overwrite:
        folder.check_same(config)
    check_plan(plan)
    set_determinism(config.run.threads)
    mine = shard_of(plan, shard)
    with (
        Contexts(TraceWriter(None), stopping, KeptProofs.of(config.run.proof_cache, folder.path)) as contexts,
        _locked(folder, shard) as lock,
        # Until the finished runs are known, this worker counts none as its own.
        Tally(
            folder, lock, Session.begin(folder, shard, len(mine), len(mine), write=not overwrite), not overwrite
        ) as tally,
    ):
        finished = set() if overwrite else folder.finished_runs()
        grid = Cells(plan, mine, {}) if overwrite else grid_of(folder, plan, mine)
        done = finished | grid.unneeded()
        todo = [run for run in mine if run.run_id not in done]
        before = sum(run.run_id in finished for run in mine)
        if not overwrite:
            tally.start_work(before)
        if not todo or stopping():
            tally.stopped = bool(todo)
            return CampaignStatus(folder, before, 0, 0, 0.0, tally.stopped)
        first = plan.config_of(todo[0])
        check_runs(contexts.open(first), _same_context(plan, todo, context_key(first)))
        if overwrite:
            folder.clear(lock.path)
        folder.begin(config, plan)
        provenance = ShardProvenance(folder, shard, environment_facts(arguments))
        provenance.note(contexts.facts)
        tally.start_work(before)
        return _execute(tally, _Work(plan, todo, grid), contexts, provenance, stopping, quiet=quiet)


def _same_context(plan: Plan, runs: Iterable[PlannedRun], key: str) -> Iterator[ExperimentConfig]:
    fault_axes = [i for i, axis in enumerate(plan.axes) if axis.startswith("fault.")]
    seen: set[str] = set()
    for run in runs:
        values = repr([run.values[i] for i in fault_axes])
        if values not in seen:
            seen.add(values)
            config = plan.config_of(run)
            if context_key(config) == key:
                yield config


@contextlib.contextmanager
def _locked(folder: CampaignFolder, shard: Shard) -> Iterator[WriterLock]:
    lock = folder.shards / f"{shard.file_name}.lock"
    made = [path for path in (folder.shards, *folder.shards.parents) if not path.exists()]
    try:
        with WriterLock(lock, count=shard.count, detach=lambda: folder.detach(shard.file_name)) as held:
            held.check_beside()
            yield held
    finally:
        # A refusal leaves no empty folders behind.
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@dataclass(frozen=True)
class _Work:
    """The work of a session: the missing runs of a plan, and the cells of the grid that they belong to."""

    plan: Plan
    todo: list[PlannedRun]
    grid: Cells


def _execute(
    tally: Tally,
    work: _Work,
    contexts: Contexts,
    provenance: ShardProvenance,
    stopping: Callable[[], bool],
    *,
    quiet: bool,
) -> CampaignStatus:
    folder, shard, plan, todo, grid = tally.folder, tally.shard, work.plan, work.todo, work.grid
    with contextlib.ExitStack() as stack:
        contexts.use_trace(stack.enter_context(TraceWriter(folder.file("trace") / f"{shard.file_name}.jsonl")))
        files = stack.enter_context(ShardFiles(folder, shard, record=plan.config.detect.record))
        progress = stack.enter_context(Progress(tally.session.before, len(todo), quiet=quiet))

        def opened(config: ExperimentConfig) -> PairedRunner:
            known = len(contexts.facts)
            pairs = contexts.open(config)
            if len(contexts.facts) > known:
                check_runs(pairs, _same_context(plan, todo, context_key(config)))
            provenance.note(contexts.facts)
            return pairs

        for window in _windows(plan, todo, grid):
            if stopping():
                break
            for run, record in _records(opened, window, stopping):
                tally.check()
                if isinstance(record, Exception):
                    tally.failed += 1
                    grid.note(run, None)
                    files.append_failure(run, record)
                    logger.error("run %s failed: %s: %s", run.run_id, type(record).__name__, record)
                else:
                    tally.done += 1
                    files.append(record)
                    grid.note(run, record.result)
                progress.advance()
            provenance.note(contexts.facts)
        unneeded = grid.unneeded()
        needed = sum(run.run_id not in unneeded for run in todo)
        tally.stopped = stopping() and tally.done + tally.failed < needed
    seconds = time.time() - tally.session.begun
    return CampaignStatus(folder, tally.session.before, tally.done, tally.failed, seconds, tally.stopped)


def _windows(
    plan: Plan, runs: Iterable[PlannedRun], grid: Cells
) -> Iterator[list[tuple[PlannedRun, ExperimentConfig]]]:
    """Yield windows: consecutive runs of one context with their configurations, at most WINDOW of them."""
    for _, group in itertools.groupby(runs, key=lambda run: context_values(plan, run)):
        for needed in grid.rounds(group):
            while window := [(run, plan.config_of(run)) for run in itertools.islice(needed, WINDOW)]:
                yield window


def _records(
    opened: Callable[[ExperimentConfig], PairedRunner],
    window: Sequence[tuple[PlannedRun, ExperimentConfig]],
    stopping: Callable[[], bool],
) -> Iterator[tuple[PlannedRun, RunRecord | Exception]]:
    """Yield each run of a window with its record, or with the error that it (or the shared context) raised."""
    waiting = {run.run_id: run for run, _ in window}
    try:
        for run, record in opened(window[0][1]).run_many(window):
            del waiting[run.run_id]
            yield run, record
        if waiting and not stopping():
            raise RuntimeError(f"{len(waiting)} of {len(window)} runs were handed over and not executed")
    except (UsageError, MissingResourceError, CheckRefusedError):
        raise
    except Exception as error:
        # The context could not be opened, or the window could not be executed.
        for run in waiting.values():
            yield run, error


class Progress:
    """Show progress: a bar on a terminal, a log line now and then elsewhere, nothing if ``quiet``."""

    def __init__(self, before: int, runs: int, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._before, self._runs, self._number = before, runs, 0
        self._start = self._last = time.perf_counter()
        self._bar = tqdm(total=before + runs, initial=before, unit="run", disable=quiet or None, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *details: object) -> None:
        self._bar.close()

    def advance(self, runs: int = 1) -> None:
        """Count runs that were done."""
        self._number += runs
        self._bar.update(runs)
        now = time.perf_counter()
        if self._bar.disable and not self._quiet and now - self._last >= LOG_EVERY_SECONDS:
            self._last = now
            rate = self._number / (now - self._start)
            logger.info("%d of %d runs, %.1f runs/s", self._before + self._number, self._before + self._runs, rate)
