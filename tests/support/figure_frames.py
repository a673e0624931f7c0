"""Synthetic tables of campaigns, of any size, for the tests of figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from experiments.tables.schema import OUTCOMES

DETECTORS = ("finite", "S_row", "s@w")
LOCATIONS = ("q", "k", "v", "scores", "weights", "out")


def synthetic_runs(count: int = 600, seed: int = 0, **fixed: Any) -> pd.DataFrame:
    """Return runs of a model of 4 layers and 4 heads typed as by ``load_runs``; ``fixed`` replaces whole columns."""
    rng = np.random.default_rng(seed)
    bit = rng.integers(0, 32, count)
    outcome = rng.choice(OUTCOMES, count, p=[0.3, 0.5, 0.15, 0.05]).astype(object)
    loss = np.where(outcome == "masked", 0.0, 10.0 ** rng.uniform(-12, 0, count) * rng.choice([-1, 1], count))
    epsilon = rng.uniform(0.1, 4.0, count)
    layer = rng.integers(0, 4, count)
    seen = rng.random(count) < bit / 31
    runs = pd.DataFrame(
        {
            "run_id": [f"{i:016x}" for i in range(count)], "fault_id": [f"f{i:x}" for i in range(count)],
            "campaign": "synthetic", "model": "reference", "dtype": "float32",
            "batch_index": rng.integers(0, 16, count),
            "layer": layer, "layer_depth": np.array(["early", "mid", "mid", "late"], object)[layer],
            "location": rng.choice(LOCATIONS, count).astype(object), "kind": "bitflip", "bit": bit,
            "index_head": rng.integers(0, 4, count), "bits_before": "0x3f800000", "sampling_weight": 1.0,
            "scope": "full", "local_change": np.nan, "baseline_loss": 1.5,
            "loss_diff": np.where(outcome == "nonfinite", np.nan, loss), "outcome": outcome,
            "violation_detected": seen, "effective": True, "detectors": np.where(seen, "S_row;s@w", "").astype(object),
            "oracle_detectors": "", "unproved_detectors": "",
            "epsilon": epsilon, "epsilon_lower": epsilon - rng.uniform(0, 1, count),
            "epsilon_upper": epsilon + rng.uniform(0, 1, count), "epsilon_margin": rng.normal(0.1, 0.1, count),
            "injection_seconds": rng.uniform(0.001, 0.002, count), "bounds_seconds": 5e-4, "detection_seconds": 2e-4,
            "correction_seconds": np.nan, "execution": "rows",
        }
    )  # fmt: skip
    runs = runs.assign(**fixed)
    whole = dict.fromkeys(("bit", "index_head", "layer", "batch_index"), "Int64")
    repeated = dict.fromkeys(("campaign", "model", "dtype", "location", "kind", "outcome", "layer_depth"), "category")
    return runs.astype(
        {**whole, **repeated, "violation_detected": "boolean", "effective": "boolean", "scope": "category"}
    )


def synthetic_clean() -> pd.DataFrame:
    """Return what three detectors said of two fault-free passes."""
    rows = [(baseline, name) for baseline in ("a", "b") for name in DETECTORS]
    return pd.DataFrame(rows, columns=["baseline", "detector"]).assign(
        tolerance=0.0, layer=0, module="m", proved=True, applicable=True, reason=None, rows_checked=1000, violations=0,
        largest_ratio=0.1, campaign="synthetic",
    )  # fmt: skip


def synthetic_propagation(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the change behind each block from the injected one to the fourth, for every run."""
    layers = runs["layer"].to_numpy(int)
    parts = []
    for block in range(4):
        reached = runs[layers <= block]
        growth = 2.0 ** (block - layers[layers <= block])
        change = reached["loss_diff"].abs().to_numpy(float) * growth
        parts.append(reached[["run_id"]].assign(layer=block, campaign="synthetic", relative_change=change))
    return pd.concat(parts, ignore_index=True).astype({"campaign": "category", "layer": "Int64"})


def synthetic_tables(count: int = 600, **fixed: Any) -> dict[str, pd.DataFrame]:
    """Return all tables that figures need."""
    runs = synthetic_runs(count, **fixed)
    return {"runs": runs, "clean": synthetic_clean(), "propagation": synthetic_propagation(runs)}
