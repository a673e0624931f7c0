"""The expected cost of a run, from the configuration alone. The unit is arbitrary: only ratios of costs mean something.

    run_costs(plan)          # (runs,) int64

Shards are balanced by cost, so every worker must compute the same number on any machine. Therefore the cost uses
neither the model nor a clock. It counts rows times blocks, as "The floor" in docs/performance.md does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.config import ExperimentConfig
from experiments.plan.plan import Plan, classes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEAD_BLOCKS = 5
"""The head costs as much as this many blocks: V / (12 D) = 5.4 in GPT-2, about half of a run."""


def run_costs(plan: Plan) -> NDArray[np.int64]:
    """Return the expected cost of every run, in the order of the plan; at least 1."""
    # Imported here: one shard has all runs, whatever they cost.
    import numpy as np

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
    """Return all layers that the axis of layers names. The model may have more, which the configuration cannot tell."""
    values = plan.config.sweep.get("fault.layers") or []
    return [layer for value in values for layer in ([value] if isinstance(value, int) else value or ())]


def _point_costs(config: ExperimentConfig, depth: int) -> tuple[int, int]:
    """Return two costs for one grid point: of a run that stays at its site, and of a run that is propagated."""
    length, sequences = config.data.seq_len, config.data.batch_size
    layers = config.fault.layer_list()
    behind = (depth - min(layers)) if layers else (depth + 1) // 2
    if config.run.engine == "plain":
        # The plain engine computes the whole model for every sequence, whichever layer is hit.
        return (2 * sequences * length * (depth + HEAD_BLOCKS),) * 2
    # Many faults at their sites share one pass over one group of heads each.
    return max(1, length // 8), length * (behind + HEAD_BLOCKS)
