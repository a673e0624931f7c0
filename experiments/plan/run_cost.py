"""What a run is expected to cost, from the configuration alone, in units that mean something only beside each other.

    run_costs(plan)          # (runs,) int64

Shards are balanced by it, so every worker must find the same number whatever its machine has: neither the model nor a
clock is asked. The terms are those of "The floor" in docs/performance.md: rows times blocks.

Public names: ``run_costs``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiments.config import ExperimentConfig
from experiments.plan.plan import Plan, classes_of

HEAD_BLOCKS = 5
"""Blocks that cost as much as the head: V / (12 D) = 5.4 in GPT-2; about half of a run there."""


def run_costs(plan: Plan) -> NDArray[np.int64]:
    """Return the expected cost of every run, in the order of the plan; at least 1."""
    layers = _axis_layers(plan) + (plan.config.fault.layer_list() or [])
    depth = 1 + max(layers, default=0)
    classes = classes_of(plan, "data.", "fault.layers", "run.")
    configs = [plan.config_of(run) for run in classes.first]
    at_site, propagated = np.array([_point_costs(config, depth) for config in configs], np.int64).T[:, classes.number]
    repeats = np.array([run.repeat for run in plan.runs], np.int64)
    every = np.array([config.run.full_every or 0 for config in configs], np.int64)[classes.number]
    full = np.array([config.run.scope == "full" for config in configs])[classes.number]
    return np.where(full | ((every > 0) & (repeats % np.maximum(every, 1) == 0)), propagated, at_site)


def _axis_layers(plan: Plan) -> list[int]:
    """Return all layers that the axis of layers names; a deeper model has more, which nobody can know here."""
    values = plan.config.sweep.get("fault.layers") or []
    return [layer for value in values for layer in ([value] if isinstance(value, int) else value or ())]


def _point_costs(config: ExperimentConfig, depth: int) -> tuple[int, int]:
    """Return the cost of a run of one grid point that stays at its site, and of one that is propagated."""
    length, sequences = config.data.seq_len, config.data.batch_size
    layers = config.fault.layer_list()
    behind = (depth - min(layers)) if layers else (depth + 1) // 2
    if config.run.engine == "plain":
        # The whole model for every sequence, whichever layer is hit.
        return (2 * sequences * length * (depth + HEAD_BLOCKS),) * 2
    # Many faults at their sites share one pass over one group of heads each.
    return max(1, length // 8), length * (behind + HEAD_BLOCKS)
