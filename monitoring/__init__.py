"""What is measured: performance, the forward cache and its trace.

This package never imports ``experiments``.

>>> import monitoring
>>> monitor = monitoring.PerformanceMonitor("cpu")
>>> monitor.metrics.total_time is None
True
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
