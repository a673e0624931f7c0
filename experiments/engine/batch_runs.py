"""Runs of one context, executed together: drawn, sorted by input, and each taken the fastest way that is exact.

    for planned, record in BatchRuns(context, records, plain, drawing, proofs).run(runs):
        ...

The ways, by what the column ``execution`` says: ``rows`` (many runs in one pass, only the rows that can change),
``resume`` (one whole pass that begins at the fault's block), ``plain`` (one whole pass).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bounds import Verdict
from experiments.config import ExperimentConfig
from experiments.engine.context import Context, detection_key
from experiments.engine.fast.engine import FastEngine
from experiments.engine.fast.front import EngineMismatchError
from experiments.engine.fast.recording import resumed
from experiments.engine.fast.run import FastRun
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.engine.opened_batch import OpenedBatch
from experiments.engine.plain import PlainRuns, Shortcut, attempt
from experiments.engine.proof import Proof
from experiments.engine.proofs import Proofs
from experiments.engine.records import Records
from experiments.plan.plan import PlannedRun
from experiments.runs.drawing import FaultDrawing
from experiments.runs.measured import Measured
from experiments.runs.record import DrawnRun, RunRecord
from experiments.runs.rows import tightest
from fault_injection.faults.one_head import FaultSite
from monitoring.cache.model_fingerprints import model_fingerprint

logger = logging.getLogger(__name__)

TOKENS_TOGETHER, LEAST_TOGETHER, SITES_TOGETHER = 1 << 14, 32, 4096
"""How many tokens of runs are executed between two times that records appear (what a killed campaign does again), but
for at least so many runs; and how many runs if none is propagated."""

Run = tuple[PlannedRun, ExperimentConfig]
Finished = tuple[PlannedRun, RunRecord | Exception]


@dataclass(frozen=True)
class _Seen:
    """What detectors said of a fast run."""

    verdicts: dict[tuple[str, int], Verdict]
    modules: dict[int, str]


class BatchRuns:
    """Executes runs of one context; made once for it.

    Args:
        context: the model and its inputs.
        records: makes the records of runs.
        plain: executes runs that must go through a whole pass, or one from a block on.
        drawing: draws their faults.
        proofs: say which shortcuts are exact.
        stopping: asked before anything is begun; once it is true, ``run`` ends early.
    """

    def __init__(
        self,
        context: Context,
        records: Records,
        plain: PlainRuns,
        drawing: FaultDrawing,
        proofs: Proofs,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._context, self._records, self._plain, self._drawing = context, records, plain, drawing
        self._monitor, self._proofs, self._stopping = records.monitor, proofs, stopping
        self._buffer = OutputBuffer()

    def run(self, runs: Sequence[Run]) -> Iterator[Finished]:
        """Yield each run with its record or what it raised."""
        groups: dict[tuple[int, str, int | None, float, bool, bool], list[Run]] = {}
        for planned, config in runs:
            key = (
                planned.batch_index(len(self._context.batches)),
                detection_key(config),
                config.run.batch_runs,
                config.detect.critical_loss,
                config.run.reuse_baseline,
                config.run.propagation,
            )
            groups.setdefault(key, []).append((planned, config))
        for key in sorted(groups, key=lambda key: key[0]):
            if self._stopping():
                return
            yield from self._run_group(key[0], groups[key])

    def _run_group(self, batch_index: int, runs: Sequence[Run]) -> Iterator[Finished]:
        """Execute runs of one input and choice of detectors."""
        config, context = runs[0][1], self._context
        proof, opened = self._proofs.get(config, batch_index), None
        if proof.chain is not None and config.run.reuse_baseline:
            opened = context.opened(batch_index, config, proof.chain, by_groups=proof.rows is None)
        model_id = model_fingerprint(context.subject.model)
        known = model_id, context.baseline(batch_index, config, model_id=model_id)
        drawn: list[DrawnRun] = []
        for planned, own in runs:
            run = attempt(partial(self._drawing.draw, planned, own, known))
            if isinstance(run, Exception):
                yield planned, run
            else:
                drawn.append(run)
        if proof.chain is None or opened is None or isinstance(opened, str):
            for run in drawn:
                if self._stopping():
                    return
                yield run.planned, attempt(partial(self._plain.run, run))
            return
        rest = drawn if proof.rows is not None else (yield from self._run_by_rows(opened, drawn, proof))
        for run in rest:
            if self._stopping():
                return
            around = partial(resumed, proof.chain, opened.recording, min(fault.layer for fault in run.faults))
            outputs = opened.outputs if run.propagates and context.follows(config) else None
            shortcut = Shortcut("resume", around, opened.rows, outputs)
            yield run.planned, attempt(partial(self._plain.run, run, shortcut))

    def _run_by_rows(
        self, opened: OpenedBatch, drawn: Sequence[DrawnRun], proof: Proof
    ) -> Generator[Finished, None, list[DrawnRun]]:
        """Yield runs whose fault lies in one head; return those that must be executed another way."""
        batch_runs = drawn[0].config.run.batch_runs if drawn else None
        follows = bool(drawn) and self._context.follows(drawn[0].config)
        engine = opened.engine(batch_runs, None if proof.head else self._buffer, propagation=follows)
        rest: list[DrawnRun] = []
        sites: list[tuple[DrawnRun, FaultSite]] = []
        for run in drawn:
            site = engine.site_of(run.faults[0]) if len(run.faults) == 1 else None
            if site is None:
                rest.append(run)
            else:
                sites.append((run, site))
        sites.sort(key=lambda pair: (pair[1].fault.layer, pair[1].fault.index or ()))
        propagated = any(run.propagates for run, _ in sites)
        most = (
            max(LEAST_TOGETHER, TOKENS_TOGETHER // opened.recording.hidden[0].shape[1])
            if propagated
            else SITES_TOGETHER
        )
        for first in range(0, len(sites), most):
            if self._stopping():
                break
            for run, record in self._run_pass(opened, engine, sites[first : first + most]):
                if record is None:
                    rest.append(run)
                else:
                    yield run.planned, record
        return rest

    def _run_pass(
        self, opened: OpenedBatch, engine: FastEngine, runs: Sequence[tuple[DrawnRun, FaultSite]]
    ) -> Iterator[tuple[DrawnRun, RunRecord | None]]:
        """Yield runs with their records; with None those that must be executed another way."""
        config = runs[0][0].config
        self._monitor.reset()
        start = time.perf_counter()
        groups = opened.groups
        looked = (0.0, 0.0) if groups is None else (groups.bounds_seconds, groups.detection_seconds)
        todo = [(site, run.propagates) for run, site in runs]
        try:
            with self._monitor.timer("injection_forward"):
                found = engine.run(todo, config.detect.critical_loss)
        except EngineMismatchError as error:
            logger.warning("%s; these %d runs are executed one by one", error, len(runs))
            yield from ((run, None) for run, _ in runs)
            return
        share = 1.0 / len(runs)
        self._monitor.record_memory()
        times = {
            "baseline_forward_time": runs[0][0].baseline.forward_seconds,
            "bounds_computation_time": 0.0 if groups is None else share * (groups.bounds_seconds - looked[0]),
            "violation_detection_time": 0.0 if groups is None else share * (groups.detection_seconds - looked[1]),
            "total_time": share * (time.perf_counter() - start),
        }
        for (run, _), result in zip(runs, found, strict=True):
            yield run, self._record(run, result, times)

    def _record(self, run: DrawnRun, found: FastRun, times: dict[str, Any]) -> RunRecord:
        layer = run.faults[0].layer
        names = self._context.subject.layer_names
        verdicts = {(name, layer): verdict for name, verdict in found.verdicts.items()}
        behind = range(layer + 1, len(names)) if "finite" in found.verdicts and run.propagates else ()
        # Where nothing else was seen behind the fault, all is as finite as in the fault-free pass.
        for number in behind:
            verdicts["finite", number] = found.behind.get(number, run.baseline.verdicts["finite", number])
        seen = _Seen(verdicts, dict(enumerate(names)))
        detections = self._records.detections(run, seen, found.effect)
        return self._records.record(
            run,
            Measured(
                batch_index=run.batch_index,
                faults=run.faults,
                fault_id=run.fault_id,
                records=(found.record,),
                baseline_loss=run.baseline.evaluation.loss,
                effect=found.effect,
                local=None if run.propagates else found.local,
                block_changes=found.block_changes,
                tightest=tightest(seen, layer),
                detections=detections,
                metrics=replace(self._records.metrics(run, detections), **times),
                injection_seconds=max(
                    0.0, found.seconds - times["bounds_computation_time"] - times["violation_detection_time"]
                ),
                execution="rows",
            ),
        )
