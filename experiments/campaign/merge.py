"""Merge the shards of a campaign into its tables, and say what is missing.

    merged = merge_campaign(CampaignFolder(Path("results/default")))
    merged.missing            # run ids without a row

Rows come in the order of the plan, whichever worker did them and when. So the merged tables of two executions differ
only in timings and ``execution``. A run that two workers did must have the same numbers in both. The merge copies rows
as they are and keeps only their positions in memory, so it merges millions of runs in seconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from experiments.campaign.cells import grid_of
from experiments.campaign.folder import CampaignFolder
from experiments.campaign.provenance import write_campaign_provenance
from experiments.errors import CheckRefusedError
from experiments.plan.plan import make_plan
from experiments.tables.csv_file import read_rows, write_lines, write_rows
from experiments.tables.row_lines import cells_of, row_lines
from experiments.tables.row_places import RowPlaces
from experiments.tables.schema import PER_RUN, UNREPEATABLE, CleanRow, ExperimentResult, FailureRow, columns


@dataclass(frozen=True)
class Merged:
    """The result of a merge: planned, finished, missing and failed runs (a failed run is missing and has a reason).

    Runs that the stopping rule no longer needs are ``unneeded``, and not missing; ``stops`` says how cells ended.
    """

    planned: int
    finished: int
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    unneeded: int = 0
    stops: str | None = None


def merge_campaign(folder: CampaignFolder) -> Merged:
    """Write ``runs.csv``, the tables of ``PER_RUN``, ``clean.csv``, ``failures.csv`` and ``provenance.json``.

    With a stopping rule, write ``stops.csv``, too.

    Raises:
        CheckRefusedError: a damaged shard, one run with two different results, or shards of different models or data.
    """
    plan = make_plan(folder.config())
    order = {run.run_id.encode(): run.index for run in plan.runs}
    places, owner = _find_runs(folder, order)
    finished = {run_id for run_id, index in order.items() if owner[index] >= 0}
    write_lines(folder.file("runs.csv"), columns(ExperimentResult), places.in_order())
    for name, row_type in PER_RUN.items():
        _merge_per_run(folder, name, row_type, order, owner)
    clean = {tuple(row[:4]): row for row in _rows_of(folder, ".clean", CleanRow)}
    write_rows(folder.file("clean.csv"), columns(CleanRow), [clean[key] for key in sorted(clean)])
    failures = {row[0]: row for row in _rows_of(folder, ".failures", FailureRow) if row[0].encode() not in finished}
    failed = sorted(failures, key=lambda run_id: order.get(run_id.encode(), -1))
    write_rows(folder.file("failures.csv"), columns(FailureRow), (failures[run_id] for run_id in failed))
    write_campaign_provenance(folder)
    grid = grid_of(folder, plan)
    grid.write(folder, plan)
    unneeded = grid.unneeded()
    unfinished = (run_id.decode() for run_id in order if run_id not in finished)
    missing = tuple(run_id for run_id in unfinished if run_id not in unneeded)
    return Merged(len(order), len(finished), missing, tuple(failed), len(unneeded), grid.line())


def _rows_of(folder: CampaignFolder, suffix: str, row_type: type[Any]) -> Iterable[list[str]]:
    for path in folder.shard_files(suffix):
        yield from read_rows(path, columns(row_type))


def _find_runs(folder: CampaignFolder, order: dict[bytes, int]) -> tuple[RowPlaces, array[int]]:
    """Return the positions of the rows of ``runs.csv``, and for each run the shard whose row counts (-1: none)."""
    header = columns(ExperimentResult)
    places, stretches, owner = RowPlaces(), array("q", [-1]) * len(order), array("q", [-1]) * len(order)
    unknown: bytes | None = None
    for path in folder.shard_files():
        shard = _number(path.name)
        places.begin_file(path)
        for offset, line in row_lines(path, header):
            run = order.get(_key(line))
            if run is None:
                unknown = unknown or _key(line)
            elif owner[run] < 0:
                stretches[run], owner[run] = places.add(run, offset, line), shard
            else:
                _check_same(places.rows(stretches[run]), line, folder)
    if unknown is not None:
        raise CheckRefusedError(f"{folder.shards}: holds runs that are not in the plan, e.g. {unknown.decode()}")
    return places, owner


def _merge_per_run(
    folder: CampaignFolder, name: str, row_type: type[Any], order: dict[bytes, int], owner: array[int]
) -> None:
    """Write one set of rows for each finished run: the rows in the shard whose row of the run counts.

    Rows of a run are appended together, so a set is a block. A shard can have several blocks of one run, if a worker
    that was cut off did it, too. Then the first block counts; if the second follows directly, it begins where the first
    row is repeated.
    """
    places, taken = RowPlaces(), bytearray(len(order))
    for path in folder.shard_files(f".{name}"):
        shard = _number(path.name)
        places.begin_file(path)
        current, first, wanted = -1, b"", False
        for offset, line in row_lines(path, columns(row_type)):
            run = order.get(_key(line), -1)
            if run != current:
                current, first = run, line
                wanted = run >= 0 and owner[run] == shard and not taken[run]
                if wanted:
                    taken[run] = True
            elif line == first:
                wanted = False
            if wanted:
                places.add(run, offset, line)
    write_lines(folder.file(f"{name}.csv"), columns(row_type), places.in_order())


def _number(file_name: str) -> int:
    return int(file_name.partition(".")[0])


def _key(line: bytes) -> bytes:
    # Ids of planned runs need no quotes; an id with quotes is in no plan.
    return line[: line.index(b",")]


def _check_same(known: bytes, line: bytes, folder: CampaignFolder) -> None:
    cells = cells_of(known), cells_of(line)
    names = columns(ExperimentResult)
    differing = [name for name, a, b in zip(names, *cells, strict=True) if a != b and name not in UNREPEATABLE]
    if differing:
        raise CheckRefusedError(
            f"{folder.shards}: run {cells[0][0]} was done twice with different results in {', '.join(differing)}; "
            "the workers did not compute the same bits"
        )
