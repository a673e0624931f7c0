"""``run_sweep.py report results/NAME``: write a campaign as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.commands.options import one_folder
from experiments.report import write_report


def report(arguments: Sequence[str]) -> int:
    """Write ``report.html`` and ``summary.csv`` into a campaign's folder, and print the verdict."""
    written = write_report(one_folder("report", arguments))
    print(written.verdict)
    print(f"{written.page} ({written.page.stat().st_size / 1e6:.1f} MB), {written.table}")
    return 0
