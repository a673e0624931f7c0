"""What one run cost: seconds by phase, memory, the size of the model, FLOPs, and overheads over the baseline.

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
from dataclasses import asdict, dataclass, replace
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

logger = logging.getLogger(__name__)

PHASES = ("total", "baseline_forward", "injection_forward", "bounds_computation", "violation_detection")
DERIVED = (
    "peak_memory_mb",
    "injection_vs_baseline",
    "detection_vs_baseline",
    "total_vs_baseline",
    "effective_tflops",
)


@dataclass(frozen=True)
class PerformanceMetrics:
    """The measurements of one run. A number that was not measured or does not exist is None, never 0.

    Times are seconds, accumulated over all uses of the phase's timer; ``*_passes`` says over how many.
    Phases may overlap: bounds computed within the injected pass are in both times. Memory is in MB (2**20
    bytes); the allocator's peaks exist on CUDA, the resident set on a CPU. ``attention_flops`` are the two
    attention products and ``forward_flops`` the whole of one fault-free pass, ``bounds_flops`` the epsilon
    chain on the checked layers; ``total_flops`` = forward + bounds, the work of one instrumented pass.
    """

    total_time: float | None = None
    baseline_forward_time: float | None = None
    injection_forward_time: float | None = None
    bounds_computation_time: float | None = None
    violation_detection_time: float | None = None
    baseline_passes: int | None = None
    injection_passes: int | None = None
    peak_memory_allocated_mb: float | None = None
    peak_memory_reserved_mb: float | None = None
    resident_memory_mb: float | None = None
    peak_resident_memory_mb: float | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    attention_flops: int | None = None
    bounds_flops: int | None = None
    forward_flops: int | None = None
    total_flops: int | None = None

    @property
    def peak_memory_mb(self) -> float | None:
        """The device's peak: allocated on CUDA, resident set on a CPU."""
        allocated = self.peak_memory_allocated_mb
        return self.peak_resident_memory_mb if allocated is None else allocated

    @property
    def injection_vs_baseline(self) -> float | None:
        """Percent by which one injected pass took longer than one baseline pass."""
        injected = _per_pass(self.injection_forward_time, self.injection_passes)
        baseline = _per_pass(self.baseline_forward_time, self.baseline_passes)
        return None if injected is None else _percent(injected - (baseline or 0.0), baseline)

    @property
    def detection_vs_baseline(self) -> float | None:
        """Bounds and violation detection of one injected pass, in percent of one baseline pass."""
        parts = [self.bounds_computation_time, self.violation_detection_time]
        measured = [part for part in parts if part is not None]
        if not measured:
            return None
        detection = _per_pass(sum(measured), self.injection_passes or self.baseline_passes)
        return _percent(detection, _per_pass(self.baseline_forward_time, self.baseline_passes))

    @property
    def total_vs_baseline(self) -> float | None:
        """Percent by which everything within the ``total`` timer took longer than the baseline alone."""
        if self.total_time is None or self.baseline_forward_time is None:
            return None
        return _percent(self.total_time - self.baseline_forward_time, self.baseline_forward_time)

    @property
    def effective_tflops(self) -> float | None:
        """The rate of the fault-free pass: ``forward_flops`` per second of a baseline pass, in 10**12."""
        seconds = _per_pass(self.baseline_forward_time, self.baseline_passes)
        return self.forward_flops / seconds / 1e12 if self.forward_flops and seconds else None

    def to_dict(self) -> dict[str, float | int | None]:
        """Return every field, then the derived numbers, in a fixed order."""
        return {**asdict(self), **{name: getattr(self, name) for name in DERIVED}}

    def summary(self) -> str:
        """Return the measurements as text in sections: time, memory, model, FLOPs, overheads."""
        numbers = self.to_dict()
        lines = []
        for title, unit, names in _SECTIONS:
            lines += [title, *(f"  {name:<26}{_shown(numbers[name]):>16} {unit}".rstrip() for name in names)]
        return "\n".join(lines)

    def print_summary(self) -> None:
        """Print ``summary()``."""
        print(self.summary())


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


_SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Time", "s", tuple(f"{phase}_time" for phase in PHASES)),
    (
        "Memory",
        "MB",
        (
            "peak_memory_allocated_mb",
            "peak_memory_reserved_mb",
            "resident_memory_mb",
            "peak_resident_memory_mb",
        ),
    ),
    ("Model", "", ("num_layers", "num_heads", "head_dim", "seq_len", "batch_size")),
    ("FLOPs", "", ("attention_flops", "bounds_flops", "forward_flops", "total_flops", "effective_tflops")),
    ("Overheads", "%", ("injection_vs_baseline", "detection_vs_baseline", "total_vs_baseline")),
)


def _phase(name: str) -> str:
    """Return the phase called ``name``; the field's spelling, with ``_time``, names it too."""
    phase = name.removesuffix("_time")
    if phase not in PHASES:
        close = difflib.get_close_matches(phase, PHASES, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"timer: got {name!r}, allowed: {', '.join(PHASES)}{hint}")
    return phase


def _per_pass(seconds: float | None, passes: int | None) -> float | None:
    return None if seconds is None else seconds / (passes or 1)


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100.0 * part / whole


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
