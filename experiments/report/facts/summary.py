"""Every number of the report, as tables.

    summary = summarize(inputs)
    summary.outcomes                # by location and bit field: counts, rates, intervals
    summary.verdict                 # sentences

Points of the grid that differ only in fields of ``detect`` or ``run`` have the same faults, so nothing is ever added up
over them. A detector gets no credit at a point where it was not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from bounds.registry import is_oracle
from experiments.analysis import detector_comparison, false_positive_rate, overhead
from experiments.report.facts.grouping import Groups, counted_faults, wide_rates
from experiments.report.facts.head_ranking import rank_heads
from experiments.report.facts.inputs import ReportInputs
from experiments.report.facts.looking import clean_of
from experiments.report.facts.stopped import CellEnds, cell_ends, not_adjusted, with_ends
from experiments.report.facts.verdict import verdict_sentences
from experiments.report.facts.worst_runs import worst_runs
from fault_injection import LOCATIONS
from fault_injection.numbers.formats import FIELDS

MOST_CELLS = 5000
"""A grid with more cells than this is summarised by location and bit field."""

MOST_POINTS = 8
"""The largest number of points of ``detect`` and ``run`` whose detectors are compared."""

NO_FIELD = "none"


@dataclass(frozen=True)
class Summary:
    """The tables of a report; rates come with their number of distinct faults and a 95 % interval.

    Attributes:
        verdict: sentences, one list for the whole campaign.
        points: rates of all runs, for each point of swept ``detect`` and ``run`` fields, with the false positives and,
            if cells ended early, the means of the cells' rates (``harmful_mean_of_cells``).
        outcomes: rates by location and bit field, and by swept fields that are not part of the fault.
        cells: rates of each cell of the grid: the rows of ``summary.csv``.
        by_location: whether ``cells`` are locations and bit fields, because the grid is missing or too large.
        detectors: the comparison of detectors.
        ranking: which heads are more sensitive than the rest, query heads and key/value heads apart.
        ranking_verdict: the same in a sentence.
        seconds: mean times by part of a run.
        execution: runs by engine.
        worst: the runs that did the most harm.
        focus: the swept values that the runs of the ranking, the worst runs and the figures share; empty if all runs
            are used.
        chosen: these runs.
        compared: the comparison of detectors on these runs.
        clean: the fault-free passes under the same detectors.
        ends: how cells ended early; ``None`` without a stopping rule.
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
    compared: pd.DataFrame
    clean: pd.DataFrame
    ends: CellEnds | None


def summarize(inputs: ReportInputs) -> Summary:
    """Return every number of the report."""
    runs, faults = inputs.runs, counted_faults(inputs.runs)
    watching = Groups.by(inputs.points([axis for axis in inputs.axes if axis.startswith(("detect.", "run."))]))
    ends = cell_ends(inputs)
    points = _with_false_positives(not_adjusted(wide_rates(faults, watching), ends), inputs.clean)
    outcomes = not_adjusted(_outcomes(inputs, faults), ends)
    grid = _grid(inputs, faults, ends)
    if ends is not None and grid is not None:
        points = _with_means_of_cells(points, grid, list(watching.labels.columns))
    place = _focus(points)
    chosen = runs[watching.codes == place] if len(points) > 1 else runs
    detectors = _detectors(inputs, watching, place)
    ranking, ranking_verdict = rank_heads(chosen)
    return Summary(
        verdict=tuple(verdict_sentences(inputs, points, ends)),
        points=points,
        outcomes=outcomes,
        cells=outcomes if grid is None else grid,
        by_location=grid is None,
        detectors=_labelled(detectors, watching),
        ranking=ranking,
        ranking_verdict=ranking_verdict,
        seconds=overhead(runs),
        execution=runs["execution"].value_counts().rename_axis("execution").reset_index(name="runs"),
        worst=worst_runs(chosen),
        focus=", ".join(f"{axis} = {value}" for axis, value in watching.labels.iloc[place].items()),
        chosen=chosen,
        compared=detectors[place],
        clean=clean_of(inputs.clean, _texts(watching.labels.iloc[place])),
        ends=ends,
    )


def _focus(points: pd.DataFrame) -> int:
    """Return the number of the first point of swept ``detect`` and ``run`` fields that has outcomes."""
    return int((points["harmful_n"] > 0).to_numpy().argmax())


def _texts(label: pd.Series) -> dict[str, str]:
    return {str(axis): str(value) for axis, value in label.items()}


def _with_false_positives(points: pd.DataFrame, clean: pd.DataFrame) -> pd.DataFrame:
    """Add the false positives of the proved detectors, at each point for its own detectors and tolerance."""
    counted = clean[clean["applicable"] & clean["proved"] & ~clean["detector"].map(is_oracle).astype(bool)]
    columns: dict[str, list[float]] = {name: [] for name in ("false_positives", "clean_rows", "low", "high")}
    for _, label in points.iterrows():
        found = false_positive_rate(clean_of(counted, _texts(label))).iloc[0]
        for name, part in zip(columns, ("successes", "n", "low", "high"), strict=True):
            columns[name].append(found[part])
    renamed = {"low": "false_positive_low", "high": "false_positive_high"}
    added = pd.DataFrame(columns, index=points.index).rename(columns=renamed)
    return pd.concat([points, added.astype({"false_positives": "int64", "clean_rows": "int64"})], axis=1)


def _outcomes(inputs: ReportInputs, faults: pd.DataFrame) -> pd.DataFrame:
    """Return the rates by location and bit field, separately for swept models, data and detectors."""
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


def _with_means_of_cells(points: pd.DataFrame, grid: pd.DataFrame, axes: list[str]) -> pd.DataFrame:
    """Add the means of the cells' rates, because pooled rates favour the cells with more runs."""
    names = {f"{measure}_rate": f"{measure}_mean_of_cells" for measure in ("detected", "harmful")}
    rates = grid[list(names)].astype("float64")
    if not axes:
        return points.assign(**{name: rates[rate].mean() for rate, name in names.items()})
    means = rates.rename(columns=names).groupby([grid[axis] for axis in axes], sort=False, dropna=False).mean()
    return points.merge(means.reset_index(), on=axes, how="left", validate="one_to_one")


def _grid(inputs: ReportInputs, faults: pd.DataFrame, ends: CellEnds | None) -> pd.DataFrame | None:
    """Return the rates of every cell of the grid; None without a grid, or if it has too many cells."""
    cells = Groups.by(inputs.plan)
    if not inputs.axes or len(cells.labels) > MOST_CELLS:
        return None
    codes = pd.Series(cells.codes.to_numpy()[inputs.places], index=inputs.runs.index)
    # Cells come from the plan, not from the runs: a cell has a row even if all its runs are missing.
    return with_ends(wide_rates(faults, Groups(cells.labels, codes)), ends, list(cells.labels.columns))


def _detectors(inputs: ReportInputs, watching: Groups, focus: int) -> dict[int, pd.DataFrame]:
    """Return the comparison of detectors at the first points of swept ``detect`` and ``run`` fields and at one more."""
    tables = {}
    for code in {**dict.fromkeys(range(min(MOST_POINTS, len(watching.labels)))), focus: None}:
        clean = clean_of(inputs.clean, _texts(watching.labels.iloc[code]))
        tables[code] = detector_comparison(inputs.runs[watching.codes == code], clean)
    return tables


def _labelled(tables: dict[int, pd.DataFrame], watching: Groups) -> pd.DataFrame:
    """Return the concatenated comparisons; the values of the point come first."""
    shown = list(tables.items())[:MOST_POINTS]
    parts = [pd.concat([_repeated(watching.labels.iloc[code], table), table], axis=1) for code, table in shown]
    return pd.concat(parts, ignore_index=True)


def _repeated(label: pd.Series, table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({axis: [value] * len(table) for axis, value in label.items()}, index=table.index)
