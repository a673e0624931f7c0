"""What the numbers of campaigns say: rates with honest intervals, comparisons, rankings; tables in, tables out.

    from experiments.analysis import detection_rate, load_runs

    runs = load_runs("results/default")
    print(detection_rate(runs, by=["location", "bit_field"]))

Public names: those of ``__all__``.
"""

from experiments.analysis.clusters import DEFAULT_CLUSTER
from experiments.analysis.distinct import HARMFUL, distinct_faults, propagated
from experiments.analysis.intervals import exact_interval, korn_graubard_interval, wilson_interval
from experiments.analysis.loading import load_clean, load_detections, load_propagation, load_runs
from experiments.analysis.rates import (
    coverage_of_critical,
    critical_rate,
    detection_rate,
    false_positive_rate,
    outcome_rates,
)

__all__ = [
    "DEFAULT_CLUSTER",
    "HARMFUL",
    "coverage_of_critical",
    "critical_rate",
    "detection_rate",
    "distinct_faults",
    "exact_interval",
    "false_positive_rate",
    "korn_graubard_interval",
    "load_clean",
    "load_detections",
    "load_propagation",
    "load_runs",
    "outcome_rates",
    "propagated",
    "wilson_interval",
]
