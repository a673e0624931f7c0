"""Runs a second of one worker and of several, alternately: what ``--launcher local --workers N`` gains.

    python -m benchmarks.workers --workers 2 --rounds 3
    python -m benchmarks.workers --workers 2 -- --num_runs 20 --run.engine fast     # options of the campaign

Every worker has one thread. A round does the whole campaign once with one process and once with N, each in a folder of
its own; the time is that from the first session's begin to the last session's end, so starting Python and loading
libraries are left out on both sides and everything else counts. Printed are both rates of every round, and the median
of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rates to this file")
    parser.add_argument("campaign", nargs="*", help="options of the campaign, after --")
    options = parser.parse_args(arguments)
    rates: dict[int, list[float]] = {1: [], options.workers: []}
    for number in range(options.rounds):
        # Whoever comes first in a round comes second in the next.
        for workers in sorted(rates, reverse=bool(number % 2)):
            rates[workers].append(_rate(workers, options.campaign))
            print(f"round {number + 1}: {workers} workers, {rates[workers][-1]:.1f} runs/s", flush=True)
    ratios = [many / one for one, many in zip(rates[1], rates[options.workers], strict=True)]
    print(f"{options.workers} workers: {statistics.median(ratios):.2f} times the runs per second of one "
          f"(ratios of the rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)})")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "ratios": ratios}, indent=1) + "\n")
    return 0


def _rate(workers: int, campaign: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "run_sweep.py"), "--output_dir", folder, "--name", "workers", *campaign]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        subprocess.run(
            [*command, "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
        files = Path(folder, "workers", "shards").glob("*.session.json")
        sessions = [json.loads(path.read_text()) for path in files]
    begun = min(session["begun"] for session in sessions)
    ended = max(session["begun"] + session["seconds"] for session in sessions)
    return float(sum(session["done"] for session in sessions) / (ended - begun))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
