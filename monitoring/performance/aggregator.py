"""Statistics of performance over the runs of a campaign.

>>> from monitoring.performance.metrics import PerformanceMetrics
>>> aggregator = PerformanceAggregator()
>>> for seconds in (1.0, 2.0, 6.0):
...     aggregator.add(PerformanceMetrics(total_time=seconds))
>>> total = aggregator.compute_statistics()["total_time"]
>>> total["mean"], total["median"], total["min"], total["max"], total["n"], total["missing"]
(3.0, 2.0, 1.0, 6.0, 3, 0)
>>> aggregator.compute_statistics()["baseline_forward_time"]["mean"] is None
True
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypedDict

import numpy as np

from monitoring.performance.metrics import PerformanceMetrics


class FieldStatistics(TypedDict):
    """Statistics of one field: ``n`` finite values went in, ``missing`` (None, NaN, infinite) were left out.

    Without a value every statistic is None. ``std`` is that of a sample (divisor n-1) and None for a single
    value.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    median: float | None
    n: int
    missing: int


class PerformanceAggregator:
    """Collects the ``PerformanceMetrics`` of many runs and describes every field of ``to_dict``."""

    def __init__(self) -> None:
        self._columns: dict[str, list[float | int | None]] = {name: [] for name in PerformanceMetrics().to_dict()}

    def __len__(self) -> int:
        return len(self._columns["total_time"])

    def add(self, metrics: PerformanceMetrics) -> None:
        """Take in the metrics of one run.

        Raises:
            TypeError: ``metrics`` is something else, for example the monitor itself.
        """
        if not isinstance(metrics, PerformanceMetrics):
            raise TypeError(f"metrics: got {type(metrics).__name__}, allowed: PerformanceMetrics (monitor.metrics)")
        for name, value in metrics.to_dict().items():
            self._columns[name].append(value)

    def compute_statistics(self) -> dict[str, FieldStatistics]:
        """Return mean, std, min, max, median, n and missing of every field, in the order of ``to_dict``."""
        return {name: _describe(values) for name, values in self._columns.items()}

    def print_statistics(self) -> None:
        """Print a table of the fields that have a value in at least one run."""
        heads = ("mean", "std", "min", "median", "max")
        print(f"Performance of {len(self)} run(s)")
        print(f"{'field':<26}" + "".join(f"{head:>13}" for head in heads) + f"{'n':>7}{'missing':>9}")
        for name, found in self.compute_statistics().items():
            if found["n"]:
                shown = (found["mean"], found["std"], found["min"], found["median"], found["max"])
                cells = "".join(f"{'-' if value is None else format(value, '.6g'):>13}" for value in shown)
                print(f"{name:<26}{cells}{found['n']:>7}{found['missing']:>9}")


def _describe(values: Iterable[float | int | None]) -> FieldStatistics:
    column = list(values)
    finite = np.array([value for value in column if value is not None and math.isfinite(value)], dtype=np.float64)
    n = len(finite)
    return FieldStatistics(
        mean=float(finite.mean()) if n else None,
        std=float(finite.std(ddof=1)) if n > 1 else None,
        min=float(finite.min()) if n else None,
        max=float(finite.max()) if n else None,
        median=float(np.median(finite)) if n else None,
        n=n,
        missing=len(column) - n,
    )
