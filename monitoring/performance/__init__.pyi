from .aggregator import PerformanceAggregator as PerformanceAggregator
from .metrics import PerformanceMetrics as PerformanceMetrics
from .monitor import PerformanceMonitor as PerformanceMonitor
