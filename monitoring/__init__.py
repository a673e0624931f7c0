"""What is measured: performance, the forward cache and its trace.

This package never imports ``experiments``.

>>> import monitoring
>>> monitor = monitoring.PerformanceMonitor("cpu")
>>> monitor.metrics.total_time is None
True
"""

import lazy_loader

# What is handed on, and from where, stands in the stub beside; nothing is loaded before it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
