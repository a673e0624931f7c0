"""The verdict in words, and its limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from experiments.report.facts.cells import is_missing, rate_text
from experiments.report.facts.inputs import ReportInputs
from experiments.report.facts.stopped import CellEnds

MOST_POINTS = 6
"""The largest number of points of swept ``detect`` and ``run`` fields in the verdict; a table has the others."""


def verdict_sentences(inputs: ReportInputs, points: pd.DataFrame, ends: CellEnds | None = None) -> Iterator[str]:
    """Yield the sentences of the verdict: runs, distinct faults, harm, detections, false positives."""
    unneeded = ends.unneeded if ends is not None else 0
    missing = inputs.planned - len(inputs.runs) - unneeded
    yield _begun(inputs)
    if missing > 0:
        yield (
            f"The campaign is not complete: {missing:,} of {inputs.planned:,} runs are missing, "
            f"{len(inputs.failures):,} of them failed."
        )
    if unneeded and ends is not None:
        yield (
            f"{unneeded:,} of {inputs.planned:,} planned runs were not needed: their cells know their {ends.rate} rate "
            f"to ±{100 * ends.margin:g} % (stop.margin)."
        )
    axes = [name for name in points.columns if name.startswith(("detect.", "run."))]
    records = points.to_dict("records")
    for point in records[:MOST_POINTS]:
        where = ", ".join(f"{axis} = {point[axis]}" for axis in axes)
        yield from _of_point(point, f"With {where}: " if where else "")
        if ends is not None:
            yield from _of_cells(point, ends)
    if len(records) > MOST_POINTS:
        yield f"{len(records) - MOST_POINTS} more points of {', '.join(axes)} stand in the table below."


def _begun(inputs: ReportInputs) -> str:
    models = inputs.runs["model"].dropna().unique()
    name = f"the model {models[0]}" if len(models) == 1 else f"{len(models)} models"
    return f"{_several(len(inputs.runs), 'run')} in {name}."


def _of_point(point: dict[str, Any], where: str) -> Iterator[str]:
    faults, known = point["detected_n"], point["harmful_n"]
    effects = f"{faults:,} distinct faults, {known:,} of them with a known outcome"
    if known:
        harm = rate_text(point["harmful_rate"], point["harmful_low"], point["harmful_high"])
        yield f"{where}{effects}: {point['harmful']:,} were harmful (critical or nonfinite), {harm}."
    else:
        yield f"{where}{effects}; nothing is known of harm."
    harmful = point["harmful_detected_n"]
    if harmful:
        seen = rate_text(*(point[f"harmful_detected_{part}"] for part in ("rate", "low", "high")))
        yield f"Proved detectors saw {point['harmful_detected']:,} of {harmful:,} harmful faults, {seen}."
    elif known:
        yield "With no harmful fault, nothing can be said of how many of them are seen."
    rows, false = point["clean_rows"], point["false_positives"]
    if rows:
        yield f"They raised {false:,} false positives in {rows:,} rows of fault-free passes."
    else:
        yield "No row of a fault-free pass was checked, so nothing is known of false positives."


def _of_cells(point: dict[str, Any], ends: CellEnds) -> Iterator[str]:
    """Yield how cells are weighted in the rates of a point, and the rates if each cell counts once."""
    if ends.fewest == ends.most:
        return
    counted = f"In these rates a cell of the grid counts by its number of runs ({ends.fewest:,} to {ends.most:,})"
    means = {name: point.get(f"{name}_mean_of_cells", math.nan) for name in ("harmful", "detected")}
    shown = [f"{100 * mean:.1f} % {name}" for name, mean in means.items() if not is_missing(mean)]
    yield f"{counted}; with every cell counted once they are {' and '.join(shown)}." if shown else f"{counted}."


def limit_sentences(inputs: ReportInputs, points: pd.DataFrame, ends: CellEnds | None = None) -> Iterator[str]:
    """Yield the conclusions that a reader must not draw from the numbers."""
    runs = inputs.runs
    uneven = ends is not None and ends.fewest != ends.most
    weight = "counts by its number of runs" if uneven else "counts alike"
    yield (
        f"A rate is an average over the faults that this campaign drew: every point of its grid {weight}. It is no "
        "rate per hour of operation, and hardware that favours some bits or locations has another one."
    )
    if ends is not None:
        yield (
            f"Cells could end when their {ends.rate} rate was known to ±{100 * ends.margin:g} %. Only the limits of "
            "stops.csv, and the same in the table of cells, are right after that; no other interval and no p-value of "
            "this page is adjusted for stopping early."
        )
    models, batches = runs["model"].nunique(), len(runs[["source", "batch_index"]].drop_duplicates())
    yield (
        f"The faults hit {_several(models, 'model')} on {_several(batches, 'batch', 'batches')} of text. "
        "Other models and other text are not sampled."
    )
    yield (
        "Intervals are 95 % intervals: of many, some miss. Runs that share an input, a layer and a head are not "
        "independent, and the intervals allow for that; the columns that end in _method name what each one is."
    )
    duplicates = len(runs) - int(points["detected_n"].sum())
    if duplicates:
        yield f"{duplicates:,} runs repeat a fault that was drawn before; rates count each fault once."
    unknown = int((runs["scope"] != "full").sum())
    if unknown:
        yield (
            f"{unknown:,} runs were not propagated to the output (run.scope = site): rates of outcomes are those of "
            "the others alone."
        )
    weights = runs["sampling_weight"].dropna()
    if len(weights) and (weights != 1).any():
        yield "Faults were not drawn uniformly; rates weight each by its probability under uniform drawing."
    critical = inputs.settings.get("detect.critical_loss")
    yield (
        f"Critical means that a most likely token changed or the loss moved by more than {critical} nats; another "
        "threshold gives other rates."
    )
    yield (
        "Detected means that a detector fired whose false positives a theorem rules out. Detectors without a theorem, "
        "and oracles that read the fault-free pass, are compared and never counted as detection. No false positive in "
        "so many rows is a check of the theorems and no replacement for them."
    )
    yield "Times are those of this machine and this engine; the fault-free pass may have been measured once per input."


def _several(count: int, noun: str, plural: str = "") -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
