"""Write all figures of a campaign: ``python -m experiments.figures results/NAME [--out DIR]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import CheckRefusedError, MissingResourceError, UsageError
from experiments.figures.catalogue import Written, load_tables, write_figures
from experiments.tables.csv_file import write_text

_PAGE = "figures.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures and a page with their captions; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__, allow_abbrev=False)
    parser.add_argument("campaign", nargs="+", type=Path, help="folder (or runs.csv) of one campaign or of several")
    parser.add_argument("--out", type=Path, help="where to write (default: figures/ in the first campaign's folder)")
    options = parser.parse_args(arguments)
    out: Path = options.out or _folder(options.campaign[0]) / "figures"
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out: got {out}, which is a file; allowed a folder")
        written = []
        for entry in write_figures(load_tables(options.campaign), out):
            written.append(entry)
            print(f"{entry.name:26}{entry.reason or ', '.join(path.name for path in entry.files)}", flush=True)
        write_text(out / _PAGE, page(written))
    except (UsageError, MissingResourceError, CheckRefusedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        # The folder cannot be written to, or the disk is full.
        print(f"error: {error}", file=sys.stderr)
        return MissingResourceError.exit_status
    print(f"{sum(bool(entry.files) for entry in written)} of {len(written)} figures and {_PAGE} in {out}")
    return 0


def _folder(campaign: Path) -> Path:
    """Return a campaign's folder; the argument may also be its ``runs.csv``."""
    return campaign.parent if campaign.is_file() else campaign


def page(written: Sequence[Written]) -> str:
    """Return a Markdown page with the figures, their captions, and the reasons why others are missing."""
    lines = ["# Figures"]
    for entry in written:
        picture = (
            f"![{entry.title}]({entry.name}.svg)\n\n{entry.caption}" if entry.files else f"Not drawn: {entry.reason}."
        )
        lines += ["", f"## {entry.title}", "", picture]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    raise SystemExit(main())
