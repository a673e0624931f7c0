"""The columns of every result file.

A column is declared once, as a field of a dataclass here: name, type, unit, meaning, and where its value comes from
(``experiments.tables.columns``). Everything else is read from these declarations: the rows of a run, the headers of
files, the types of analysis and Parquet, ``--list columns``, and the readme in ``results/``, which
``python -m experiments.tables.schema`` prints.

>>> columns(ExperimentResult)[:2]
['run_id', 'repeat']

Cells: a number that does not exist is an empty cell, never 0; floats are written by ``repr`` so that they read back to
the same bits; ``value_after`` may be ``nan`` or ``inf``; booleans are ``True`` and ``False``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from experiments.tables.columns import cell, cells, column, columns, declared, row_of, widened
from experiments.tables.readme import PROVENANCE, lines_of

__all__ = [
    "HARMFUL",
    "OUTCOMES",
    "PER_RUN",
    "PROVENANCE",
    "TABLES",
    "TIMINGS",
    "UNREPEATABLE",
    "CleanRow",
    "DetectionRow",
    "ExperimentResult",
    "FailureRow",
    "PropagationRow",
    "StopRow",
    "cell",
    "cells",
    "columns",
    "readme_lines",
    "row_of",
    "widened",
]

OUTCOMES = ("masked", "benign", "critical", "nonfinite")
HARMFUL = ("critical", "nonfinite")
"""The outcomes that detectors should catch."""


@dataclass(frozen=True, kw_only=True)
class ExperimentResult:
    """One run: one fault paired with its fault-free baseline. The fields are the columns of ``runs.csv``."""

    run_id: str = column(
        "identity of the run: 16 hex digits of everything that determines it", "planned.run_id", repeats=False
    )
    repeat: int = column("number of the repeat at its grid point", "planned.repeat")
    seed: int = column("seed of the campaign (or of this point, where it is swept)", "config.seed")
    model: str = column("model.path", "setting.model")
    dtype: str = column("dtype of the model", "setting.dtype")
    device: str = column("device that computed the model", "setting.device")
    source: str = column("data.source; dataloader for batches given from Python", "setting.source")
    batch_index: int = column("number of the batch that the run used", "measured.batch_index")
    layer: int = column("first injected attention layer, in the order of evaluation", "first.layer")
    layers: str = column("all injected layers, joined by ';'")
    module: str = column("qualified name of the first injected attention module", "first.module")
    layer_type: str = column("kind of the injected layer (attn)")
    layer_depth: str = column("early, mid or late third of the model's attention layers")
    location: str = column("q, k, v, scores (before scale and mask), weights or out", "config.fault.location")
    kind: str = column("kind of the fault", "config.fault.kind")
    bit: int | None = column("the bit, where the fault has exactly one; 0 is the least significant")
    bits: str | None = column("all bits of the fault, joined by ';'")
    bit_field: str | None = column("sign, exponent or mantissa; mixed if the bits lie in several fields")
    index_batch: int | None = column("sequence in the batch of the (first) hit element", "index.batch")
    index_head: int | None = column("head of the hit element; of keys and values: the key/value head", "index.head")
    index_row: int | None = column(
        "position of the hit element: query (q, scores, weights, out) or key (k, v)", "index.row"
    )
    index_col: int | None = column("column of the hit element: key (scores, weights) or channel", "index.column")
    masked_position: bool | None = column(
        "whether the hit element is a key that its query does not see", "first.masked_position"
    )
    effective: bool = column(
        "whether the fault changed a bit pattern (and, at a masked position, the output: that of the model, or of the "
        "attention layer if scope is site)"
    )
    value_before: float | None = column("the hit element before the fault", "hit.value_before")
    value_after: float | None = column("the hit element after the fault; may be nan or inf", "hit.value_after")
    bits_before: str | None = column("its bit pattern before, hexadecimal", repeats=False)
    bits_after: str | None = column("its bit pattern after, hexadecimal", repeats=False)
    fault_id: str = column(
        "hash of model, input and fault: equal for runs that are the same experiment; statistics count distinct ones",
        "measured.fault_id",
        repeats=False,
    )
    sampling_weight: float | None = column(
        "probability of this fault under uniform drawing, divided by the probability with which it was drawn "
        "(fault.aim); 1 if they are the same; estimates weight runs by it"
    )
    scope: str = column(
        "full: the fault was propagated to the model's output; site: only to the output of its attention layer "
        "(run.scope); then the columns from injected_loss to outcome are empty, unless nothing changed there: in that "
        "case nothing after it can differ, and the run is masked"
    )
    local_change: float | None = column(
        "with scope site: L2 change of the output of the (first) injected attention layer, relative to the L2 norm "
        "of this output in the fault-free pass of the same sequence",
        "measured.local.relative",
    )
    local_max: float | None = column(
        "with scope site: largest absolute change of an element of that output", "measured.local.largest"
    )
    baseline_loss: float | None = column(
        "loss of the fault-free pass; empty for bare encoders", "measured.baseline_loss", unit="nats"
    )
    injected_loss: float | None = column(
        "loss of the injected pass; nan where it is", "measured.effect.injected_loss", unit="nats"
    )
    loss_diff: float | None = column("injected_loss - baseline_loss", "measured.effect.loss_diff", unit="nats")
    relative_change: float | None = column(
        "L2 change of the model's output relative to the fault-free one", "measured.effect.relative_change"
    )
    kl_mean: float | None = column(
        "mean KL divergence of the predictions, baseline to injected", "measured.effect.kl_mean", unit="nats"
    )
    top1_changed: int | None = column("positions whose most likely token changed", "measured.effect.top1_changed")
    nonfinite: bool | None = column("whether the output or the loss holds NaN or Inf")
    outcome: str | None = column("masked, benign, critical or nonfinite", "measured.effect.outcome")
    violation_detected: bool = column(
        "whether a detector fired that sees only the faulty pass and whose false positives a theorem rules out",
        "alarms.violation_detected",
    )
    detectors: str = column("names of those detectors, joined by ';'", "alarms.detectors")
    num_violations: int = column("rows in which they fired, summed over detectors and layers", "alarms.num_violations")
    oracle_detected: bool | None = column(
        "whether an oracle_* detector fired (those read the fault-free pass)", "alarms.oracle_detected"
    )
    oracle_detectors: str = column("names of those detectors, joined by ';'", "alarms.oracle_detectors")
    unproved_detectors: str = column(
        "names of the detectors that fired and whose false positives no theorem rules out, joined by ';'",
        "alarms.unproved_detectors",
    )
    epsilon_margin: float | None = column(
        "smallest distance of epsilon from its bounds (s@w) in the first injected layer, over rows of more than two "
        "keys; negative: outside",
        "alarms.epsilon_margin",
    )
    epsilon: float | None = column("epsilon (s@w) of the row with that smallest distance", "epsilon.value")
    epsilon_lower: float | None = column("lower bound of epsilon in that row, its tolerance included", "epsilon.lower")
    epsilon_upper: float | None = column("upper bound of epsilon in that row, its tolerance included", "epsilon.upper")
    certificate: float | None = column(
        "with detect.certificate: bound on how far a single fault in the first injected layer can have moved a row of "
        "its output, relative to the row's length (T26); empty if one of the campaign's proved detectors fired, if the "
        "fault hits several elements there, or if a location has no check"
    )
    repairs: int | None = column("elements that detect.correct replaced; empty without it", "correction.repairs")
    miscorrections: int | None = column("repaired elements that no fault had hit", "correction.miscorrections")
    unrepaired: int | None = column(
        "errors that correction saw and could not repair: heads of scores and out, rows of weights",
        "correction.unrepaired",
    )
    baseline_seconds: float | None = column(
        "fault-free forward pass without detectors; measured once for each shape of input and repeated here, unless "
        "run.reuse_baseline is false",
        "measured.metrics.baseline_forward_time",
        unit="s",
        timing=True,
    )
    injection_seconds: float | None = column(
        "injected forward pass, detectors and correction excluded", "measured.injection_seconds", unit="s", timing=True
    )
    bounds_seconds: float | None = column(
        "computing bounds in the injected pass", "measured.metrics.bounds_computation_time", unit="s", timing=True
    )
    detection_seconds: float | None = column(
        "deciding on violations in the injected pass",
        "measured.metrics.violation_detection_time",
        unit="s",
        timing=True,
    )
    correction_seconds: float | None = column(
        "correction in the injected pass; empty without it", "correction.seconds", unit="s", timing=True
    )
    total_seconds: float | None = column("the whole run", "measured.metrics.total_time", unit="s", timing=True)
    peak_memory_mb: float | None = column(
        "peak resident (CPU) or allocated (CUDA) memory", "measured.metrics.peak_memory_mb", unit="MB", timing=True
    )
    attention_flops: int | None = column(
        "floating-point operations of the attention products of one pass",
        "measured.metrics.attention_flops",
        unit="operations",
    )
    bounds_flops: int | None = column(
        "floating-point operations of the bounds of one pass", "measured.metrics.bounds_flops", unit="operations"
    )
    execution: str = column("engine and shortcuts that computed the run", "measured.execution", reproducible=False)
    hits: int = column("elements that the fault touched")


@dataclass(frozen=True, kw_only=True)
class DetectionRow:
    """One detector's verdict on one layer of one run. The fields are the columns of ``detections.csv``."""

    run_id: str = column("the run", "pass_id", repeats=False)
    detector: str = column("name of the detector", "name")
    online: bool = column("whether it sees only the faulty pass")
    proved: bool = column("whether a theorem rules out its false positives")
    layer: int | None = column("attention layer; empty for the model's output")
    module: str = column("its module, or output")
    applicable: bool = column("whether the detector applies here", "verdict.applicable")
    reason: str | None = column("why it does not", "verdict.reason")
    rows_checked: int = column("rows checked", "verdict.rows_checked")
    violations: int = column("rows in violation, non-finite ones included", "verdict.violations")
    nonfinite: int = column("rows with non-finite values", "verdict.nonfinite")
    largest_ratio: float | None = column("largest residual divided by its tolerance", "verdict.largest_ratio")
    smallest_margin: float | None = column(
        "smallest distance to the bounds, in the detector's unit", "verdict.smallest_margin"
    )


@dataclass(frozen=True, kw_only=True)
class PropagationRow:
    """How much one block's output moved in one run. The fields are the columns of ``propagation.csv``."""

    run_id: str = column("the run", repeats=False)
    layer: int = column("number of the block, in the order of evaluation; the first is that of the injected layer")
    relative_change: float = column(
        "L2 change of the block's output (the residual stream after it), relative to the L2 norm of the fault-free "
        "output, both over the whole batch without padding; 0.0 if it is bitwise the same, inf or nan if the injected "
        "output is not finite"
    )


@dataclass(frozen=True, kw_only=True)
class CleanRow:
    """One detector's verdict on one layer of one fault-free pass. The fields are the columns of ``clean.csv``."""

    baseline: str = column("hash of model and input", "pass_id")
    detector: str = column("name of the detector", "name")
    tolerance: float = column("detect.tolerance, which was added to the proved one")
    layer: int | None = column("attention layer")
    module: str = column("its module")
    proved: bool = column("whether a theorem rules out its false positives")
    applicable: bool = column("whether the detector applies here", "verdict.applicable")
    reason: str | None = column("why it does not", "verdict.reason")
    rows_checked: int = column("rows checked", "verdict.rows_checked")
    violations: int = column("rows in violation: false positives", "verdict.violations")
    largest_ratio: float | None = column("largest residual divided by its tolerance", "verdict.largest_ratio")
    smallest_margin: float | None = column(
        "smallest distance to the bounds, in the detector's unit", "verdict.smallest_margin"
    )


@dataclass(frozen=True, kw_only=True)
class FailureRow:
    """A run that raised an error. The fields are the columns of ``failures.csv``."""

    run_id: str = column("the run", repeats=False)
    exception: str = column("type and message, on one line")
    traceback: str = column("file with the traceback, after `run` and the run's id; relative to the campaign's folder")


@dataclass(frozen=True, kw_only=True)
class StopRow:
    """How one cell of the grid ended. The fields are the columns of ``stops.csv``, after the values of the axes."""

    runs: int = column("runs at the last look; later rows do not count")
    successes: int = column("runs among them that count for stop.rate")
    estimate: float | None = column("the rate; all draws count, also those of equal faults")
    low: float | None = column("lower limit of the rate, with stop.confidence at all looks together")
    high: float | None = column("its upper limit")
    looks: int = column("number of looks at the cell")
    stopped: bool = column("whether half the width of the interval is at most stop.margin")
    method: str = column("how the limits were computed")


PER_RUN: dict[str, type[Any]] = {"detections": DetectionRow, "propagation": PropagationRow}
"""Tables with any number of rows for each run. The name is that of a field of ``RunRecord``, of
``shards/NNNN.<name>.csv`` and of ``<name>.csv``. These rows are written before the run's own row."""

TABLES: dict[str, type[Any]] = {"runs": ExperimentResult, **PER_RUN, "clean": CleanRow, "failures": FailureRow}
"""The merged tables of a campaign by name, ``<name>.csv``."""


TIMINGS = tuple(f.name for f in declared(ExperimentResult) if f.metadata["timing"])
"""Columns of ``runs.csv`` that measure the execution of a run."""

UNREPEATABLE = tuple(f.name for f in declared(ExperimentResult) if not f.metadata["reproducible"])
"""Columns that may differ from one execution of a run to the next; all others are reproducible bitwise."""


_FILES: dict[str, tuple[type[Any], str]] = {
    "runs.csv": (ExperimentResult, "one row per run"),
    "detections.csv": (DetectionRow, "one row per run, detector and layer checked"),
    "propagation.csv": (PropagationRow, "one row per propagated run and block, if run.propagation is true"),
    "clean.csv": (CleanRow, "one row per fault-free pass, detector and layer: the false positives"),
    "failures.csv": (FailureRow, "one row per run that raised an error and did not succeed later"),
    "stops.csv": (StopRow, "with stop.margin: one row per cell of the grid; first the values of the swept fields"),
}


def readme_lines() -> Iterable[str]:
    """Yield the lines of ``results/README.md``."""
    return lines_of(_FILES, TABLES)


if __name__ == "__main__":
    print("\n".join(readme_lines()))
