"""Merge the shards of a campaign into its tables, and say what is missing.

    merged = merge_campaign(CampaignFolder(Path("results/default")))
    merged.missing            # run ids without a row

Rows come in the order of the plan, whichever worker did them and when, so the merged tables of two executions differ
in timings and ``execution`` only. A run that two workers did must have given the same numbers twice.

Public names: ``Merged``, ``merge_campaign``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from experiments.campaign_folder import CampaignFolder
from experiments.cells import cells_of
from experiments.csv_file import read_rows, write_rows
from experiments.errors import CheckRefusedError
from experiments.plan import make_plan
from experiments.result import UNREPEATABLE, CleanRow, DetectionRow, ExperimentResult, FailureRow, columns


@dataclass(frozen=True)
class Merged:
    """What a merge found: planned, finished, missing and failed runs (failed ones are missing, with a reason).

    Runs that a stopping rule does not need any more are ``unneeded``, and not missing; ``stops`` says how cells ended.
    """

    planned: int
    finished: int
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    unneeded: int = 0
    stops: str | None = None


def merge_campaign(folder: CampaignFolder) -> Merged:
    """Write ``runs.csv``, ``detections.csv``, ``clean.csv`` and ``failures.csv`` from the shards.

    With a stopping rule also ``stops.csv``.

    Raises:
        CheckRefusedError: a damaged shard, or one run with two different results.
    """
    plan = make_plan(folder.config())
    order = {run.run_id: run.index for run in plan.runs}
    header = columns(ExperimentResult)
    runs: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for path in folder.shard_files():
        for row in read_rows(path, header):
            _check_same(runs.setdefault(row[0], row), row, header, folder)
            owner.setdefault(row[0], path.stem)
    unknown = [run_id for run_id in runs if run_id not in order]
    if unknown:
        raise CheckRefusedError(f"{folder.shards}: holds runs that are not in the plan, e.g. {unknown[0]}")
    finished = sorted(runs, key=lambda run_id: order[run_id])
    write_rows(folder.file("runs.csv"), header, (runs[run_id] for run_id in finished))
    _merge_detections(folder, order, owner)
    clean = {tuple(row[:4]): row for row in _rows_of(folder, ".clean", CleanRow)}
    write_rows(folder.file("clean.csv"), columns(CleanRow), [clean[key] for key in sorted(clean)])
    failures = {row[0]: row for row in _rows_of(folder, ".failures", FailureRow) if row[0] not in runs}
    failed = sorted(failures, key=lambda run_id: order.get(run_id, -1))
    write_rows(folder.file("failures.csv"), columns(FailureRow), (failures[run_id] for run_id in failed))
    grid = cells_of(folder, plan)
    grid.write(folder, plan)
    unneeded = grid.unneeded()
    missing = tuple(run_id for run_id in order if run_id not in runs and run_id not in unneeded)
    return Merged(len(order), len(runs), missing, tuple(failed), len(unneeded), grid.line())


def _rows_of(folder: CampaignFolder, suffix: str, row_type: type) -> Iterable[list[str]]:
    for path in folder.shard_files(suffix):
        yield from read_rows(path, columns(row_type))


def _merge_detections(folder: CampaignFolder, order: dict[str, int], owner: dict[str, str]) -> None:
    header = columns(DetectionRow)
    rows = [
        row
        for path in folder.shard_files(".detections")
        for row in read_rows(path, header)
        # Of a run that two workers did, the detections of one are kept.
        if owner.get(row[0]) == path.name.partition(".")[0]
    ]
    rows.sort(key=lambda row: order[row[0]])
    write_rows(folder.file("detections.csv"), header, rows)


def _check_same(known: list[str], row: list[str], header: list[str], folder: CampaignFolder) -> None:
    differing = [name for name, a, b in zip(header, known, row, strict=True) if a != b and name not in UNREPEATABLE]
    if differing:
        raise CheckRefusedError(
            f"{folder.shards}: run {row[0]} was done twice with different results in {', '.join(differing)}; "
            "the workers did not compute the same bits"
        )
