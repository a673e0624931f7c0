"""Every number of the report, as tables.

    summary = summarize(inputs)
    summary.outcomes                # by location and bit field: counts, rates, intervals
    summary.verdict                 # sentences

Points of the grid that differ in fields of ``detect`` or ``run`` alone look at the same faults, so nothing is ever
added up over them.

Public names: ``Summary``, ``summarize``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from experiments.analysis import detector_comparison, false_positive_rate, overhead, rank_cells
from experiments.report.grouping import Groups, counted_faults, wide_rates
from experiments.report.inputs import ReportInputs
from experiments.report.verdict import verdict_sentences
from experiments.report.worst_runs import worst_runs
from experiments.watcher import is_oracle
from fault_injection import LOCATIONS
from fault_injection.bits import FIELDS

MOST_CELLS = 5000
"""Grids of more cells are summed up by location and bit field."""

MOST_POINTS = 8
"""Most points of ``detect`` and ``run`` whose detectors are compared."""

NO_FIELD = "none"


@dataclass(frozen=True)
class Summary:
    """The tables of a report; rates come with their number of distinct faults and a 95 % interval.

    Attributes:
        verdict: sentences, one list for the whole campaign.
        points: rates of all runs, for each point of swept ``detect`` and ``run`` fields; with the false positives.
        outcomes: rates by location and bit field, and by what else was swept but is no part of the fault.
        cells: rates of each cell of the grid: what ``summary.csv`` holds.
        by_location: whether ``cells`` are locations and bit fields, as there is no grid or too large a one.
        detectors: the comparison of detectors.
        ranking: which heads are more sensitive than the rest.
        ranking_verdict: the same in a sentence.
        seconds: mean times by part of a run.
        execution: runs by engine.
        worst: the runs that did the most harm.
        focus: what the runs of the ranking, the worst runs and the figures have in common; empty if these are all runs.
        chosen: those runs.
    """

    verdict: tuple[str, ...]
    points: pd.DataFrame
    outcomes: pd.DataFrame
    cells: pd.DataFrame
    by_location: bool
    detectors: pd.DataFrame
    ranking: pd.DataFrame
    ranking_verdict: str
    seconds: pd.DataFrame
    execution: pd.DataFrame
    worst: pd.DataFrame
    focus: str
    chosen: pd.DataFrame


def summarize(inputs: ReportInputs) -> Summary:
    """Compute every number of the report."""
    runs, faults = inputs.runs, counted_faults(inputs.runs)
    watching = Groups.by(inputs.points([axis for axis in inputs.axes if axis.startswith(("detect.", "run."))]))
    points = _with_false_positives(wide_rates(faults, watching), inputs.clean)
    outcomes = _outcomes(inputs, faults)
    grid = _grid(inputs, faults)
    chosen, focus = _focus(points, watching, runs)
    ranking = rank_cells(chosen, ["layer", "index_head"])
    return Summary(
        verdict=tuple(verdict_sentences(inputs, points)),
        points=points,
        outcomes=outcomes,
        cells=outcomes if grid is None else grid,
        by_location=grid is None,
        detectors=_detectors(inputs, watching),
        ranking=ranking,
        ranking_verdict=str(ranking.attrs.get("verdict", "")),
        seconds=overhead(runs),
        execution=runs["execution"].value_counts().rename_axis("execution").reset_index(name="runs"),
        worst=worst_runs(chosen),
        focus=focus,
        chosen=chosen,
    )


def _focus(points: pd.DataFrame, watching: Groups, runs: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the runs of one point of swept ``detect`` and ``run`` fields, the first with outcomes, and its label."""
    if len(points) == 1:
        return runs, ""
    place = int((points["harmful_n"] > 0).to_numpy().argmax())
    label = ", ".join(f"{axis} = {value}" for axis, value in watching.labels.iloc[place].items())
    return runs[watching.codes == place], label


def _with_false_positives(points: pd.DataFrame, clean: pd.DataFrame) -> pd.DataFrame:
    """Add what the proved detectors said of the fault-free passes, at each point's own tolerance."""
    counted = clean[clean["applicable"] & clean["proved"] & ~clean["detector"].map(is_oracle).astype(bool)]
    columns: dict[str, list[float]] = {name: [] for name in ("false_positives", "clean_rows", "low", "high")}
    for label in points.to_dict("records"):
        tolerance = label.get("detect.tolerance")
        own = counted if tolerance is None else counted[counted["tolerance"] == float(tolerance)]
        found = false_positive_rate(own).iloc[0]
        for name, part in zip(columns, ("successes", "n", "low", "high"), strict=True):
            columns[name].append(found[part])
    renamed = {"low": "false_positive_low", "high": "false_positive_high"}
    added = pd.DataFrame(columns, index=points.index).rename(columns=renamed)
    return pd.concat([points, added.astype({"false_positives": "int64", "clean_rows": "int64"})], axis=1)


def _outcomes(inputs: ReportInputs, faults: pd.DataFrame) -> pd.DataFrame:
    """Return the rates by location and bit field; models, data and detectors that were swept stay apart."""
    axes = [axis for axis in inputs.axes if not axis.startswith("fault.") and axis != "seed"]
    fields = inputs.runs["bit_field"].astype(object)
    keys = inputs.points(axes).assign(
        location=inputs.runs["location"].astype(object), bit_field=fields.where(fields.notna(), NO_FIELD)
    )
    table = wide_rates(faults, Groups.by(keys))
    order = {name: place for place, name in enumerate((*LOCATIONS, *FIELDS))}
    places = table[["location", "bit_field"]].map(lambda name: order.get(name, len(order)))
    codes = pd.DataFrame({axis: pd.factorize(table[axis])[0] for axis in axes}, index=table.index)
    ranks = pd.concat([codes, places], axis=1)
    return table.loc[ranks.sort_values(list(ranks.columns), kind="stable").index].reset_index(drop=True)


def _grid(inputs: ReportInputs, faults: pd.DataFrame) -> pd.DataFrame | None:
    """Return the rates of every cell of the grid; nothing where there is no grid, or one of too many cells."""
    cells = Groups.by(inputs.plan)
    if not inputs.axes or len(cells.labels) > MOST_CELLS:
        return None
    codes = pd.Series(cells.codes.to_numpy()[inputs.places], index=inputs.runs.index)
    # Of the plan, not of the runs: a cell all of whose runs are missing has a row too.
    return wide_rates(faults, Groups(cells.labels, codes))


def _detectors(inputs: ReportInputs, watching: Groups) -> pd.DataFrame:
    """Return the comparison of detectors at each point of swept ``detect`` and ``run`` fields."""
    tables = []
    for code, label in list(watching.labels.iterrows())[:MOST_POINTS]:
        tolerance = label.get("detect.tolerance")
        clean = inputs.clean if tolerance is None else inputs.clean[inputs.clean["tolerance"] == float(tolerance)]
        found = detector_comparison(inputs.runs[watching.codes == code], clean)
        for place, (axis, value) in enumerate(label.items()):
            found.insert(place, axis, value)
        tables.append(found)
    return pd.concat(tables, ignore_index=True)
