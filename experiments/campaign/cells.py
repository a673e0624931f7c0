"""The cells of a campaign's grid, and which of their runs are still needed (``stop.margin``).

    mine = shard_of(plan, shard)                     # whole cells
    cells = grid_of(folder, plan, mine)
    for needed in cells.rounds(mine):                # until every cell is narrow enough, or at its end
        ...; cells.note(run, result)

The rule checks a cell after fixed numbers of its repeats (a *look*), in the order of the plan, once all of them are
done. So the cell's own rows decide how many runs it needs; the order of execution, shards, windows and kills do not. A
run that raised an error holds up its cell at the next look until it is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from experiments.campaign.folder import CampaignFolder, axis_cell
from experiments.config.sections import StopConfig
from experiments.plan.plan import Plan, PlannedRun
from experiments.plan.stopping import METHOD, StopRule
from experiments.tables.csv_file import read_rows, write_rows
from experiments.tables.schema import HARMFUL, ExperimentResult, StopRow, cell, cells, columns


class Cell:
    """One point of the grid: its runs in the order of repeats, and whether each finished run counts for the rate.

    Args:
        runs: all runs of the cell.
        counted: by repeat, whether the run counts; None if it is not done.
        rule: decides when the cell ends.

    Attributes:
        trials, successes: at the last look.
        looks: how many looks the cell has had.
        stopped: whether it ended because the interval was narrow enough.
    """

    def __init__(self, runs: Sequence[PlannedRun], counted: list[bool | None], rule: StopRule) -> None:
        self.runs, self.counted = runs, counted
        self.trials = self.successes = self.looks = 0
        self.stopped = False
        self._rule, self._sizes = rule, rule.looks(len(runs))
        self._failed: set[int] = set()

    def note(self, repeat: int, counts: bool | None) -> None:
        """Note whether a run counts; None: it raised."""
        if counts is None:
            self._failed.add(repeat)
        else:
            self.counted[repeat] = counts

    def due(self) -> list[PlannedRun]:
        """Take every look that the finished runs allow; return the runs that the next look needs (no failed ones)."""
        for size in self._sizes[self.looks :]:
            counted = [counts for counts in self.counted[:size] if counts is not None]
            if self.stopped:
                break
            if len(counted) < size:
                waiting = (run for run in self.runs[:size] if self.counted[run.repeat] is None)
                return [run for run in waiting if run.repeat not in self._failed]
            self.looks, self.trials, self.successes = self.looks + 1, size, sum(counted)
            self.stopped = self._rule.interval(self.successes, size).margin <= self._rule.margin
        return []

    def unneeded(self) -> list[PlannedRun]:
        """Return the runs without a row that no further look needs."""
        self.due()
        return [run for run in self.runs if self.counted[run.repeat] is None] if self.stopped else []

    def row(self) -> StopRow:
        """Return the cell's row of ``stops.csv``, without the values of the axes."""
        self.due()
        limits = self._rule.interval(self.successes, self.trials) if self.looks else None
        return StopRow(
            runs=self.trials,
            successes=self.successes,
            estimate=self.successes / self.trials if limits else None,
            low=limits.low if limits else None,
            high=limits.high if limits else None,
            looks=self.looks,
            stopped=self.stopped,
            method=METHOD,
        )


class Cells:
    """The cells of some runs of a campaign. Without ``stop.margin`` there are no cells, and every run is needed.

    Args:
        plan: its configuration holds the rule.
        runs: all repeats of each cell, in any order.
        known: for the id of each finished run, whether it counts for the rate.
    """

    def __init__(self, plan: Plan, runs: Iterable[PlannedRun], known: Mapping[str, bool]) -> None:
        self._stop = plan.config.stop
        groups: dict[int, list[PlannedRun]] = {}
        if self._stop.margin is not None:
            for run in runs:
                groups.setdefault(_number(run), []).append(run)
        self._cells = {number: self._cell_of(group, known) for number, group in groups.items()}

    def _cell_of(self, runs: list[PlannedRun], known: Mapping[str, bool]) -> Cell:
        stop = self._stop
        runs.sort(key=lambda run: run.repeat)
        rule = StopRule(stop.margin or 0.0, stop.confidence, stop.minimum, stop.growth)
        return Cell(runs, [known.get(run.run_id) for run in runs], rule)

    def note(self, run: PlannedRun, result: ExperimentResult | None) -> None:
        """Note a run that is done; None: it raised."""
        if self._cells:
            counts = None if result is None else _counts(self._stop, result.outcome, cell(result.violation_detected))
            self._cells[_number(run)].note(run.repeat, counts)

    def rounds(self, runs: Iterable[PlannedRun]) -> Iterator[Iterator[PlannedRun]]:
        """Yield rounds of ``runs``: each round has the runs that the next look at their cells needs.

        The caller must note all runs of a round before it asks for the next one.
        """
        if not self._cells:
            yield iter(runs)
            return
        numbers = list(dict.fromkeys(map(_number, runs)))
        while due := [run for number in numbers for run in self._cells[number].due()]:
            yield iter(due)

    def unneeded(self) -> set[str]:
        """Return the ids of the runs without a row that no further look needs."""
        return {run.run_id for found in self._cells.values() for run in found.unneeded()}

    def write(self, folder: CampaignFolder, plan: Plan) -> None:
        """Write ``stops.csv``: a row for each cell, with its values of the axes first."""
        if self._cells:
            rows = ([*map(axis_cell, found.runs[0].values), *cells(found.row())] for found in self._cells.values())
            write_rows(folder.file("stops.csv"), [*plan.axes, *columns(StopRow)], rows)

    def line(self) -> str | None:
        """Return the line of the closing output about the cells; None without cells."""
        if not self._cells:
            return None
        ended, stop = sum(found.stopped for found in self._cells.values()), self._stop
        runs = sum(found.trials for found in self._cells.values())
        return (
            f"{ended} of {len(self._cells)} cells know their {stop.rate} rate to +-{stop.margin:g} "
            f"({stop.confidence:g} confidence, at all looks together), after {runs} runs in all; see stops.csv"
        )


def _number(run: PlannedRun) -> int:
    # Repeats are innermost: the index of the cell's first run.
    return run.index - run.repeat


def _counts(stop: StopConfig, outcome: str | None, detected: str) -> bool:
    if stop.rate == "detected":
        return detected == "True"
    return outcome in HARMFUL if stop.rate == "harmful" else outcome == stop.rate


def _recorded(folder: CampaignFolder, stop: StopConfig) -> dict[str, bool]:
    """Return, for the id of each run whose row is on disk, whether it counts for the rate of the rule."""
    header = columns(ExperimentResult)
    outcome, detected = header.index("outcome"), header.index("violation_detected")
    rows = (row for path in folder.shard_files() for row in read_rows(path, header))
    return {row[0]: _counts(stop, row[outcome], row[detected]) for row in rows}


def grid_of(folder: CampaignFolder, plan: Plan, runs: Iterable[PlannedRun] | None = None) -> Cells:
    """Return the cells of ``runs`` (default: all runs), with the results that are on disk."""
    stop = plan.config.stop
    return Cells(plan, plan.runs if runs is None else runs, {} if stop.margin is None else _recorded(folder, stop))
