"""What commands cost before they answer: user CPU seconds, each beside a Python that does nothing.

    python benchmarks/commands.py results/default            # the medians of five, as a table
    python benchmarks/commands.py results/default --slow     # report and replay as well

The campaign must be finished. Nothing of it is changed but what merge, export and report write.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPETITIONS = 5


def user_seconds(arguments: Sequence[str]) -> float:
    """Return the user CPU seconds of one Python with these arguments; how it ends does not matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, check=False)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def commands(folder: Path, *, slow: bool) -> dict[str, list[str]]:
    """Return the command lines by what the table calls them."""
    size = ["--margin", "0.01", "--confidence", "0.95", "--population", "1000000"]
    found = {
        "--version": ["--version"],
        **{f"--list {what}": ["--list", what] for what in ("locations", "sources", "fields", "kinds")},
        "a mistyped option": ["--fault.locaton", "q"],
        "a mistyped command": ["stats"],
        "status": ["status", str(folder)],
        "--dry-run": ["--dry-run"],
        "plan-size": ["plan-size", *size],
        "merge": ["merge", str(folder)],
        "export": ["export", str(folder), "--table", "runs"],
    }
    if slow:
        with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
            run_id = next(csv.DictReader(file))["run_id"]
        found |= {"report": ["report", str(folder)], "replay of one row": ["replay", str(folder), run_id]}
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a finished campaign")
    parser.add_argument("--slow", action="store_true", help="report and replay as well")
    given = parser.parse_args()
    print(f"{'command':22}{'user s':>8}{'python -c pass':>16}")
    for name, arguments in commands(given.folder, slow=given.slow).items():
        # In turn: what disturbs the machine disturbs both.
        pairs = [
            (user_seconds([str(ROOT / "run_sweep.py"), *arguments]), user_seconds(["-c", "pass"]))
            for _ in range(REPETITIONS)
        ]
        command, nothing = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:22}{command:8.2f}{nothing:16.2f}", flush=True)


if __name__ == "__main__":
    main()
