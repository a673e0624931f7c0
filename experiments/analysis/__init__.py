"""What the numbers of campaigns say: rates with honest intervals, comparisons, rankings; tables in, tables out.

from experiments.analysis import detection_rate, load_runs

runs = load_runs("results/default")
print(detection_rate(runs, by=["location", "bit_field"]))
"""

import lazy_loader

# What is handed on, and from where, stands in the stub beside; nothing is loaded before it is used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
