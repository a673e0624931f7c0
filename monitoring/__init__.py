"""What is measured: performance, the forward cache and its trace.

Public names: ``PerformanceMonitor``, ``PerformanceMetrics``, ``PerformanceAggregator``, ``ForwardCache``,
``TraceWriter``. This package never imports ``experiments``.

>>> import monitoring
>>> monitor = monitoring.PerformanceMonitor("cpu")
>>> monitor.metrics.total_time is None
True
"""

from monitoring.cache.forward_cache import ForwardCache
from monitoring.performance.aggregator import PerformanceAggregator
from monitoring.performance.monitor import PerformanceMetrics, PerformanceMonitor
from monitoring.trace.trace_writer import TraceWriter

__all__ = ["ForwardCache", "PerformanceAggregator", "PerformanceMetrics", "PerformanceMonitor", "TraceWriter"]
