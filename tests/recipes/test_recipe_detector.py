"""The recipe for a detector: one class, and a line of ``bounds.registry.BUILT_IN`` with its module.

A detector of the user's own needs no line: the configuration names it as ``file.py:Class``, so that workers in other
processes find it, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
from micro_campaign import table

from bounds.registry import get_detector, unregister_detector

CLASS = '''
class LargeOutput(Detector):
    """Outputs are no larger than 1,000."""

    name, needs, statement, cost = "very_large_output", frozenset({"out"}), "no output is larger than 1000", "d"
    proved = False

    def judge(self, state, baseline):
        large = ~(state.out.abs().amax(-1) <= 1000)
        return Verdict(self.name, rows_checked=large.numel(), violations=int(large.sum()))
'''
FAULTS = ("--fault.location", "out", "--fault.bit", "30")


def assert_it_looked(folder: Path) -> None:
    said = [row for row in table(folder / "detections.csv") if row["detector"] == "very_large_output"]
    assert sum(int(row["violations"]) for row in said) > 0
    assert {row["detector"] for row in table(folder / "clean.csv")} >= {"finite", "very_large_output"}
    assert {run["unproved_detectors"] for run in table(folder / "runs.csv")} == {"very_large_output"}


def test_a_detector_is_a_class_that_registers_itself(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str],
    toy: Callable[[str, str], None],
) -> None:  # fmt: skip
    toy("toy_registered", f"from bounds import Detector, Verdict, register_detector\n\n@register_detector{CLASS}")
    importlib.import_module("toy_registered")
    try:
        assert "very_large_output no output is larger than 1000  [cost: d; reads out; no theorem" in listed("detectors")
        folder = campaign(*FAULTS, "--detect.detectors", "[finite, very_large_output]")
        assert_it_looked(folder)
        assert "very_large_output" in page(folder)
    finally:
        unregister_detector("very_large_output")
    with pytest.raises(ValueError, match="got 'very_large_output', allowed"):
        get_detector("very_large_output")


def test_a_detector_of_a_file_reaches_workers_in_other_processes(campaign: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"from bounds import Detector, Verdict\n\n{CLASS}")
    options = ("--launcher", "local", "--workers", "1", "--detect.detectors", f"[finite, '{path}:LargeOutput']")
    try:
        assert_it_looked(campaign(*FAULTS, *options))
    finally:
        unregister_detector("very_large_output")
