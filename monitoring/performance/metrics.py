"""What one run cost: seconds by phase, memory, the size of the model, FLOPs, and overheads over the baseline.

>>> metrics = PerformanceMetrics(baseline_forward_time=2.0, injection_forward_time=3.0)
>>> metrics.injection_vs_baseline, metrics.detection_vs_baseline      # percent; not measured is not 0
(50.0, None)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

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


def _per_pass(seconds: float | None, passes: int | None) -> float | None:
    return None if seconds is None else seconds / (passes or 1)


def _percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else 100.0 * part / whole


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
