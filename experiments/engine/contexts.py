"""Contexts: what runs share that use one model on one data set drawn by one seed.

    contexts = Contexts(trace)
    pairs = contexts.open(config)        # loads, patches, and passes the gate; the same context is returned again

Loading is the slow part of a small campaign, so the last model is kept for as long as runs use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from experiments.config import ExperimentConfig
from experiments.engine.context import Context
from experiments.engine.kept_proofs import KeptProofs
from experiments.engine.pairs import PairedRunner
from experiments.errors import UsageError
from experiments.inputs.models import LoadedModel, load_model
from experiments.inputs.windows import data_fingerprint, make_batches, make_calibration_batches
from experiments.passes.subject import Subject
from experiments.plan.plan import PlannedRun, canonical_json
from fault_injection import NoAttentionError, UncoveredArchitectureError
from monitoring import ForwardCache, TraceWriter
from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.cached_forward import CachedForward
from monitoring.cache.model_fingerprints import model_fingerprint


def context_key(config: ExperimentConfig) -> str:
    """Return a text that is equal for runs of one context."""
    parts = {"model": dataclasses.asdict(config.model), "data": dataclasses.asdict(config.data), "seed": config.seed}
    return canonical_json(parts)


class Contexts:
    """Opens contexts one after the other; closing it unpatches the last model.

    Args:
        trace: where the passes are written to.
        stopping, kept: handed to the runners (``PairedRunner``).

    Attributes:
        facts: by context key, fingerprints and the results of the checks, for provenance.
    """

    def __init__(
        self, trace: TraceWriter, stopping: Callable[[], bool] = lambda: False, kept: KeptProofs | None = None
    ) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        self._cache, self._stats, self._trace = ForwardCache(), BackendStats(), trace
        self._stopping, self._kept = stopping, kept
        self._loaded: tuple[str, LoadedModel, Subject] | None = None
        self._open: tuple[str, PairedRunner] | None = None

    def __enter__(self) -> Contexts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_model()

    def use_trace(self, trace: TraceWriter) -> None:
        """Write the following passes to another trace."""
        self._trace = trace

    def open(self, config: ExperimentConfig, first: PlannedRun | None = None) -> PairedRunner:
        """Return the runner for the context of ``config``, ready for runs.

        Args:
            config: names the model and the data.
            first: the context is checked on the batch of this run (default: on the first batch).

        Raises:
            UsageError, MissingResourceError: model or data cannot be had.
            CheckRefusedError: the gate or the control run refuses.
        """
        key = context_key(config)
        if self._open is not None and self._open[0] == key:
            return self._open[1]
        loaded, subject = self._model(config)
        source = config.data, loaded.tokenizer, config.seed, loaded.family, loaded.vocabulary
        made = make_batches(*source)
        facts = {
            "model": config.model.path,
            "resolved": loaded.resolved,
            "revision": loaded.revision,
            "family": loaded.family,
            "model_fingerprint": model_fingerprint(loaded.model),
            "data_fingerprint": data_fingerprint(made),
        }
        context = Context(
            subject,
            [subject.to_device(batch) for batch in made],
            lambda: self._forward(subject),
            calibration=lambda: [subject.to_device(batch) for batch in make_calibration_batches(*source)],
            facts=facts,
        )
        pairs = PairedRunner(context, stopping=self._stopping, kept=self._kept)
        self.facts[key] = pairs.prepare(config, first)
        self._open = key, pairs
        return pairs

    def _forward(self, subject: Subject) -> CachedForward:
        return CachedForward(self._cache, self._trace, self._stats, model=subject.model, device=subject.device)

    def _model(self, config: ExperimentConfig) -> tuple[LoadedModel, Subject]:
        key = canonical_json(dataclasses.asdict(config.model))
        if self._loaded is None or self._loaded[0] != key:
            self._close_model()
            loaded = load_model(config.model)
            try:
                subject = Subject(loaded.model, loaded.family, force_kv_equal=config.model.force_kv_equal)
            except (NoAttentionError, UncoveredArchitectureError) as error:
                raise UsageError(f"model.path: {config.model.path}: {error}") from error
            self._loaded = key, loaded, subject
        return self._loaded[1], self._loaded[2]

    def _close_model(self) -> None:
        if self._loaded is not None:
            self._loaded[2].close()
        self._loaded = self._open = None


def check_runs(pairs: PairedRunner, configs: Iterable[ExperimentConfig]) -> None:
    """Refuse layers, bits and indices that the model at hand does not have, before the first run.

    Raises:
        UsageError: with the range.
    """
    seen: set[str] = set()
    for config in configs:
        key = canonical_json(dataclasses.asdict(config.fault))
        if key not in seen:
            seen.add(key)
            try:
                pairs.drawing.check(config)
            except (ValueError, IndexError) as error:
                raise UsageError(str(error)) from error
