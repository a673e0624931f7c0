"""Read and check the inputs of a report from a campaign's folder.

    inputs = read_inputs(CampaignFolder(Path("results/default")))
    inputs.runs                     # the typed runs, with every swept field as a column

This module never merges shards, because a report must not change the tables that it reports on. If the merged tables
lack finished runs, it refuses, and the message names the command.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.analysis import load_clean, load_runs
from experiments.campaign.folder import CampaignFolder
from experiments.config import read_config_file
from experiments.config.building import flatten
from experiments.errors import CheckRefusedError, MissingResourceError
from experiments.tables.csv_file import read_rows


@dataclass(frozen=True)
class ReportInputs:
    """The files of one campaign.

    Attributes:
        folder: their folder, as the user wrote it.
        settings: every field of ``config.yaml`` by its dotted name.
        axes: swept field -> values, in the order of the plan.
        provenance: ``provenance.json``; empty if the campaign has none.
        runs: one row per run (``experiments.analysis.load_runs``).
        plan: the swept values of every planned run, as ``plan.csv`` writes them.
        places: for each row of ``runs``, its row of ``plan``.
        clean: one row per fault-free pass, detector and layer.
        failures: ``failures.csv`` as text.
        stops: ``stops.csv`` as text; ``None`` if the campaign has none.
    """

    folder: CampaignFolder
    settings: dict[str, Any]
    axes: dict[str, list[Any]]
    provenance: dict[str, Any]
    runs: pd.DataFrame
    plan: pd.DataFrame
    places: NDArray[np.int64]
    clean: pd.DataFrame
    failures: pd.DataFrame
    stops: pd.DataFrame | None

    @property
    def name(self) -> str:
        """The campaign's name."""
        return str(self.settings.get("name", self.folder.path.name))

    @property
    def planned(self) -> int:
        """How many runs the plan has."""
        return len(self.plan)

    def points(self, axes: list[str]) -> pd.DataFrame:
        """Return the values of some axes for every run, indexed like ``runs``."""
        return self.plan[axes].iloc[self.places].set_axis(self.runs.index)


def read_inputs(folder: CampaignFolder) -> ReportInputs:
    """Return the inputs of a report.

    Raises:
        UsageError: a table is empty, truncated or of another schema, or the configuration is damaged.
        CheckRefusedError: no run is finished, runs are not merged, or files do not belong together.
        MissingResourceError: a merged table is missing.
    """
    settings = flatten(read_config_file(folder.config_file))
    axes = settings.pop("sweep", None) or {}
    if not isinstance(axes, dict):
        raise CheckRefusedError(f"{folder.config_file}: sweep is no mapping of fields to values")
    provenance = _provenance(folder.file("provenance.json"))
    _check_merged(folder)
    runs = load_runs(folder.path)
    if runs.empty:
        raise CheckRefusedError(f"{folder.file('runs.csv')}: has no finished runs, there is nothing to report")
    _check_all_merged(folder, runs["run_id"])
    plan = _plan(folder.file("plan.csv"), list(axes))
    stops = folder.file("stops.csv")
    return ReportInputs(
        folder=folder,
        settings=settings,
        axes=axes,
        provenance=provenance,
        runs=runs,
        plan=plan[list(axes)],
        places=pd.Index(plan["run_id"]).get_indexer(runs["run_id"]),
        clean=load_clean(folder.path),
        failures=_table_of_texts(folder.file("failures.csv")),
        stops=_table_of_texts(stops) if stops.is_file() else None,
    )


def _provenance(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckRefusedError(f"{path}: is no JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise CheckRefusedError(f"{path}: must hold a mapping, got {type(content).__name__}")
    arguments = content.get("arguments")
    if arguments is not None and not (isinstance(arguments, list) and all(isinstance(one, str) for one in arguments)):
        raise CheckRefusedError(f"{path}: arguments: got {arguments!r}, allowed a list of texts; the file is damaged")
    return content


def _check_merged(folder: CampaignFolder) -> None:
    for name in ("runs.csv", "clean.csv", "failures.csv", "plan.csv"):
        if not folder.file(name).is_file():
            hint = "" if name == "plan.csv" else f"; first: python run_sweep.py merge {folder.path}"
            raise MissingResourceError(f"{folder.file(name)}: no such file, the shards are not merged{hint}")


def _check_all_merged(folder: CampaignFolder, merged: Iterable[str]) -> None:
    """Refuse if a shard has runs that the merged table lacks: the report would show an earlier state."""
    known = set(merged)
    waiting = 0
    for path in folder.shard_files():
        with path.open("rb") as stream:
            next(stream, b"")
            # A last line without a newline belongs to a run that is being written; it does not count yet.
            waiting += sum(line.partition(b",")[0].decode() not in known for line in stream if line.endswith(b"\n"))
    if waiting:
        raise CheckRefusedError(
            f"{folder.path}: {waiting} runs in the shards are not in runs.csv; first: python run_sweep.py merge "
            f"{folder.path}"
        )


def _plan(path: Path, axes: list[str]) -> pd.DataFrame:
    """Return the plan's ids and swept values as texts; few distinct ones are stored once."""
    types = defaultdict(lambda: "category", run_id="str")
    plan = pd.read_csv(path, dtype=types, keep_default_na=False)
    missing = [name for name in axes if name not in plan.columns]
    if missing:
        raise CheckRefusedError(f"{path}: has no column {missing[0]}, which config.yaml sweeps")
    return plan[["run_id", *axes]]


def _table_of_texts(path: Path) -> pd.DataFrame:
    """Return a small table as texts, with any columns."""
    with path.open(encoding="utf-8", errors="replace", newline="") as stream:
        header = next(csv.reader(stream), [])
    if not header:
        raise CheckRefusedError(f"{path}: is empty; not even its columns are there")
    return pd.DataFrame(read_rows(path, header), columns=header, dtype=object)
