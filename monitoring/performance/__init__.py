"""What a run costs: seconds by phase, memory, floating-point operations, and their statistics over runs."""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
