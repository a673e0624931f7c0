"""What the numbers of campaigns say: rates with honest intervals, comparisons, rankings; tables in, tables out.

    from experiments.analysis import detection_rate, load_runs

    runs = load_runs("results/default")
    print(detection_rate(runs, by=["location", "bit_field"]))

Public names: those of ``__all__``.
"""

from experiments.analysis.comparison import compare
from experiments.analysis.detectors import detector_comparison
from experiments.analysis.loading import load_clean, load_detections, load_propagation, load_runs
from experiments.analysis.means import (
    bound_tightness,
    epsilon_distribution,
    loss_change,
    margin_statistics,
    overhead,
)
from experiments.analysis.ranking import rank_cells
from experiments.analysis.rates import (
    coverage_of_critical,
    critical_rate,
    detection_rate,
    false_positive_rate,
    outcome_rates,
)
from experiments.analysis.statistics.clusters import DEFAULT_CLUSTER
from experiments.analysis.statistics.distinct import distinct_faults, propagated
from experiments.analysis.statistics.intervals import clustered_interval, exact_interval, wilson_interval
from experiments.analysis.statistics.weighted import hajek, horvitz_thompson, regression

__all__ = [
    "DEFAULT_CLUSTER",
    "bound_tightness",
    "clustered_interval",
    "compare",
    "coverage_of_critical",
    "critical_rate",
    "detection_rate",
    "detector_comparison",
    "distinct_faults",
    "epsilon_distribution",
    "exact_interval",
    "false_positive_rate",
    "hajek",
    "horvitz_thompson",
    "load_clean",
    "load_detections",
    "load_propagation",
    "load_runs",
    "loss_change",
    "margin_statistics",
    "outcome_rates",
    "overhead",
    "propagated",
    "rank_cells",
    "regression",
    "wilson_interval",
]
