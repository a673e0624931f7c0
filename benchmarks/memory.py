"""How much more memory a campaign of the fast engine takes than one plain forward pass.

    python -m benchmarks.memory                     # GPT-2-small shape, 4 x 128 tokens, 64 runs
    python -m benchmarks.memory --quick --json      # a small model, seconds

Each figure is the peak of the resident set of a process of its own, model and libraries included: one that makes the
model and runs one eager forward pass, and one that makes the model and executes runs with all default detectors. Beside
it stands what is kept of the fault-free pass: for runs to begin from (``Recording.nbytes``), and by the forward cache
within its budget.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import machine_facts
from benchmarks.workloads import DEFAULT_DETECTORS, MODELS, Shape, Workload, build_model, parse_shape
from experiments.config import ExperimentConfig
from experiments.machine.environment import set_determinism
from experiments.plan.plan import make_plan
from monitoring.performance.memory import ResidentPeak, resident_bytes

ALLOWED = 1.3
"""A campaign may take so many times the memory of a plain pass, and what is kept of the fault-free one."""

PARTS = ("forward", "campaign")


def forward(model: str, dtype: str, shape: Shape, quick: bool, peak: ResidentPeak) -> dict[str, Any]:
    """Make a model that nothing patches and run one eager pass."""
    made = build_model(model, dtype, quick=quick)
    made.set_attn_implementation("eager")
    tokens = torch.zeros(shape, dtype=torch.int64)
    with torch.no_grad():
        made(input_ids=tokens, use_cache=False)
    return {"peak_bytes": peak.peak_bytes}


def campaign(model: str, dtype: str, shape: Shape, quick: bool, runs: int, peak: ResidentPeak) -> dict[str, Any]:
    """Make a model and execute runs of all locations as a campaign does; return who executed them."""
    locations = ["q", "k", "v", "scores", "weights", "out"]
    config = ExperimentConfig(
        exp_name="memory", num_runs=-(-runs // len(locations)), sweep={"fault.location": locations}
    )
    plan = make_plan(config)
    with Workload.of(model, dtype, shape, quick=quick) as work:
        work.pairs.prepare(plan.config)
        planned = [(run, plan.config_of(run)) for run in plan.runs]
        executions: dict[str, int] = {}
        for _, record in work.pairs.run_many(planned):
            if isinstance(record, Exception):
                raise record
            executions[record.result.execution] = executions.get(record.result.execution, 0) + 1
        reached = peak.peak_bytes
        cached = work.pairs.context.forward().cache.nbytes
        recording = work.opened(DEFAULT_DETECTORS).recording.nbytes
    return {"executions": executions, "recording_bytes": recording, "cache_bytes": cached, "peak_bytes": reached}


def peak_of(part: str, options: Sequence[str]) -> dict[str, Any]:
    """Return what a part says in a process of its own, with the peak of its resident set in bytes.

    Args:
        part: ``forward`` or ``campaign``.
        options: of this command.
    """
    command = [sys.executable, "-m", "benchmarks.memory", "--part", part, *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _part(chosen: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    set_determinism(1)
    before = resident_bytes()
    # Not getrusage: it forgets what was reached before somebody else reset the mark of the process.
    with ResidentPeak() as peak:
        given = chosen.model, chosen.dtype, shape, chosen.quick
        said = forward(*given, peak) if chosen.part == "forward" else campaign(*given, chosen.runs, peak)
    return {"libraries_bytes": before, "machine": machine_facts(), **said}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Peak memory of a campaign beside one plain forward pass.")
    parser.add_argument("--quick", action="store_true", help="a small model: seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--shape", type=parse_shape, default=(4, 128), metavar="B,T", help="sequences, tokens (4,128)")
    parser.add_argument("--model", choices=MODELS, default="gpt2-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=66, help="runs of the campaign (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.part:
        print(json.dumps(_part(chosen, chosen.shape)))
        return
    options = ["--model", chosen.model, "--dtype", chosen.dtype, "--runs", str(chosen.runs)]
    options += ["--shape", ",".join(map(str, chosen.shape)), *(["--quick"] if chosen.quick else [])]
    parts = {part: peak_of(part, options) for part in PARTS}
    machine = parts["forward"].pop("machine")
    del parts["campaign"]["machine"]
    plain, runs = parts["forward"]["peak_bytes"], parts["campaign"]["peak_bytes"]
    recording, cached = parts["campaign"]["recording_bytes"], parts["campaign"]["cache_bytes"]
    found = {"machine": machine, "model": chosen.model, "dtype": chosen.dtype, "shape": chosen.shape, **parts}
    found |= {"ratio": runs / plain, "ratio_without_kept": (runs - recording - cached) / plain, "allowed": ALLOWED}
    if chosen.json:
        print(json.dumps(found))
        return
    mega = 2.0**20
    print(f"one eager forward pass {plain / mega:.0f} MiB, libraries {parts['forward']['libraries_bytes'] / mega:.0f}")
    print(f"campaign {runs / mega:.0f} MiB, runs by {parts['campaign']['executions']}")
    print(f"kept of the fault-free pass: {recording / mega:.0f} MiB recorded, {cached / mega:.0f} MiB in the cache")
    print(f"ratio {runs / plain:.2f}, without what is kept {found['ratio_without_kept']:.2f}, allowed {ALLOWED}")


if __name__ == "__main__":
    main()
