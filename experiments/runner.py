"""Run experiments from Python: your model, your data, one configuration.

>>> import torch, transformers
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 1, 4, 1]])
>>> runner = CompleteExperimentRunner(ExperimentConfig(exp_name="demo", injection_location="scores", num_runs=4))
>>> results = runner.run_all(model, [tokens])               # a list of ExperimentResult
>>> result = runner.run_single(3, model, [tokens])          # the same numbers as results[3]
>>> len(results), (result.fault_id, result.outcome) == (results[3].fault_id, results[3].outcome)
(4, True)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from experiments.config import ExperimentConfig
from experiments.engine.context import Context
from experiments.engine.contexts import check_runs
from experiments.engine.pairs import PairedRunner
from experiments.errors import UsageError
from experiments.inputs.families import FAMILIES
from experiments.machine.environment import set_determinism
from experiments.passes.subject import Subject
from experiments.plan.plan import PlannedRun, make_plan
from experiments.runs.record import RunRecord
from experiments.tables.schema import ExperimentResult
from monitoring import ForwardCache, PerformanceAggregator, TraceWriter
from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.cached_forward import CachedForward


class CompleteExperimentRunner:
    """Pairs fault-free and injected passes on a model of yours.

    Before the first run on a model and its data, the equivalence gate and the control run must pass.

    Args:
        config: which faults to inject and which detectors to run. Its ``model`` and ``data`` sections describe the
            model and data that a campaign would load; here they only enter the identity of the runs.
        family: a name of ``FAMILIES``; read from the model if not given.
        trace: where one line per forward pass goes (default: nowhere).
        set_deterministic: fix threads and algorithms as a campaign does (``run.threads``).

    Attributes:
        records: the records of the last call, with the rows of every detector and the faults.
        performance: the times, memory and operations of the runs of the last call; ``print_statistics()``.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        *,
        family: str | None = None,
        trace: TraceWriter | None = None,
        set_deterministic: bool = True,
    ) -> None:
        foreign = [key for key in config.sweep if key.startswith(("model.", "data."))]
        if foreign:
            raise UsageError(f"sweep.{foreign[0]}: model and data are given to the runner and cannot be swept here")
        if config.stop.margin is not None:
            raise UsageError("stop.margin: this runner does every run of its plan; leave it out, or use run_sweep.py")
        if family is not None:
            FAMILIES.find(family)
        self.config = config
        self.plan = make_plan(config)
        self.records: list[RunRecord] = []
        self.performance = PerformanceAggregator()
        self._family = family
        self._cache, self._stats = ForwardCache(), BackendStats()
        self._trace = trace or TraceWriter(None)
        self._set_deterministic = set_deterministic

    def run_all(self, model: nn.Module, dataloader: Iterable[Any]) -> list[ExperimentResult]:
        """Execute every run of the plan on the batches of ``dataloader`` (a list or any iterable of batches).

        A batch is a mapping with ``input_ids`` (batch, token), or the tensor itself.

        Raises:
            UsageError: the dataloader is empty, a batch is not valid, or the model lacks the layers or bits.
            CheckRefusedError: the gate or the control run refuses.
        """
        return self._execute(self.plan.runs, model, dataloader)

    def run_single(self, run_id: int | str, model: nn.Module, dataloader: Iterable[Any]) -> ExperimentResult:
        """Execute one run, by its number in the plan or by its id."""
        if isinstance(run_id, str):
            planned = self.plan.by_id(run_id)
        elif 0 <= run_id < len(self.plan.runs):
            planned = self.plan.runs[run_id]
        else:
            raise UsageError(f"run_id: got {run_id}, allowed 0..{len(self.plan.runs) - 1} or the id of a run")
        return self._execute([planned], model, dataloader)[0]

    def _execute(
        self, runs: Sequence[PlannedRun], model: nn.Module, dataloader: Iterable[Any]
    ) -> list[ExperimentResult]:
        with self._pairs(model, dataloader) as pairs:
            configs = [self.plan.config_of(run) for run in runs]
            check_runs(pairs, configs)
            pairs.prepare(self.config)
            done = pairs.run_many(list(zip(runs, configs, strict=True)))
            found = {run.run_id: record for run, record in done}
        self.records = []
        for run in runs:
            record = found[run.run_id]
            if isinstance(record, Exception):
                raise record
            self.records.append(record)
        self.performance = PerformanceAggregator()
        for record in self.records:
            self.performance.add(record.metrics)
        return [record.result for record in self.records]

    @contextmanager
    def _pairs(self, model: nn.Module, dataloader: Iterable[Any]) -> Iterator[PairedRunner]:
        if self._set_deterministic:
            set_determinism(self.config.run.threads)
        batches = list(dataloader)
        if not batches:
            raise UsageError("dataloader: got no batches")
        force_kv = self.config.model.force_kv_equal
        with Subject(model, self._family, force_kv_equal=force_kv) as subject:
            forward = CachedForward(self._cache, self._trace, self._stats, model=model, device=subject.device)
            name = getattr(model, "name_or_path", "") or type(model).__name__
            context = Context(subject, [subject.to_device(batch) for batch in batches], lambda: forward)
            yield PairedRunner(context, model_name=name)
