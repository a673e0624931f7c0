"""How many fewer runs drawing by aim needs (``fault.aim``): harmful flips in one model, uniform and weighted.

    python -m benchmarks.sampling_efficiency --runs 2000         # per location and aim; bits and effect against uniform

All numbers are for the share of critical and nonfinite flips under uniform drawing. ``gain`` is the ratio of variances
at equal numbers of runs: how many times fewer runs give an interval of the same width. Three estimators of the weighted
runs are compared (docs/sampling.md): the mean of weight times outcome, that mean corrected by how far the mean weight
is from 1 (regression), and the ratio of the two means (Hajek).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm

from experiments.analysis import hajek, horvitz_thompson, regression
from experiments.config import load_config
from experiments.engine.contexts import Contexts
from experiments.machine.environment import set_determinism
from experiments.plan.plan import make_plan
from experiments.tables.schema import HARMFUL
from fault_injection import LOCATIONS
from monitoring import TraceWriter


class Estimate(NamedTuple):
    """A rate, the variance of the estimate of it, and how many runs there were."""

    rate: float
    variance: float
    runs: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval (normal)."""
        return float(norm.isf(0.025)) * math.sqrt(self.variance)

    def gain(self, other: Estimate) -> float:
        """Return how many times fewer runs the other estimate needs for the same width."""
        return self.variance * self.runs / (other.variance * other.runs)


ESTIMATORS = {"mean": horvitz_thompson, "regression": regression, "ratio": hajek}


def collect(options: Sequence[str], aims: Sequence[str], runs: int) -> pd.DataFrame:
    """Run ``runs`` faults for each location and aim; return a row for each: location, aim, harmful, weight, seconds."""
    axes = [f"--sweep.fault.location={','.join(LOCATIONS)}", "--fault.bit=null", f"--num_runs={runs}"]
    rows = []
    set_determinism(1)
    with Contexts(TraceWriter(None)) as contexts:
        for aim in aims:
            plan = make_plan(load_config([*options, *axes, f"--fault.aim={aim}", "--detect.detectors=[]"]))
            pairs = contexts.open(plan.config_of(plan.runs[0]))
            start = time.perf_counter()
            done = [record for _, record in pairs.run_many([(run, plan.config_of(run)) for run in plan.runs])]
            seconds = (time.perf_counter() - start) / len(done)
            for record in done:
                if isinstance(record, Exception):
                    raise record
                row = record.result
                rows.append((row.location, aim, row.outcome in HARMFUL, row.sampling_weight, seconds))
    return pd.DataFrame(rows, columns=["location", "aim", "harmful", "weight", "seconds"])


def compare(rows: pd.DataFrame, aim: str) -> tuple[Estimate, dict[str, Estimate]]:
    """Return the estimate of the uniform runs, and those of the runs of ``aim`` by estimator."""
    plain, aimed = rows[rows.aim == "uniform"], rows[rows.aim == aim]
    harmful, weight = aimed.harmful.to_numpy(float), aimed.weight.to_numpy(float)
    found = {name: Estimate(*estimator(harmful, weight), len(weight)) for name, estimator in ESTIMATORS.items()}
    return Estimate(*horvitz_thompson(plain.harmful.to_numpy(float), np.ones(len(plain))), len(plain)), found


def print_table(rows: pd.DataFrame, aim: str) -> None:
    """Print, by location and for all, the rates with their margins and the gains."""
    aimed = rows[rows.aim == aim]
    print(
        f"aim {aim}: {len(aimed)} runs, {1e3 * aimed.seconds.mean():.2f} ms a run (uniform "
        f"{1e3 * rows[rows.aim == 'uniform'].seconds.mean():.2f}), {int(aimed.harmful.sum())} harmful; weights "
        f"{aimed.weight.min():.3f} to {aimed.weight.max():.2f}, mean {aimed.weight.mean():.4f}"
    )
    print(f"{'location':10}{'uniform %':>16}" + "".join(f"{name + ' %':>17}{'gain':>6}" for name in ESTIMATORS))
    for location in (*LOCATIONS, "all"):
        plain, found = compare(rows if location == "all" else rows[rows.location == location], aim)
        print(f"{location:10}{_shown(plain):>16}" + "".join(
            f"{_shown(one):>17}{plain.gain(one):6.1f}" for one in found.values()))  # fmt: skip


def _shown(estimate: Estimate) -> str:
    return f"{100 * estimate.rate:.2f} +- {100 * estimate.margin:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="How many fewer runs drawing by aim needs.")
    parser.add_argument("--model", default="reference")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=2000, help="per location and aim (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    options = [f"--model.path={chosen.model}", f"--model.dtype={chosen.dtype}", f"--seed={chosen.seed}"]
    rows = collect(options, ("uniform", "bits", "effect"), chosen.runs)
    print(f"{chosen.model}, {chosen.dtype}, {chosen.runs} runs per location and aim")
    for aim in ("bits", "effect"):
        print_table(rows, aim)


if __name__ == "__main__":
    main()
