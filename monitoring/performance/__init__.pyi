from .aggregator import PerformanceAggregator as PerformanceAggregator
from .monitor import PerformanceMetrics as PerformanceMetrics
from .monitor import PerformanceMonitor as PerformanceMonitor
