"""Forward passes that are looked up, counted and traced in one step.

    CachedForward.cached(op, view, prompt, params, compute)               one result
    CachedForward.cached_batch(op, view, prompts, params, compute_misses) many; the missing ones together
    CachedForward.forward(op, view, prompt, compute, fault=...)           never cached: a faulty pass
    labelled("campaign/trial")                                            the ``probe`` of the lines inside

Every call leaves one trace line per result. Lines whose ``hit`` is true or false have status "ok" and are the
lookups of ``BackendStats``; a computation that raises leaves one line with status "error" and ``hit`` null.
A pass run by ``forward`` counts as a miss: one line with ``hit`` false is one forward pass everywhere.

>>> runner = CachedForward(ForwardCache(), TraceWriter(None), BackendStats())
>>> [runner.cached("baseline", "base", "to be", 8, lambda: 42) for _ in range(2)]
[42, 42]
>>> runner.stats.forward_passes, runner.stats.cache_hits
(1, 1)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar, Unpack

import torch
from torch import Tensor, nn

from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.cached_value import clone_value
from monitoring.cache.fingerprints import input_fingerprint, params_fingerprint
from monitoring.cache.forward_cache import CacheKey, Entry, Flight, ForwardCache
from monitoring.cache.model_fingerprints import model_fingerprint
from monitoring.cache.pass_recorder import LineFields, PassCall, PassRecorder, Stopwatch
from monitoring.trace.trace_writer import TraceWriter, current_label, labelled

__all__ = ["CachedForward", "LineFields", "current_label", "labelled"]

V = TypeVar("V")
Prompt = str | Tensor | Mapping[str, Tensor | None]
Params = int | Mapping[str, object]
Model = nn.Module | str


class CachedForward:
    """Joins a cache, a trace and counters; safe for threads, one computation per key at a time.

    Args:
        cache, trace, stats: they receive results, lines and counts; one ``BackendStats`` per cache.
        model: what the results depend on, unless a call says otherwise: a module (its fingerprint is taken at
            every call, so changed weights miss), a ready fingerprint, or None for results of no model. With
            None the view name alone tells weights apart.
        device: where the work runs; timing waits for it. None: the device of the model's first parameter.

    A ``compute`` that changes weights must restore them, and its view must say so (``view_id(fault=...)``).
    """

    def __init__(
        self,
        cache: ForwardCache,
        trace: TraceWriter,
        stats: BackendStats,
        *,
        model: Model | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.cache = cache
        self.trace = trace
        self.stats = stats
        self.model = model
        self.device = _device_of(model) if device is None else torch.device(device)
        self.recorder = PassRecorder(cache, trace, stats)
        self._batch_ids = itertools.count()

    def key(
        self,
        op: str,
        view: str,
        prompt: Prompt,
        params: Params,
        *,
        model: Model | None = None,
        composition: tuple[int, int] | None = None,
    ) -> CacheKey:
        """Return the key that ``cached`` uses for the same arguments."""
        inputs = input_fingerprint(prompt, composition)
        return CacheKey(op, view, self._fingerprint(model), inputs, params_fingerprint(_mapping(params)))

    def cached(
        self,
        op: str,
        view: str,
        prompt: Prompt,
        params: Params,
        compute: Callable[[], V],
        *,
        model: Model | None = None,
        composition: tuple[int, int] | None = None,
        **fields: Unpack[LineFields],
    ) -> V:
        """Return the result for these arguments, computed at most once among all threads.

        Args:
            op: what is computed ("baseline", "next_token_dist", "resid@3"...).
            view: which view of the model, see ``view_id``.
            prompt: a prompt, a tensor, or the keyword tensors of the forward call.
            params: everything else that shapes the result; an integer means ``{"top_k": params}``.
            compute: returns the result; its exception reaches the caller, and nothing is stored.
            model: instead of the object's own.
            composition: ``(batch size, padded length)`` in which the input is run, if not its own shape.
            **fields: further trace fields, see ``LineFields``.

        Returns:
            The result of ``compute``, or an independent copy of it.
        """
        key = self.key(op, view, prompt, params, model=model, composition=composition)
        call = _call(key, prompt, params, fields)
        while True:
            start = time.perf_counter()
            claim = self.cache.claim(key)
            if isinstance(claim, Flight) and claim.mine:
                return self._compute(call, claim, compute)
            entry = claim if isinstance(claim, Entry) else claim.wait()
            if entry is not None:
                value: V = self.serve(call, entry, start, coalesced=entry is not claim)
                return value

    def cached_batch(
        self,
        op: str,
        view: str,
        prompts: Sequence[Prompt],
        params: Params,
        compute_misses: Callable[[list[int]], Sequence[V]],
        *,
        model: Model | None = None,
        composition: tuple[int, int] | None = None,
        **fields: Unpack[LineFields],
    ) -> list[V]:
        """Return one result per prompt; one call computes all missing results.

        ``compute_misses`` receives the indices of the missing prompts, each distinct one once, and returns their
        values in that order. Without ``composition`` a result is taken to be the same in any batch: pass
        it where kernels round differently by batch shape. (Should another thread fail at a prompt that this
        call waits for, ``compute_misses`` is called once more, for that prompt.)

        Raises:
            RuntimeError: ``compute_misses`` returned another number of values; nothing is stored.
        """
        if not prompts:
            return []
        model = self._fingerprint(model)
        batch_id = next(self._batch_ids)
        keys = [self.key(op, view, prompt, params, model=model, composition=composition) for prompt in prompts]
        calls = [_call(key, prompt, params, fields, batch_id) for key, prompt in zip(keys, prompts, strict=True)]
        return _Batch(self, calls, compute_misses).results()

    def forward(
        self,
        op: str,
        view: str,
        prompt: Prompt,
        compute: Callable[[], V],
        *,
        params: Params | None = None,
        model: Model | None = None,
        **fields: Unpack[LineFields],
    ) -> V:
        """Run a pass that is never looked up or stored, such as a faulty one; count and trace it as a miss."""
        params = {} if params is None else params
        call = _call(self.key(op, view, prompt, params, model=model), prompt, params, fields)
        watch = Stopwatch(self.device)
        try:
            with watch.running():
                value = compute()
            found = call.describe(value)
        except BaseException as error:
            self.recorder.error(call, watch, error)
            raise
        self.recorder.miss(call, found, watch, uncached=True)
        return value

    def snapshot(self) -> dict[str, float | int]:
        """Return all counters of statistics, cache and trace, consistent with each other."""
        with self.cache.lock:
            cache, stats, trace = self.cache, self.stats, self.trace
            return {
                **stats.to_dict(),
                **{name: getattr(stats, name) for name in ("total_lookups", "coalesced", "uncached", "errors", "rows")},
                **{name: getattr(cache, name) for name in ("nbytes", "evictions", "uncacheable", "disk_hits")},
                "entries": len(cache),
                "trace_lines": trace.lines,
                "trace_dropped": trace.dropped,
                "recovered_tail": trace.recovered_tail,
            }

    def serve(self, call: PassCall, entry: Entry, start: float, *, coalesced: bool) -> Any:
        """Lend an entry's value and record the hit that began at ``start``."""
        value = self.cache.lend(entry)
        self.recorder.hit(call, value, time.perf_counter() - start, coalesced=coalesced)
        return value

    def _compute(self, call: PassCall, flight: Flight, compute: Callable[[], V]) -> V:
        watch = Stopwatch(self.device)
        try:
            with watch.running():
                value = compute()
            found = call.describe(value)
            entry = self.cache.admit(call.key, value)
        except BaseException as error:
            self.cache.land(flight, None)
            self.recorder.error(call, watch, error)
            raise
        with self.cache.lock:  # no thread may hit the value before its miss is recorded
            self.cache.land(flight, entry)
            self.recorder.miss(call, found, watch)
        return value

    def _fingerprint(self, model: Model | None) -> str:
        model = self.model if model is None else model
        return model_fingerprint(model) if isinstance(model, nn.Module) else model or "none"


class _Batch(Generic[V]):
    """The calls of one ``cached_batch``, on their way to their results."""

    def __init__(
        self,
        runner: CachedForward,
        calls: list[PassCall],
        compute_misses: Callable[[list[int]], Sequence[V]],
    ) -> None:
        self.runner = runner
        self.calls = calls
        self.compute_misses = compute_misses
        self.values: dict[int, V] = {}
        self.computed: set[CacheKey] = set()

    def results(self) -> list[V]:
        first: dict[CacheKey, int] = {}
        for index, call in enumerate(self.calls):
            first.setdefault(call.key, index)
        pending = list(first.values())
        while pending:
            pending = self._round(pending)
        for index, call in enumerate(self.calls):
            if index not in self.values:
                start = time.perf_counter()
                value = self.values[index] = clone_value(self.values[first[call.key]])
                wall_s = time.perf_counter() - start
                self.runner.recorder.hit(call, value, wall_s, coalesced=call.key in self.computed)
        return [self.values[index] for index in range(len(self.calls))]

    def _round(self, pending: list[int]) -> list[int]:
        """Serve stored results, compute our own, then wait for the rest; return the prompts at which others failed.

        Our own flights land before we wait, so two batches that need each other's keys cannot block.
        """
        cache = self.runner.cache
        ours: dict[int, Flight] = {}
        others: dict[int, Flight] = {}
        try:
            for index in pending:
                start = time.perf_counter()
                claim = cache.claim(self.calls[index].key)
                if isinstance(claim, Entry):
                    self.values[index] = self.runner.serve(self.calls[index], claim, start, coalesced=False)
                else:
                    (ours if claim.mine else others)[index] = claim
            if ours:
                self._compute(ours)
        finally:
            for flight in ours.values():
                cache.land(flight, None)
        left = []
        for index, flight in others.items():
            start = time.perf_counter()
            entry = flight.wait()
            if entry is None:
                left.append(index)
            else:
                self.values[index] = self.runner.serve(self.calls[index], entry, start, coalesced=True)
        return left

    def _compute(self, ours: dict[int, Flight]) -> None:
        runner, indices = self.runner, list(ours)
        watch = Stopwatch(runner.device)
        try:
            with watch.running():
                values = self.compute_misses(indices)
            if len(values) != len(indices):
                raise RuntimeError(f"compute_misses: got {len(values)} values for {len(indices)} missing prompts")
            found = [self.calls[index].describe(value) for index, value in zip(indices, values, strict=True)]
            entries = [runner.cache.admit(self.calls[i].key, v) for i, v in zip(indices, values, strict=True)]
        except BaseException as error:
            runner.recorder.error(self.calls[indices[0]], watch, error, share=len(indices))
            raise
        with runner.cache.lock:
            runner.stats.record_batch(len(indices))
            for place, index in enumerate(indices):
                runner.cache.land(ours.pop(index), entries[place])
                runner.recorder.miss(self.calls[index], found[place], watch, share=len(indices))
                self.values[index] = values[place]
                self.computed.add(self.calls[index].key)


def _call(key: CacheKey, prompt: Prompt, params: Params, fields: LineFields, batch_id: int | None = None) -> PassCall:
    return PassCall.build(key, _rows(prompt), _mapping(params).get("top_k"), batch_id, fields)


def _mapping(params: Params) -> Mapping[str, object]:
    return params if isinstance(params, Mapping) else {"top_k": params}


def _rows(prompt: Prompt) -> int:
    """Return how many sequences a prompt is: 1, or the first dimension of its first tensor."""
    if isinstance(prompt, str):
        return 1
    tensors = [prompt] if isinstance(prompt, Tensor) else [tensor for tensor in prompt.values() if tensor is not None]
    return tensors[0].shape[0] if tensors[0].ndim else 1


def _device_of(model: Model | None) -> torch.device | None:
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if first is None else first.device
