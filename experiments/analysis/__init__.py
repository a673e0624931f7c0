"""Analyse campaigns: rates with honest intervals, comparisons and rankings. Tables go in, tables come out.

    runs = load_runs("results/default")            # one row per run, as below

>>> import pandas
>>> from experiments.analysis import detection_rate, load_runs
>>> runs = pandas.DataFrame({"fault_id": list("abcd"), "bit_field": ["sign", "sign", "mantissa", "mantissa"],
...                          "violation_detected": [True, True, True, False], "scope": "full", "outcome": "benign",
...                          "model": "m", "batch_index": [0, 1, 0, 1], "layer": 0, "index_head": [0, 1, 1, 0]})
>>> detection_rate(runs, by="bit_field")[["bit_field", "n", "rate"]].values.tolist()
[['mantissa', 2, 0.5], ['sign', 2, 1.0]]
"""

import lazy_loader

# The stub beside this file lists the exported names and their modules; a module is loaded when a name is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
