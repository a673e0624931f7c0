"""The recipe for a launcher: a module with two functions, and a row of ``LAUNCHERS``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from micro_campaign import MicroPlace, numbers

from experiments.command_line import help_text, main
from experiments.launchers.registry import LAUNCHERS, Launcher

MODULE = '''
"""Do the shards one after the other in this process."""

from experiments.campaign.worker import run_campaign
from experiments.plan.shards import Shard


def launch(order, stop):
    for number in range(1, order.workers + 1):
        shard = Shard(number, order.workers)
        run_campaign(order.config, shard=shard, overwrite=order.overwrite, arguments=order.options, quiet=order.quiet)
    return 0


def show(order):
    print(f"{order.workers} shards in turn")
'''


def test_a_launcher_is_a_module_and_a_row(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str],
    toy: Callable[[str, str], None], micro: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    toy("toy_launcher", MODULE)
    alone = campaign(name="micro")
    with LAUNCHERS.registered("in-turn", Launcher("N shards, one after the other", "toy_launcher")):
        assert "in-turn  N shards, one after the other" in listed("launchers")
        assert "  --launcher in-turn --workers N\n" in help_text()
        assert main([*micro.arguments(tmp_path / "dry"), "--launcher", "in-turn", "--workers", "3", "--dry-run"]) == 0
        assert "3 shards in turn" in capsys.readouterr().out
        campaign("--launcher", "in-turn", "--workers", "2", "--output_dir", str(tmp_path / "turn"))
        folder = tmp_path / "turn" / "micro"
    assert {path.name for path in folder.glob("shards/????.json")} == {"0001.json", "0002.json"}
    assert numbers(folder / "runs.csv") == numbers(alone / "runs.csv")
    assert "micro" in page(folder)


def test_without_its_row_it_is_refused(micro: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*micro.arguments(tmp_path), "--launcher", "locla", "--workers", "2"]) == 2
    assert "--launcher: got 'locla', allowed local, slurm; did you mean 'local'?" in capsys.readouterr().err
