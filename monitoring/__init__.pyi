from .cache.forward_cache import ForwardCache as ForwardCache
from .performance.aggregator import PerformanceAggregator as PerformanceAggregator
from .performance.metrics import PerformanceMetrics as PerformanceMetrics
from .performance.monitor import PerformanceMonitor as PerformanceMonitor
from .trace.trace_writer import TraceWriter as TraceWriter
