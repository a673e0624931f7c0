"""The plain way: a run is one injected pass through the whole model, or from the block of its fault on.

plain = PlainRuns(context, records)
record = plain.run(drawn)                                    # a RunRecord
record = plain.run(drawn, Shortcut("resume", around))        # the same numbers, from a block on
attempt(partial(plain.run, drawn))                           # the record, or the error of this run alone
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from bounds.effects.certifier import Certifier
from experiments.effects.baseline_rows import BaselineRows
from experiments.effects.block_outputs import BlockOutputs
from experiments.effects.local_change import LocalChange
from experiments.effects.loss import Evaluation
from experiments.effects.outcome import effect_of
from experiments.engine.context import Context
from experiments.engine.records import Records
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.passes.baseline import Baseline, timed_forward
from experiments.passes.injected_pass import InjectedPass, Observed
from experiments.passes.taps.output_keeper import OutputKeeper, change_of
from experiments.passes.taps.watcher import Watcher
from experiments.runs.measured import Measured
from experiments.runs.record import DrawnRun, RunRecord
from experiments.runs.rows import tightest
from fault_injection.numbers.model_outputs import bitwise_equal

Done = TypeVar("Done")


@dataclass(frozen=True)
class Shortcut:
    """A shortcut: the parts that an injected pass need not compute.

    Attributes:
        execution: what the row calls this.
        around: what the pass runs in (a model that resumes at a block).
        rows: those of the baseline's output, if they are there already.
        outputs: what the blocks return in the baseline, likewise.
    """

    execution: str = "plain"
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    rows: BaselineRows | None = None
    outputs: BlockOutputs | None = None


WHOLE = Shortcut()
"""Everything is computed."""


class PlainRuns:
    """Executes runs of one context, one by one.

    Args:
        context: the model and its inputs.
        records: makes their records.
    """

    def __init__(self, context: Context, records: Records) -> None:
        self._context, self._records, self._monitor = context, records, records.monitor
        self._made_certifier: Certifier | None = None

    def begin(self) -> float:
        """Return when a run begins, on ``time.perf_counter``; what was measured before is forgotten."""
        self._monitor.reset()
        self._context.subject.synchronize()
        return time.perf_counter()

    def run(self, drawn: DrawnRun, shortcut: Shortcut = WHOLE, start: float | None = None) -> RunRecord:
        """Execute a drawn run by an injected pass; it began at ``start`` (default: now).

        Raises:
            FaultMissedError: the pass never reached the fault.
        """
        start = self.begin() if start is None else start
        context, baseline, config = self._context, drawn.baseline, drawn.config
        seconds, outputs = baseline.forward_seconds, shortcut.outputs
        if not config.run.reuse_baseline and drawn.baseline_first:
            seconds = self._repeat_baseline(baseline, drawn.batch_index)
        if context.follows(config) and drawn.propagates and outputs is None:
            outputs = context.block_outputs(drawn.batch_index, drawn.model_id, drawn.planned.run_id)
        with shortcut.around():
            injected = self._inject(drawn, outputs)
        if not config.run.reuse_baseline and not drawn.baseline_first:
            seconds = self._repeat_baseline(baseline, drawn.batch_index)
        batch, critical = context.batches[drawn.batch_index], config.detect.critical_loss
        effect = effect_of(
            baseline.evaluation, injected.evaluation, batch, context.subject.family, critical, shortcut.rows
        )
        local, unmoved = self._at_site(drawn, injected)
        # Nothing behind an output that did not move can differ; for any other the site alone does not know.
        reached = effect if drawn.propagates or (unmoved and effect.outcome == "masked") else None
        self._monitor.add_time("baseline_forward", seconds)
        self._monitor.add_time("total", time.perf_counter() - start)
        detections = self._records.detections(drawn, injected.watcher, reached)
        measured = Measured(
            batch_index=drawn.batch_index,
            faults=drawn.faults,
            fault_id=drawn.fault_id,
            records=injected.records,
            baseline_loss=baseline.evaluation.loss,
            effect=reached,
            local=local,
            detections=detections,
            block_changes=injected.block_changes,
            metrics=self._records.metrics(drawn, detections),
            injection_seconds=injected.forward_seconds,
            tightest=tightest(injected.watcher, drawn.faults[0].layer),
            certificate=injected.watcher.certificate,
            corrector=injected.corrector,
            execution=shortcut.execution,
        )
        return self._records.record(drawn, measured)

    def _at_site(self, drawn: DrawnRun, injected: InjectedPass) -> tuple[LocalChange | None, bool]:
        """Return how far the layer's output moved in a run that is not propagated, and whether it did not at all."""
        if injected.keeper is None:
            return None, False
        clean = OutputKeeper(drawn.faults[0].layer)
        self._context.subject.forward(self._context.batches[drawn.batch_index], clean)
        return change_of(drawn.faults[0], injected.keeper, clean), bitwise_equal(injected.keeper.out, clean.out)

    def _certifier(self) -> Certifier:
        if self._made_certifier is None:
            self._made_certifier = Certifier(self._context.subject.model)
        return self._made_certifier

    def _repeat_baseline(self, baseline: Baseline, batch_index: int) -> float:
        evaluation, seconds = timed_forward(self._context.subject, self._context.batches[batch_index])
        if not bitwise_equal(evaluation.output, baseline.evaluation.output):
            raise CheckRefusedError(
                f"the fault-free pass of batch {batch_index} did not repeat bit for bit; effects of faults could "
                "not be told from the noise of this set-up"
            )
        return seconds

    def _inject(self, drawn: DrawnRun, outputs: BlockOutputs | None) -> InjectedPass:
        context, detect = self._context, drawn.config.detect
        batch, first = context.batches[drawn.batch_index], min(fault.layer for fault in drawn.faults)

        def traced(compute: Callable[[], Evaluation], watcher: Watcher) -> Evaluation:
            return context.forward().forward(
                "injected",
                f"fault:{drawn.fault_id}",
                dict(batch),
                compute,
                model=drawn.model_id,
                run_id=drawn.planned.run_id,
                fault=[fault.to_json() for fault in drawn.faults],
                details=lambda answer: {
                    "loss": answer.loss,
                    "phase_ms": {"bounds": 1e3 * watcher.bounds_seconds, "detection": 1e3 * watcher.detection_seconds},
                },
            )

        observed = Observed(
            drawn.baseline.situation,
            context.detectors(drawn.config),
            detect,
            certifier=self._certifier() if detect.certificate else None,
            keep_output=not drawn.propagates,
            site_only=not drawn.propagates,
            blocks=None if outputs is None else context.watcher(outputs, first),
            traced=traced,
        )
        return InjectedPass.of(context.subject, batch, drawn.faults, observed, self._monitor)


def attempt(execute: Callable[[], Done]) -> Done | Exception:
    """Return what ``execute`` does, or the error of one run; one that refuses the whole campaign is raised."""
    try:
        return execute()
    except (UsageError, MissingResourceError, CheckRefusedError):
        raise
    except Exception as error:
        return error
