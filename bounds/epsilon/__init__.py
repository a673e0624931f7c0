"""The epsilon bounds of attention rows: from weights, from outputs, and the decision."""

import lazy_loader

# What is handed on, and from where, stands in the stub beside; nothing is loaded before it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
