"""Shards: the runs of a plan that one worker does.

>>> from experiments.plan.plan import make_plan
>>> plan = make_plan(ExperimentConfig(name="bits", num_runs=4, sweep={"fault.bit": [3, 30]}))
>>> shards = [parse_shard(text, environment={}) for text in ("1/3", "2/3", "3/3")]
>>> runs = [run for shard in shards for run in shard_of(plan, shard)]       # each in the best order of execution
>>> len(runs), {run.run_id for run in runs} == {run.run_id for run in plan.runs}
(8, True)

The division depends only on the plan and the number of shards. Every worker finds its part by itself, and finds the
same part when it is submitted again. The division does not depend on finished runs: workers look for rows in the files
of all shards, so a campaign begun with 16 workers can be finished with 4.

Runs of one input share its fault-free pass, its recording and the passes of the fast engine, so a shard gets runs of
few inputs. Within a model, runs are sorted by data set and input, and cut wherever the expected cost (``run_costs``)
reaches the next n-th part. The configuration does not tell how the costs of two models compare, so each model is cut
separately. With a stopping rule whole cells of the grid are assigned instead, the most expensive first.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.config import ExperimentConfig
from experiments.errors import UsageError
from experiments.machine.slurm_task import array_place
from experiments.plan.plan import Plan, PlannedRun, classes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_SHARDS = 100_000
"""The largest number of shards of a campaign."""

HEAD_BLOCKS = 5
"""The head costs as much as this many blocks: V / (12 D) = 5.4 in GPT-2, about half of a run."""


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 1) of ``count``."""

    number: int = 1
    count: int = 1

    @property
    def file_name(self) -> str:
        """Return the stem of the shard's files; a campaign begun with many shards can be finished with few."""
        return f"{self.number:04d}"


def parse_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """Return the shard of ``--shard i/n``, or of the Slurm array task, or the whole campaign.

    Raises:
        UsageError: the text is not ``i/n`` with 1 <= i <= n, or the array variables contradict each other.
    """
    if text is not None:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MOST_SHARDS:
            raise UsageError(f"--shard: got {text!r}, allowed i/n with 1 <= i <= n <= {MOST_SHARDS:,}, e.g. 3/16")
        return Shard(int(match[1]), int(match[2]))
    place = array_place(environment, MOST_SHARDS)
    return Shard() if place is None else Shard(*place)


def shard_of(plan: Plan, shard: Shard) -> list[PlannedRun]:
    """Return the runs of ``shard``, sorted by model and data set, then by input."""
    order = _execution_order(plan)
    mine = _cut(plan, order, shard.count)[order] == shard.number
    return [plan.runs[index] for index in order[mine]]


def shard_numbers(plan: Plan, count: int) -> NDArray[np.int64]:
    """Return the number (1 .. count) of the shard of every run, in the order of the plan: (runs,) int64."""
    return _cut(plan, _execution_order(plan), count)


def _execution_order(plan: Plan) -> NDArray[np.int64]:
    """Return the indices of all runs, sorted by context, input and place in the plan.

    If cells of the grid may end early, runs stay in the order of the plan, cell by cell.
    """
    # Imported here and below: who asks for one shard needs no numpy.
    import numpy as np

    if plan.config.stop.margin is not None:
        return np.lexsort((np.arange(len(plan.runs)), classes_of(plan, "seed", "model.", "data.").number))
    data = classes_of(plan, "data.")
    batches = [config.num_samples // config.batch_size for config in (plan.config_of(run).data for run in data.first)]
    inputs = [run.batch_index(batches[kind]) for run, kind in zip(plan.runs, data.number.tolist(), strict=True)]
    return np.lexsort((np.array(inputs, np.int64), classes_of(plan, "seed", "model.", "data.").number))


def _cut(plan: Plan, order: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the shard of every run. The cost of each model is divided into ``count`` equal parts.

    A run belongs to the part that contains the middle of its cost. The load of a shard then differs from an exact part
    by at most the cost of one run of each model. A cell that may end early is not divided: its own rows decide when it
    ends, so one worker must know them all.
    """
    import numpy as np

    if plan.config.stop.margin is not None:
        return np.repeat(_dealt(plan, count), plan.config.num_runs)
    numbers = np.empty(len(plan.runs), np.int64)
    costs, model = run_costs(plan)[order], classes_of(plan, "model.").number[order]
    for number in np.unique(model):
        chosen = model == number
        ends = np.cumsum(costs[chosen])
        # Integers give the same result on every machine.
        numbers[order[chosen]] = 1 + (2 * ends - costs[chosen]) * count // (2 * ends[-1])
    return numbers


def _dealt(plan: Plan, count: int) -> NDArray[np.int64]:
    """Return the shard of every cell. The most expensive cell is assigned first.

    Each cell goes to the shard with the least load of its model; ties go to the shard with the least total load. The
    cost of a cell is that of all its repeats, because nobody knows yet how many it will need. A cell is not divided, so
    shards beyond the number of cells stay empty. (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969: the
    load of a shard is at most 4/3 of the best possible.)
    """
    import numpy as np

    costs = run_costs(plan).reshape(-1, plan.config.num_runs).sum(axis=1)
    model = classes_of(plan, "model.").number[:: plan.config.num_runs]
    numbers = np.empty(len(costs), np.int64)
    totals = [0] * count
    for kind in np.unique(model).tolist():
        cells = np.flatnonzero(model == kind)
        loads = [(0, total, shard) for shard, total in enumerate(totals)]
        heapq.heapify(loads)
        for cell in cells[np.argsort(-costs[cells], kind="stable")].tolist():
            load, total, shard = loads[0]
            cost = int(costs[cell])
            totals[shard] = total + cost
            heapq.heapreplace(loads, (load + cost, total + cost, shard))
            numbers[cell] = 1 + shard
    return numbers


def run_costs(plan: Plan) -> NDArray[np.int64]:
    """Return the expected cost of every run, in the order of the plan; at least 1.

    The unit is arbitrary: only ratios of costs mean something. Every worker must compute the same number on any
    machine, so the cost uses neither the model nor a clock. It counts rows times blocks, as "The floor" in
    docs/performance.md does.
    """
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
