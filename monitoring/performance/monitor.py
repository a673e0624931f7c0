"""Measure what one run costs: seconds by phase, memory, the size of the model, FLOPs.

>>> monitor = PerformanceMonitor("cpu")
>>> with monitor.timer("total"):
...     with monitor.timer("baseline_forward"):
...         _ = sum(range(1000))
>>> metrics = monitor.metrics
>>> metrics.total_time >= metrics.baseline_forward_time > 0
True
>>> metrics.injection_forward_time is None and metrics.injection_vs_baseline is None  # not measured is not 0
True
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from monitoring.performance.flops import (
    AttentionShape,
    attention_flops,
    attention_formula_gap,
    attention_shape,
    batch_shape,
    bounds_flops,
    forward_flops,
    forward_formula_gap,
    head_dimension,
    text_config,
)
from monitoring.performance.memory import MemoryReading, MemoryWatch
from monitoring.performance.metrics import PHASES, PerformanceMetrics

logger = logging.getLogger(__name__)


class PerformanceMonitor:
    """Measures one run on one device; ``metrics`` gives what was measured so far. One monitor, one thread.

    Args:
        device: ``"cpu"`` or a CUDA device, on which every reading of the clock waits for the device first.
            Peaks of CUDA memory are those since the monitor was made or ``reset``.

    Raises:
        ValueError: the device is neither, or CUDA is not available.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device: got {str(device)!r}, allowed: 'cpu', 'cuda' or 'cuda:N'")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: got {str(device)!r}, but torch.cuda.is_available() is False; allowed: 'cpu'")
        self.reset()

    def reset(self) -> None:
        """Forget every measurement, for the next run."""
        self._seconds: dict[str, float] = {}
        self._uses: dict[str, int] = {}
        self._open: list[str] = []
        self._reading = MemoryReading()
        self._model: dict[str, int] = {}
        self._shape: AttentionShape | None = None
        self._forward_flops: int | None = None
        self._flops: dict[str, int | None] = {}
        self._memory = MemoryWatch(self.device)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the duration of the block to phase ``name``, also when the block raises.

        Timers of different phases may nest, each counting its own duration. Repeated uses of one
        accumulate; a use within a use of the same phase is part of it and adds nothing.

        Raises:
            ValueError: ``name`` is none of ``PHASES``.
        """
        phase = _phase(name)
        if phase in self._open:
            yield
            return
        with nullcontext() if self._open else self._memory.window():
            self._synchronize()
            self._open.append(phase)
            start = time.perf_counter()
            try:
                yield
            finally:
                try:
                    self._synchronize()  # raises when the device failed within the block
                finally:
                    self._open.remove(phase)
                    self.add_time(phase, time.perf_counter() - start)

    def add_time(self, name: str, seconds: float) -> None:
        """Add a duration measured elsewhere, for example that of a baseline pass that came out of a cache."""
        phase = _phase(name)
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds of {phase}: got {seconds!r}, allowed: a finite number >= 0")
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        self._uses[phase] = self._uses.get(phase, 0) + 1

    def record_memory(self) -> MemoryReading:
        """Read the memory now. The resident peak is that within timed phases, None before the first."""
        self._reading = self._memory.reading()
        return self._reading

    def record_model_info(self, model: nn.Module, batch: Tensor | Mapping[str, Any]) -> None:
        """Read the sizes of the model from ``model.config``, those of the pass from ``batch``.

        ``batch`` is token ids (B, T), or a mapping with ``input_ids`` (B, T) or ``inputs_embeds`` (B, T,
        hidden).
        """
        config = text_config(model)
        size, length = batch_shape(batch)
        self._model = {
            "num_layers": int(config.num_hidden_layers),
            "num_heads": int(config.num_attention_heads),
            "head_dim": head_dimension(model),
            "seq_len": length,
            "batch_size": size,
        }
        gap = attention_formula_gap(model)
        self._shape = attention_shape(model, batch) if gap is None else None
        gap = forward_formula_gap(model)
        self._forward_flops = forward_flops(model, batch) if gap is None else None
        if gap is not None:
            logger.info("no FLOPs formula for %s: %s", type(model).__name__, gap)

    def estimate_flops(self, checked_layers: int | None = None) -> dict[str, int | None]:
        """Return attention, bounds, forward and total FLOPs by formula; None where the formula does not hold.

        Args:
            checked_layers: how many layers compute bounds; all of them by default.

        Raises:
            RuntimeError: ``record_model_info`` has not been called.
            ValueError: ``checked_layers`` is not between 0 and the number of layers.
        """
        if not self._model:
            raise RuntimeError("estimate_flops: the model is not known; call record_model_info(model, batch) first")
        layers = self._model["num_layers"]
        checked = layers if checked_layers is None else checked_layers
        if not 0 <= checked <= layers:
            raise ValueError(f"checked_layers: got {checked}, allowed: 0..{layers}")
        shape, forward = self._shape, self._forward_flops
        bounds = bounds_flops(replace(shape, layers=checked)) if shape else None
        self._flops = {
            "attention_flops": attention_flops(shape) if shape else None,
            "bounds_flops": bounds,
            "forward_flops": forward,
            "total_flops": None if forward is None or bounds is None else forward + bounds,
        }
        return dict(self._flops)

    @property
    def metrics(self) -> PerformanceMetrics:
        """The measurements so far, without timers that are still open."""
        return PerformanceMetrics(
            total_time=self._seconds.get("total"),
            baseline_forward_time=self._seconds.get("baseline_forward"),
            injection_forward_time=self._seconds.get("injection_forward"),
            bounds_computation_time=self._seconds.get("bounds_computation"),
            violation_detection_time=self._seconds.get("violation_detection"),
            baseline_passes=self._uses.get("baseline_forward"),
            injection_passes=self._uses.get("injection_forward"),
            peak_memory_allocated_mb=self._reading.peak_allocated_mb,
            peak_memory_reserved_mb=self._reading.peak_reserved_mb,
            resident_memory_mb=self._reading.resident_mb,
            peak_resident_memory_mb=self._reading.peak_resident_mb,
            **self._model,
            **self._flops,
        )

    def summary(self) -> str:
        """Return ``metrics.summary()``."""
        return self.metrics.summary()

    def print_summary(self) -> None:
        """Print ``summary()``."""
        print(self.summary())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def paired_order(generator: torch.Generator) -> tuple[str, str]:
    """Draw which pass of a pair runs first, each order with probability one half.

    The second of two equal passes is often the faster one (warm caches); a drawn order keeps that out of the
    mean overhead, and a seeded ``generator`` makes it repeatable.

    >>> paired_order(torch.Generator().manual_seed(0)) in {("baseline", "injected"), ("injected", "baseline")}
    True
    """
    first = bool(torch.randint(2, (), generator=generator, device=generator.device))
    return ("baseline", "injected") if first else ("injected", "baseline")


def _phase(name: str) -> str:
    """Return the phase called ``name``; the field's spelling, with ``_time``, names it too."""
    phase = name.removesuffix("_time")
    if phase not in PHASES:
        close = difflib.get_close_matches(phase, PHASES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"timer: got {name!r}, allowed: {', '.join(PHASES)}{hint}")
    return phase
