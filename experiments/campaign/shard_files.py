"""The files of one shard, to which a worker appends the rows of its runs.

    with ShardFiles(folder, shard) as files:
        files.append(record)                     # a RunRecord
        files.append_failure(planned, error)

The verdicts of the detectors and the propagation of the fault come first, then the run's own row, which makes the run
count.
"""

from __future__ import annotations

import contextlib
import traceback

from experiments.campaign.folder import CampaignFolder
from experiments.plan.plan import PlannedRun
from experiments.plan.shards import Shard
from experiments.runs.record import RunRecord
from experiments.tables.csv_file import CsvFile, read_keys, read_rows
from experiments.tables.schema import PER_RUN, CleanRow, ExperimentResult, FailureRow, cells, columns


class ShardFiles:
    """The files of one shard, open for appending; ``record`` is ``detect.record``."""

    def __init__(self, folder: CampaignFolder, shard: Shard, record: str = "all") -> None:
        self._folder, self._only_fired = folder, record == "fired"
        stem = folder.shards / shard.file_name
        self._runs_path = stem.with_suffix(".csv")
        self._per_run_paths = {name: stem.with_suffix(f".{name}.csv") for name in PER_RUN}
        self._clean_path = stem.with_suffix(".clean.csv")
        self._failures_path = stem.with_suffix(".failures.csv")
        self._clean_seen: set[tuple[str, ...]] = set()
        self._tracebacks_path = folder.file("logs") / f"{shard.file_name}.txt"
        self._tracebacks: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardFiles:
        enter = self._stack.enter_context
        self._runs = enter(CsvFile(self._runs_path, columns(ExperimentResult)))
        done = set(read_keys(self._runs_path, columns(ExperimentResult)))
        # If a run has such rows but no row of its own, it will be done again: these rows go.
        self._per_run = {
            name: enter(CsvFile(self._per_run_paths[name], columns(row_type), keep=done))
            for name, row_type in PER_RUN.items()
        }
        self._clean = enter(CsvFile(self._clean_path, columns(CleanRow)))
        self._clean_seen = {tuple(row[:4]) for row in read_rows(self._clean_path, columns(CleanRow))}
        self._failures = enter(CsvFile(self._failures_path, columns(FailureRow)))
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def append(self, record: RunRecord) -> None:
        """Append a finished run; its own row comes last and makes it count."""
        new = [row for row in map(cells, record.clean) if tuple(row[:4]) not in self._clean_seen]
        self._clean_seen.update(tuple(row[:4]) for row in new)
        self._clean.append(*new)
        for name, file in self._per_run.items():
            rows = getattr(record, name)
            if name == "detections" and self._only_fired:
                rows = [row for row in rows if row.violations]
            file.append(*map(cells, rows))
        self._runs.append(cells(record.result))

    def append_failure(self, run: PlannedRun, error: Exception) -> None:
        """Append a failed run, and its traceback to the shard's log; a repeated traceback only names the first run."""
        path, text = self._tracebacks_path, "".join(traceback.format_exception(error))
        first = self._tracebacks.setdefault(text, run.run_id)
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(f"run {run.run_id}: {text if first == run.run_id else f'as run {first}'}\n")
        relative = str(path.relative_to(self._folder.path))
        message = f"{type(error).__name__}: {error}"
        self._failures.append(cells(FailureRow(run_id=run.run_id, exception=message, traceback=relative)))
