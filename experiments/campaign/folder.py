"""The folder of one campaign: where each file is, and when a process may write to it.

folder = CampaignFolder(Path("results/default"))
folder.begin(config, plan, overwrite=False)      # config.yaml, plan.csv; or a refusal that names what changed
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.campaign.lock import is_held
from experiments.config import ExperimentConfig, config_from_mapping, dump_config, flat_fields, read_config_file
from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.plan.plan import Plan, canonical_json
from experiments.tables.csv_file import read_keys, write_rows, write_text
from experiments.tables.schema import TABLES, ExperimentResult, cell, columns

UNBOUND = ("output_dir", "slurm.", "run.engine", "run.batch_runs", "run.proof_cache")
"""Fields that may change between the sessions of one campaign: they decide where and how, not what."""


_OWN_ENTRIES = {
    *("config.yaml", "provenance.json", "plan.csv", "shards", "trace", "logs", "proofs"),
    *("missing.csv", "run.sbatch", "merge.sbatch", "submission.json", "stops.csv", "summary.csv", "report.html"),
    *(f"{table}.{form}" for table in TABLES for form in ("csv", "parquet")),
}
"""The files and folders that a campaign writes; the program never removes anything else."""

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}\.tmp")
"""The temporary file that remains if a process is killed while it writes ``name``."""


@dataclasses.dataclass(frozen=True)
class CampaignFolder:
    """Paths below a campaign's folder."""

    path: Path

    @classmethod
    def of(cls, config: ExperimentConfig) -> CampaignFolder:
        """Return the folder that a configuration names."""
        return cls(Path(config.output_dir) / config.name)

    @classmethod
    def existing(cls, path: str | Path) -> CampaignFolder:
        """Return an existing campaign's folder; raise ``MissingResourceError`` if it is none."""
        folder = cls(Path(path))
        if not folder.config_file.is_file():
            raise MissingResourceError(f"{path}: no campaign here (no config.yaml)")
        return folder

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def shards(self) -> Path:
        """The folder of the shards."""
        return self.path / "shards"

    def file(self, name: str) -> Path:
        """Return the path of a file of the campaign."""
        return self.path / name

    def config(self) -> ExperimentConfig:
        """Return the campaign's configuration."""
        return config_from_mapping(read_config_file(self.config_file))

    def check_writable(self) -> None:
        """Raise ``UsageError`` unless the folder can be made and written to; nothing is left behind."""
        for path in (self.path, self.shards, self.file("trace"), self.file("logs")):
            while not path.exists():
                path = path.parent
            if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
                raise UsageError(f"output_dir: {self.path} cannot be written ({path} is not a writable folder)")

    def check_same(self, config: ExperimentConfig) -> None:
        """Raise ``UsageError`` with the differing keys if the folder holds a campaign with another configuration."""
        if not self.config_file.is_file():
            # Another shard that is just starting may have made these, or Slurm for the output of its tasks.
            if self._entries() - {"shards", "logs", "plan.csv"} or self.shard_files():
                raise UsageError(f"{self.path}: exists and is no campaign; choose another name or --overwrite")
            return
        old, new = flat_fields(self.config()), flat_fields(config)
        differing = [
            f"{key} ({old.get(key)!r} -> {new.get(key)!r})"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and not key.startswith(UNBOUND)
        ]
        if differing:
            raise UsageError(
                f"{self.path}: holds a campaign with another configuration: {', '.join(differing)}; "
                "choose another name or --overwrite"
            )

    def clear(self, own_lock: Path) -> None:
        """Remove the files of an earlier campaign of this name, except the caller's lock.

        Raises:
            UsageError: the folder holds something that no campaign made.
            CheckRefusedError: another process is writing a shard.
        """
        self._check_removable(own_lock)
        # The configuration goes last: if this is interrupted, the rest of the folder is still known as that campaign.
        entries = sorted([*self.path.iterdir(), *self.shards.iterdir()], key=lambda entry: entry == self.config_file)
        for entry in entries:
            if entry in (self.shards, own_lock):
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _entries(self) -> set[str]:
        """Return the names of the entries of the folder, without temporary files of any process."""
        names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        return {name for name in names if not _TEMPORARY.fullmatch(name)}

    def _check_removable(self, own_lock: Path | None = None) -> None:
        foreign = sorted(entry.name for entry in self.path.iterdir() if not _is_own(entry.name))
        if foreign:
            raise UsageError(f"--overwrite: {self.path} holds {foreign[0]}, which no campaign made; move it away first")
        others = [path.name for path in self.shards.glob("*.lock") if path != own_lock and is_held(path)]
        if others:
            raise CheckRefusedError(f"{self.shards}: {', '.join(others)} shows that another process is writing there")

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Move an earlier campaign aside for a block; remove it when the block ends, move it back if the block raises.

        A process that is killed in the block leaves the earlier campaign beside the new one, as ``NAME.old-...``.

        Raises:
            UsageError, CheckRefusedError: like ``clear``.
        """
        if not self.path.exists():
            yield
            return
        self._check_removable()
        # If the path is a link, the folder itself is moved: it stays on its file system.
        path = self.path.resolve()
        aside = path.with_name(f"{path.name}.old-{uuid.uuid4().hex}")
        path.rename(aside)
        try:
            # A link to the folder must not dangle.
            path.mkdir()
            yield
        except BaseException:
            shutil.rmtree(path)
            aside.rename(path)
            raise
        shutil.rmtree(aside)

    def clear_all(self) -> None:
        """Remove an earlier campaign before workers start; refuse while another process writes a shard."""
        if self.path.exists():
            self.shards.mkdir(exist_ok=True)
            self.clear(self.shards / "none.lock")

    def detach(self, stem: str) -> None:
        """Replace the files of a shard by copies: a worker that was cut off may still write to the old files."""
        names = [f"{stem}.csv" if table == "runs" else f"{stem}.{table}.csv" for table in TABLES]
        for path in (*(self.shards / name for name in names), self.file("trace") / f"{stem}.jsonl"):
            if path.is_file():
                copy = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
                shutil.copyfile(path, copy)
                os.replace(copy, path)

    def begin(self, config: ExperimentConfig, plan: Plan) -> None:
        """Write ``config.yaml`` and ``plan.csv`` unless they exist.

        The configuration comes first, because it tells other processes that this is a campaign, and which one. The plan
        follows from it.
        """
        if not self.config_file.is_file():
            write_text(self.config_file, dump_config(config))
        if not self.file("plan.csv").is_file():
            rows = ([run.run_id, str(run.repeat), *map(axis_cell, run.values)] for run in plan.runs)
            write_rows(self.file("plan.csv"), ["run_id", "repeat", *plan.axes], rows)

    def shard_files(self, suffix: str = "") -> list[Path]:
        """Return the files of all shards with this suffix, in the order of the shards."""
        pattern = re.compile(rf"\d{{4,}}{re.escape(suffix)}\.csv")
        found = [path for path in self.shards.glob("*.csv") if pattern.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.partition(".")[0]))

    def finished_runs(self) -> set[str]:
        """Return the ids of the runs whose rows are on disk."""
        header = columns(ExperimentResult)
        return {run_id for path in self.shard_files() for run_id in read_keys(path, header)}


def _is_own(name: str) -> bool:
    temporary = _TEMPORARY.fullmatch(name)
    return (temporary["name"] if temporary else name) in _OWN_ENTRIES


def axis_cell(value: Any) -> str:
    """Return the text of an axis value in ``plan.csv``."""
    return canonical_json(value) if isinstance(value, (list, dict)) else cell(value)
