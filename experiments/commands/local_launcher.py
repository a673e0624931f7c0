"""``--launcher local --workers N``: the shards of a campaign as processes of this machine.

Public name: ``launch_local``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.campaign_folder import CampaignFolder
from experiments.config import ExperimentConfig
from experiments.contexts import check_plan
from experiments.plan import make_plan

PROGRAM = Path(__file__).resolve().parents[2] / "run_sweep.py"


def launch_local(config: ExperimentConfig, options: Sequence[str], workers: int, *, overwrite: bool) -> int:
    """Run one process for each shard and wait for all; return the worst exit status.

    Every process computes with ``run.threads`` threads, as a single one would: the same bits, whatever the number of
    workers.
    """
    check_plan(make_plan(config))
    folder = CampaignFolder.of(config)
    folder.check_writable()
    if overwrite:
        folder.clear_all()
    folder.check_same(config)
    processes = [
        subprocess.Popen([sys.executable, str(PROGRAM), *options, "--shard", f"{number}/{workers}"])
        for number in range(1, workers + 1)
    ]
    try:
        statuses = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    # A process that a signal ended has a negative status; its runs are missing, like those that failed.
    return max(1 if status < 0 else status for status in statuses)
