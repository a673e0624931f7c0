"""What is measured: performance, the forward cache and its trace.

Public names: ``PerformanceMonitor``, ``PerformanceMetrics``, ``PerformanceAggregator``, ``ForwardCache``,
``TraceWriter``. This package never imports ``experiments``.

>>> import monitoring
>>> monitor = monitoring.PerformanceMonitor("cpu")
>>> monitor.metrics.total_time is None
True
"""

from monitoring.forward_cache import ForwardCache
from monitoring.performance import PerformanceMetrics, PerformanceMonitor
from monitoring.performance_aggregator import PerformanceAggregator
from monitoring.trace_writer import TraceWriter

__all__ = ["ForwardCache", "PerformanceAggregator", "PerformanceMetrics", "PerformanceMonitor", "TraceWriter"]
