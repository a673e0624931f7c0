"""The example scripts run as a user would run them."""

import pytest

from experiments.examples import basic_experiment


def test_basic_experiment_prints_one_line_per_run(capsys: pytest.CaptureFixture[str]) -> None:
    basic_experiment.main()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "loss_diff" in line]
    assert len(lines) == 10
    assert all("violations" in line for line in lines)
    assert printed.count("K = V is False") == 4
