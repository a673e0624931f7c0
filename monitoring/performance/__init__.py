"""What a run costs: seconds by phase, memory, floating-point operations, and their statistics over runs.

Public names: ``PerformanceMetrics``, ``PerformanceMonitor``, ``PerformanceAggregator``.
"""

from monitoring.performance.aggregator import PerformanceAggregator
from monitoring.performance.monitor import PerformanceMetrics, PerformanceMonitor

__all__ = ["PerformanceAggregator", "PerformanceMetrics", "PerformanceMonitor"]
