"""Pairs: one fault, its injected pass, and the fault-free baseline of the same input.

pairs = PairedRunner(Context(subject, batches, lambda: forward))
pairs.prepare(config)                    # equivalence gate, control run and start-up proof, or CheckRefusedError
record = pairs.run(planned, config)      # a RunRecord: one result, its detections, its faults
for planned, record in pairs.run_many(runs): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from bounds import Detector
from experiments.config import ExperimentConfig
from experiments.engine.batch_runs import BatchRuns
from experiments.engine.context import Context
from experiments.engine.kept_proofs import KeptProofs
from experiments.engine.plain import PlainRuns, attempt
from experiments.engine.proofs import Proofs
from experiments.engine.records import Records
from experiments.passes.baseline import Baseline
from experiments.passes.gate import control_run, equivalence_gate
from experiments.passes.subject import Subject
from experiments.plan.plan import PlannedRun
from experiments.runs.drawing import FaultDrawing
from experiments.runs.record import RunRecord

WORTH_A_PROOF = 32
"""Fewer runs than this take less time than the start-up proof of the fast engine."""


class PairedRunner:
    """Runs pairs in one context, each the fastest way that is exact.

    Args:
        context: the model and its inputs.
        model_name: what the rows call a model that was given, like the batches, from Python (default: both are those of
            the run's configuration).
        stopping: asked before anything is begun; once it is true, ``run_many`` ends early.
        kept: start-up proofs of earlier starts (default: none).

    Attributes:
        drawing: draws the faults of runs.
    """

    def __init__(
        self,
        context: Context,
        *,
        model_name: str | None = None,
        stopping: Callable[[], bool] = lambda: False,
        kept: KeptProofs | None = None,
    ) -> None:
        self.context, self._stopping, self._proofs = context, stopping, Proofs(context, kept)
        records = Records(context, model_name)
        self.drawing = FaultDrawing(context.subject, context.batches, context.baselines)
        self._plain = PlainRuns(context, records)
        self._fast = BatchRuns(context, records, self._plain, self.drawing, self._proofs, stopping)

    @property
    def subject(self) -> Subject:
        """The patched model."""
        return self.context.subject

    @property
    def batches(self) -> Sequence[Mapping[str, Tensor]]:
        """Its inputs."""
        return self.context.batches

    def detectors(self, config: ExperimentConfig) -> list[Detector]:
        """Return the detectors of a configuration, prepared for the model and calibrated, made once for all runs."""
        return self.context.detectors(config)

    def baseline(self, batch_index: int, config: ExperimentConfig) -> Baseline:
        """Return the fault-free pass of a batch, computed once for each input, model and set of detectors."""
        return self.context.baseline(batch_index, config)

    def prepare(self, config: ExperimentConfig, run: PlannedRun | None = None) -> dict[str, Any]:
        """Run the equivalence gate and the control run; return what was checked, for provenance.

        Args:
            config: its engine and its choice of detectors count.
            run: the checks use the batch of this run, whose baseline is needed anyway (default: the first batch).
        """
        context, number = self.context, 0 if run is None else run.batch_index(len(self.batches))
        batch = self.batches[number]
        equivalence_gate(context.subject, batch, lambda: self._fault_free(number, config).evaluation)
        baseline = context.baseline(number, config)
        control_run(context.subject, batch, baseline.evaluation, baseline.sites)
        context.facts |= {
            "equivalence_gate": "bitwise equal to the model's own eager attention",
            "control_run": "loss and output differ by exactly 0",
            "execution": "plain",
            "attention_layers": context.subject.layer_names,
            "attention_paths": [core.path for core in context.subject.cores],
            "kv_equal": [context.subject.kv_equal.get(core.index) for core in context.subject.cores],
        }
        if config.run.engine == "fast":
            self._proofs.get(config)
        context.follows(config)
        return context.facts

    def _fault_free(self, number: int, config: ExperimentConfig) -> Baseline:
        """Return the baseline of a batch; where a proof is kept, the same pass is recorded for the runs."""
        if config.run.engine != "plain" and config.run.reuse_baseline:
            proof = self._proofs.known(config)
            if proof is not None and proof.chain is not None:
                self.context.opened(number, config, proof.chain, by_groups=proof.rows is None)
        return self.context.baseline(number, config)

    def run(self, planned: PlannedRun, config: ExperimentConfig) -> RunRecord:
        """Execute one run by whole forward passes.

        Args:
            planned: its identity.
            config: the configuration of this run alone (``Plan.config_of``).

        Raises:
            ValueError, IndexError: layers, bits or an index that the model does not have.
            FaultMissedError: the pass never reached the fault.
        """
        start = self._plain.begin()
        return self._plain.run(self.drawing.draw(planned, config), start=start)

    def run_many(
        self, runs: Sequence[tuple[PlannedRun, ExperimentConfig]]
    ) -> Iterator[tuple[PlannedRun, RunRecord | Exception]]:
        """Execute runs of one context as ``run.engine`` says; yield each once, in any order, as it is done.

        Those that were not begun when ``stopping`` became true are not yielded.

        A run that raises is yielded with its exception; what refuses the whole campaign is raised.
        """
        together = [run for run in runs if run[1].run.engine != "plain"]
        if len(together) < WORTH_A_PROOF:
            together = [run for run in together if run[1].run.engine == "fast"]
        yield from self._fast.run(together)
        done = {planned.run_id for planned, _ in together}
        for planned, config in runs:
            if self._stopping():
                return
            if planned.run_id not in done:
                yield planned, attempt(partial(self.run, planned, config))
