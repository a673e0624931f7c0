"""The example scripts run as a user would run them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_basic_experiment_prints_one_line_per_run():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.examples.basic_experiment"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "loss_diff" in line]
    assert len(lines) == 10
    assert all("violations" in line for line in lines)
    assert done.stdout.count("K = V is False") == 4
