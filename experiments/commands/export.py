"""``run_sweep.py export results/NAME [--table runs] [--format parquet] [--output FILE]``: write a table as Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.commands.options import one_folder, take_value
from experiments.config.checks import check_choice
from experiments.errors import MissingResourceError, UsageError
from experiments.tables.schema import TABLES

FORMATS = ("parquet",)


def export(arguments: Sequence[str]) -> int:
    """Write a merged table as Parquet, into the campaign's folder unless ``--output`` says where."""
    options = list(arguments)
    table, form = take_value(options, "--table") or "runs", take_value(options, "--format") or "parquet"
    output = take_value(options, "--output")
    check_choice("--table", table, list(TABLES))
    check_choice("--format", form, FORMATS)
    folder = one_folder("export", options)
    source, target = folder.file(f"{table}.csv"), Path(output) if output else folder.file(f"{table}.{form}")
    if not source.is_file():
        raise MissingResourceError(f"{source}: is not there; run_sweep.py merge {folder.path} makes it")
    _check_target(target, form)
    # Imported here: only this command and the report need Arrow.
    from experiments.tables.parquet import export_parquet

    rows = export_parquet(source, TABLES[table], target)
    print(f"{rows} rows of {source} in {target}, {target.stat().st_size / 2**20:.1f} MiB")
    return 0


def _check_target(target: Path, form: str) -> None:
    """Raise ``UsageError`` unless ``target`` may be written. No file that a campaign needs has this suffix."""
    # A link is replaced, not followed; but the user thinks of the file that it names, so both must have the suffix.
    if target.is_dir() or any(path.suffix != f".{form}" for path in (target, target.resolve())):
        raise UsageError(f"--output: got {target}, allowed a file that ends in .{form}, new or to be replaced")
    if not target.parent.is_dir():
        raise UsageError(f"--output: got {target}, allowed a file in a folder that exists; {target.parent} does not")
