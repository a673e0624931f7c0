"""What a run costs: seconds by phase, memory, floating-point operations, and their statistics over runs."""

import lazy_loader

# What is handed on, and from where, stands in the stub beside; nothing is loaded before it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
