"""One run's row of numbers, and the columns of every result file.

A column exists once: as a field of a dataclass here. Its unit is in its name, its meaning in ``meaning``; the readme in
``results/`` is generated from these (``python -m experiments.tables.schema``), so it cannot drift.

Cells: a number that does not exist is an empty cell, never 0; floats are written by ``repr`` so that they read back to
the same bits; ``value_after`` may be ``nan`` or ``inf``; booleans are ``True`` and ``False``.

Public names: ``ExperimentResult``, ``DetectionRow``, ``PropagationRow``, ``CleanRow``, ``FailureRow``, ``StopRow``,
``columns``, ``cell``, ``cells``, ``TABLES``, ``PER_RUN``, ``PROVENANCE``, ``TIMINGS``, ``UNREPEATABLE``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OUTCOMES = ("masked", "benign", "critical", "nonfinite")
HARMFUL = ("critical", "nonfinite")
"""The outcomes that a detector is for."""


def _column(meaning: str, *, timing: bool = False, reproducible: bool = True) -> Any:
    metadata = {"meaning": meaning, "timing": timing, "reproducible": reproducible and not timing}
    return field(default=None, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ExperimentResult:
    """One run: one fault paired with its fault-free baseline. The fields are the columns of ``runs.csv``."""

    run_id: str = _column("identity of the run: 16 hex digits of everything that determines it")
    repeat: int = _column("which repeat of its grid point")
    seed: int = _column("seed of the campaign (or of this point, where it is swept)")
    model: str = _column("model.path")
    dtype: str = _column("dtype of the model")
    device: str = _column("where the model was computed")
    source: str = _column("data.source; dataloader for batches given from Python")
    batch_index: int = _column("which batch of the data the run used")
    layer: int = _column("first injected attention layer, in the order of evaluation")
    layers: str = _column("all injected layers, joined by ';'")
    module: str = _column("qualified name of the first injected attention module")
    layer_type: str = _column("kind of the injected layer (attn)")
    layer_depth: str = _column("early, mid or late third of the model's attention layers")
    location: str = _column("q, k, v, scores (before scale and mask), weights or out")
    kind: str = _column("kind of the fault")
    bit: int | None = _column("the bit, where the fault has exactly one; 0 is the least significant")
    bits: str | None = _column("all bits of the fault, joined by ';'")
    bit_field: str | None = _column("sign, exponent or mantissa; mixed where the bits differ in it")
    index_batch: int | None = _column("sequence in the batch of the (first) hit element")
    index_head: int | None = _column("head of the hit element; of keys and values: the key/value head")
    index_row: int | None = _column("position of the hit element: query (q, scores, weights, out) or key (k, v)")
    index_col: int | None = _column("column of the hit element: key (scores, weights) or channel")
    masked_position: bool | None = _column("whether the hit element is a key that its query does not see")
    effective: bool = _column(
        "whether the fault changed a bit pattern (and, at a masked position, the output: that of the model, or of the "
        "attention layer if scope is site)"
    )
    value_before: float | None = _column("the hit element before the fault")
    value_after: float | None = _column("the hit element after the fault; may be nan or inf")
    bits_before: str | None = _column("its bit pattern before, hexadecimal")
    bits_after: str | None = _column("its bit pattern after, hexadecimal")
    fault_id: str = _column(
        "hash of model, input and fault: equal for runs that are the same experiment; count distinct ones"
    )
    sampling_weight: float | None = _column(
        "probability of this fault under uniform drawing, divided by the one it was drawn with (fault.aim); 1 if they "
        "are the same; what estimates weight by"
    )
    scope: str = _column(
        "full: the fault was propagated to the model's output; site: to that of its attention layer alone (run.scope); "
        "the columns from injected_loss to outcome are then empty, unless nothing changed there: nothing behind it can "
        "differ then, and the run is masked"
    )
    local_change: float | None = _column(
        "with scope site: L2 change of the output of the (first) injected attention layer, relative to the L2 norm "
        "of that of the same sequence in the fault-free pass"
    )
    local_max: float | None = _column("with scope site: largest absolute change of an element of that output")
    baseline_loss: float | None = _column("loss of the fault-free pass, nats; empty for bare encoders")
    injected_loss: float | None = _column("loss of the injected pass, nats; nan where it is")
    loss_diff: float | None = _column("injected_loss - baseline_loss, nats")
    relative_change: float | None = _column("L2 change of the model's output relative to the fault-free one")
    kl_mean: float | None = _column("mean KL divergence of the predictions, baseline to injected, nats")
    top1_changed: int | None = _column("positions whose most likely token changed")
    nonfinite: bool | None = _column("whether the output or the loss holds NaN or Inf")
    outcome: str | None = _column("masked, benign, critical or nonfinite")
    violation_detected: bool = _column(
        "whether a detector fired that sees the faulty pass only and whose false positives a theorem rules out"
    )
    detectors: str = _column("names of those detectors, joined by ';'")
    num_violations: int = _column("rows in which they fired, summed over detectors and layers")
    oracle_detected: bool | None = _column("whether an oracle_* detector fired (those read the fault-free pass)")
    oracle_detectors: str = _column("names of those detectors, joined by ';'")
    unproved_detectors: str = _column(
        "names of the detectors that fired and whose false positives no theorem rules out, joined by ';'"
    )
    epsilon_margin: float | None = _column(
        "smallest distance of epsilon from its bounds (s@w) in the first injected layer, over rows of more than two "
        "keys; negative: outside"
    )
    epsilon: float | None = _column("epsilon (s@w) of the row with that smallest distance")
    epsilon_lower: float | None = _column("lower bound of epsilon in that row, its tolerance included")
    epsilon_upper: float | None = _column("upper bound of epsilon in that row, its tolerance included")
    certificate: float | None = _column(
        "with detect.certificate: largest share of its length by which a single fault in the first injected layer can "
        "have moved a row of its output (T26); empty if one of the campaign's proved detectors fired, if the fault "
        "hits several elements there, or if a location has no check"
    )
    repairs: int | None = _column("elements that detect.correct replaced; empty without it")
    miscorrections: int | None = _column("those of them that no fault had hit")
    unrepaired: int | None = _column("errors it saw and could not repair: heads of scores and out, rows of weights")
    baseline_seconds: float | None = _column(
        "fault-free forward pass without detectors; measured once for each input and repeated here, unless "
        "run.reuse_baseline is false",
        timing=True,
    )
    injection_seconds: float | None = _column("injected forward pass, detectors and correction excluded", timing=True)
    bounds_seconds: float | None = _column("computing bounds in the injected pass", timing=True)
    detection_seconds: float | None = _column("deciding on violations in the injected pass", timing=True)
    correction_seconds: float | None = _column("correction in the injected pass; empty without it", timing=True)
    total_seconds: float | None = _column("the whole run", timing=True)
    peak_memory_mb: float | None = _column("peak resident (CPU) or allocated (CUDA) memory", timing=True)
    attention_flops: int | None = _column("floating-point operations of the attention products of one pass")
    bounds_flops: int | None = _column("floating-point operations of the bounds of one pass")
    execution: str = _column("engine and shortcuts that computed the run", reproducible=False)
    hits: int = _column("elements that the fault touched")


@dataclass(frozen=True, kw_only=True)
class DetectionRow:
    """What one detector said of one layer of one run. The fields are the columns of ``detections.csv``."""

    run_id: str = _column("the run")
    detector: str = _column("name of the detector")
    online: bool = _column("whether it sees the faulty pass only")
    proved: bool = _column("whether a theorem rules out its false positives")
    layer: int | None = _column("attention layer; empty for the model's output")
    module: str = _column("its module, or output")
    applicable: bool = _column("whether the detector applies here")
    reason: str | None = _column("why it does not")
    rows_checked: int = _column("rows checked")
    violations: int = _column("rows in violation, non-finite ones included")
    nonfinite: int = _column("rows with non-finite values")
    largest_ratio: float | None = _column("largest residual divided by its tolerance")
    smallest_margin: float | None = _column("smallest distance to the bounds, in the detector's unit")


@dataclass(frozen=True, kw_only=True)
class PropagationRow:
    """How much one block's output moved in one run. The fields are the columns of ``propagation.csv``."""

    run_id: str = _column("the run")
    layer: int = _column("number of the block, in the order of evaluation; the first is that of the injected layer")
    relative_change: float = _column(
        "L2 change of the block's output (the residual stream behind it), relative to the L2 norm of the fault-free "
        "one, both of the whole batch without padding; 0.0 where it is bitwise the same, inf or nan where the injected "
        "one is not finite"
    )


@dataclass(frozen=True, kw_only=True)
class CleanRow:
    """What one detector said of one layer of one fault-free pass. The fields are the columns of ``clean.csv``."""

    baseline: str = _column("hash of model and input")
    detector: str = _column("name of the detector")
    tolerance: float = _column("detect.tolerance, which was added to the proved one")
    layer: int | None = _column("attention layer")
    module: str = _column("its module")
    proved: bool = _column("whether a theorem rules out its false positives")
    applicable: bool = _column("whether the detector applies here")
    reason: str | None = _column("why it does not")
    rows_checked: int = _column("rows checked")
    violations: int = _column("rows in violation: false positives")
    largest_ratio: float | None = _column("largest residual divided by its tolerance")
    smallest_margin: float | None = _column("smallest distance to the bounds, in the detector's unit")


@dataclass(frozen=True, kw_only=True)
class FailureRow:
    """A run that raised. The fields are the columns of ``failures.csv``."""

    run_id: str = _column("the run")
    exception: str = _column("type and message, on one line")
    traceback: str = _column("file with the traceback, behind `run` and the run's id; below the campaign's folder")


@dataclass(frozen=True, kw_only=True)
class StopRow:
    """How one cell of the grid ended. The fields are the columns of ``stops.csv``, behind the values of the axes."""

    runs: int = _column("runs at the last look; rows beyond them do not enter")
    successes: int = _column("those of them that count for stop.rate")
    estimate: float | None = _column("the rate; all draws count, also those of equal faults")
    low: float | None = _column("lower limit of the rate, with stop.confidence at all looks together")
    high: float | None = _column("its upper limit")
    looks: int = _column("how often the cell was looked at")
    stopped: bool = _column("whether half the width of the interval is at most stop.margin")
    method: str = _column("how the limits were computed")


PER_RUN: dict[str, type[Any]] = {"detections": DetectionRow, "propagation": PropagationRow}
"""Tables with any number of rows for each run. The name is that of a field of ``RunRecord``, of
``shards/NNNN.<name>.csv`` and of ``<name>.csv``. These rows are written in front of the run's own."""

TABLES: dict[str, type[Any]] = {"runs": ExperimentResult, **PER_RUN, "clean": CleanRow, "failures": FailureRow}
"""The merged tables of a campaign by name, ``<name>.csv``."""


def columns(row_type: type[Any]) -> list[str]:
    """Return the column names of a row type, in order."""
    return [f.name for f in dataclasses.fields(row_type)]


TIMINGS = tuple(f.name for f in dataclasses.fields(ExperimentResult) if f.metadata["timing"])
"""Columns of ``runs.csv`` that measure the execution of a run."""

UNREPEATABLE = tuple(f.name for f in dataclasses.fields(ExperimentResult) if not f.metadata["reproducible"])
"""Columns that may differ from one execution of a run to the next; all others are reproducible bitwise."""


def cell(value: Any) -> str:
    """Return the text of one cell."""
    if value is None:
        return ""
    if isinstance(value, float):
        # NumPy's floats are floats, but write themselves otherwise.
        return repr(float(value))
    text = str(value)
    return re.sub(r"\s*[\r\n]+\s*", " ", text) if "\n" in text or "\r" in text else text


def cells(row: Any) -> list[str]:
    """Return the cells of a row in the order of ``columns``."""
    # A dataclass sets its fields in their order.
    return [cell(value) for value in vars(row).values()]


_FILES: dict[str, tuple[type[Any], str]] = {
    "runs.csv": (ExperimentResult, "one row per run"),
    "detections.csv": (DetectionRow, "one row per run, detector and layer checked"),
    "propagation.csv": (PropagationRow, "one row per propagated run and block, if run.propagation is true"),
    "clean.csv": (CleanRow, "one row per fault-free pass, detector and layer: the false positives"),
    "failures.csv": (FailureRow, "one row per run that raised and was not repeated successfully"),
    "stops.csv": (StopRow, "with stop.margin: one row per cell of the grid; first the values of the swept fields"),
}


_PLAN = {
    "run_id": "identity of the run",
    "repeat": "which repeat of its grid point",
    "*one column for each axis*": "the axis by its dotted name (`fault.bit`), its value in this run; lists as JSON",
}

PROVENANCE = {
    "python": "version of Python",
    "packages": "versions of the packages that numbers depend on",
    "platform": "operating system",
    "processor": "model of the processor",
    "cpu_capability": "instruction set that torch chose its kernels for",
    "cuda": "the GPU, if there is one",
    "threads": "threads of one process",
    "deterministic_algorithms": "whether torch was told to use no others",
    "git_commit": "commit of the program",
    "git_changes": "whether files differed from that commit",
    "arguments": "the command's arguments",
    "environment": "variables of Slurm and of the mathematical libraries",
    "contexts": "by model, data and seed: path and revision, fingerprints of weights and data, results of the checks",
}
"""What each shard notes in ``shards/NNNN.json``."""

_INTRODUCTION = """\
Campaigns are folders here: `config.yaml`, `provenance.json`, `plan.csv`, `shards/`, `trace/`, `logs/`, and after the
merge the tables below. An empty cell means that the number does not exist; pandas reads it as NaN. Where the value
itself is NaN the cell says `nan`, which pandas also reads as NaN: use the `nonfinite` columns to tell them apart, or
`pandas.read_csv(path, keep_default_na=False)`. Columns marked *timing* or *execution* differ between executions; all
others are reproducible bit for bit. What was swept and has no column of its own stands in `plan.csv`:
`runs.merge(pandas.read_csv("plan.csv"), on=["run_id", "repeat"])`. `run_sweep.py export results/NAME --table TABLE`
writes a table as Parquet, where both are told apart and every column has its type.""".splitlines()


def _described(name: str, meaning: str, rows: dict[str, str], first: str = "column") -> Iterable[str]:
    yield from ("", f"## {name}", "", meaning, "", f"| {first} | meaning |", "|---|---|")
    yield from (f"| {key if key.startswith('*') else f'`{key}`'} | {text} |" for key, text in rows.items())


def _shard_rows() -> dict[str, str]:
    shards = {"NNNN.csv" if name == "runs" else f"NNNN.{name}.csv": f"its part of `{name}.csv`" for name in TABLES}
    return {
        **shards,
        "NNNN.json": "where its numbers come from, see `provenance.json`",
        "NNNN.lock": "process and machine that write it, as long as they do",
    }


def readme_lines() -> Iterable[str]:
    """Yield the lines of ``results/README.md``."""
    yield "# Result files"
    yield ""
    yield "Generated by `python -m experiments.tables.schema > results/README.md` from the schema in code."
    yield ""
    yield from _INTRODUCTION
    for name, (row_type, meaning) in _FILES.items():
        yield from _described(name, f"{meaning[0].upper()}{meaning[1:]}.", _meanings(row_type))
    yield from _described("plan.csv", "One row per run of the grid, in its order; written before the first run.", _PLAN)
    meaning = (
        "JSON, made by the merge from what each shard noted: the facts of the first shard, the contexts of all, and "
        "under `shards`, by number, in what others differ from the first."
    )
    yield from _described("provenance.json", meaning, PROVENANCE, first="key")
    meaning = "What each worker wrote, row by row; `NNNN` is the number of the shard. The merge only reads it."
    yield from _described("shards/", meaning, _shard_rows(), first="file")


def _meanings(row_type: type[Any]) -> dict[str, str]:
    def mark(metadata: Mapping[str, Any]) -> str:
        return " *(timing)*" if metadata["timing"] else "" if metadata["reproducible"] else " *(execution)*"

    return {f.name: f"{f.metadata['meaning']}{mark(f.metadata)}" for f in dataclasses.fields(row_type)}


if __name__ == "__main__":
    print("\n".join(readme_lines()))
