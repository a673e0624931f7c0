"""Analyse campaigns: rates with honest intervals, comparisons and rankings. Tables go in, tables come out.

from experiments.analysis import detection_rate, load_runs

runs = load_runs("results/default")
print(detection_rate(runs, by=["location", "bit_field"]))
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
