"""The plan of a campaign: every point of the grid, every repeat, and the identity of each run.

>>> plan = make_plan(ExperimentConfig(name="bits", num_runs=2, sweep={"fault.bit": [3, 30]}))
>>> [(run.repeat, plan.config_of(run).fault.bit) for run in plan.runs]
[(0, 3), (1, 3), (0, 30), (1, 30)]
>>> len({run.run_id for run in plan.runs}), len(plan.runs[0].run_id)        # 16 hex digits
(4, 16)

A run's identity is the BLAKE2b hash of everything that determines the run: model, data, fault, seed, repeat, and every
swept value. It does not depend on the order of the grid, the shards, the output folder, or the number of repeats. So a
campaign with more repeats contains the runs of a campaign with fewer. Detectors watch a run and do not determine it:
two campaigns that differ only in detectors inject the same faults.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from experiments.config import ExperimentConfig
from experiments.config.building import known_fields, replaced
from experiments.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEPT_CONFIGS = 8192
"""The largest number of configurations of grid points that a plan keeps in memory."""

DETERMINING = ("model.", "data.", "fault.")
"""Sections in which every field determines a run (except the device of the model: ``model.device``)."""


def canonical_json(value: Any) -> str:
    """Return the unique JSON text of ``value``: sorted keys, no blanks, floats as ``repr`` writes them."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of a plan.

    Attributes:
        run_id: 16 hex digits.
        index: position in the plan.
        repeat: the number of the repeat at its grid point.
        values: the value of every axis, in the order of ``Plan.axes``.
        draw_id: like ``run_id``, but without swept fields of ``detect`` and ``run``: points of the grid that differ
            only in these fields have the same faults.
    """

    run_id: str
    index: int
    repeat: int
    values: tuple[Any, ...]
    draw_id: str

    def generator(self) -> np.random.Generator:
        """Return the generator from which this run draws everything random."""
        # Imported here: a plan alone needs no numpy.
        import numpy as np

        return np.random.Generator(np.random.Philox(key=int(self.draw_id, 16)))

    def batch_index(self, batches: int) -> int:
        """Return the index of the run's batch, from 0 to ``batches`` - 1. It is the run's first draw."""
        return int(self.generator().integers(batches))


@dataclass(frozen=True)
class Plan:
    """All runs of a campaign, in a fixed order: grid points in the order of the axes, repeats innermost."""

    config: ExperimentConfig
    axes: tuple[str, ...]
    runs: tuple[PlannedRun, ...]
    _configs: dict[str, ExperimentConfig] = field(default_factory=dict, init=False, repr=False, compare=False)

    def config_of(self, run: PlannedRun) -> ExperimentConfig:
        """Return the configuration of one run: the campaign's, with the run's axis values in place.

        Runs of one grid point share one object.
        """
        # Values may be lists, and 1, 1.0 and True are different values: their texts tell them apart.
        key = repr(run.values)
        if key not in self._configs:
            if len(self._configs) >= KEPT_CONFIGS:
                self._configs.clear()
            values = dict(zip(self.axes, run.values, strict=True))
            self._configs[key] = ExperimentConfig.of(replaced(self.config, values))
        return self._configs[key]

    def by_id(self, run_id: str) -> PlannedRun:
        """Return the run with this identity; raise ``UsageError`` if the plan has none."""
        for run in self.runs:
            if run.run_id == run_id:
                return run
        raise UsageError(f"run id: {run_id!r} is not in this plan of {len(self.runs)} runs")


def make_plan(config: ExperimentConfig) -> Plan:
    """Return the plan of ``config``.

    Raises:
        UsageError: a combination of axis values is not allowed, or two points of the grid are the same run.
    """
    axes = tuple(config.sweep)
    _check_combinations(config)
    base = _determining(config)
    runs: list[PlannedRun] = []
    seen: set[str] = set()
    for values in itertools.product(*config.sweep.values()):
        point = {**base, **dict(zip(axes, values, strict=True))}
        drawn = {key: value for key, value in point.items() if not key.startswith(("detect.", "run."))}
        point_hash, drawn_hash = _hash_of(point), None if drawn == point else _hash_of(drawn)
        for repeat in range(config.num_runs):
            run_id = _identity(point_hash, repeat)
            draw_id = run_id if drawn_hash is None else _identity(drawn_hash, repeat)
            if run_id in seen:
                raise UsageError(f"sweep: two runs of the grid are identical ({dict(zip(axes, values, strict=True))})")
            seen.add(run_id)
            runs.append(PlannedRun(run_id, len(runs), repeat, values, draw_id))
    return Plan(config, axes, tuple(runs))


def _hash_of(point: Mapping[str, Any]) -> hashlib.blake2b:
    return hashlib.blake2b(f"{canonical_json(point)}#".encode(), digest_size=32)


def _identity(point: hashlib.blake2b, repeat: int) -> str:
    # A point has hundreds of characters and many repeats: the common beginning is hashed once.
    whole = point.copy()
    whole.update(b"%d" % repeat)
    return whole.hexdigest()[:16]


def _determining(config: ExperimentConfig) -> dict[str, Any]:
    keys = [key for key in known_fields() if key.startswith(DETERMINING) and key != "model.device"]
    if config.detect.correct:
        # Other fields of the section watch a run; this one changes it.
        keys.append("detect.correct")
    return {key: _plain(field_of(config, key)) for key in [*keys, "seed"]}


_OF_CONTEXT = ("model.", "data.")

_CHECKED_TOGETHER = (
    ("data.num_samples", "data.batch_size"),
    ("fault.layers", "fault.layer_mode", "fault.layer_pattern"),
    ("model.dtype", "fault.bit", "fault.location", "fault.kind", "fault.rate", "fault.aim"),
    ("run.engine", "run.reuse_baseline", "run.scope", "run.full_every"),
)
"""Fields that restrict each other."""


def _check_combinations(config: ExperimentConfig) -> None:
    """Refuse values that are allowed alone but not together (such as a bit that one of the swept dtypes lacks)."""
    for group in _CHECKED_TOGETHER:
        axes = [key for key in group if key in config.sweep]
        for values in itertools.product(*(config.sweep[key] for key in axes)):
            replaced(config, dict(zip(axes, values, strict=True)))


def field_of(config: Any, key: str) -> Any:
    """Return the value of a dotted field."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def context_values(plan: Plan, run: PlannedRun) -> str:
    """Return a text that is equal for runs of one model, one data set and one seed."""
    return repr([run.values[i] for i, key in enumerate(plan.axes) if key == "seed" or key.startswith(_OF_CONTEXT)])


@dataclass(frozen=True)
class Classes:
    """Classes of runs that agree on some axes.

    Attributes:
        number: the class of every run, numbered in the order of the plan: (runs,) int64.
        first: the first run of every class.
    """

    number: NDArray[np.int64]
    first: tuple[PlannedRun, ...]


def classes_of(plan: Plan, *prefixes: str) -> Classes:
    """Return the classes of runs whose values agree on every axis that begins with one of ``prefixes``."""
    import numpy as np

    axes = [number for number, key in enumerate(plan.axes) if key.startswith(prefixes)]
    known: dict[str, int] = {}
    first: list[PlannedRun] = []
    numbers = np.empty(len(plan.runs), np.int64)
    for index, run in enumerate(plan.runs):
        numbers[index] = known.setdefault(repr([run.values[axis] for axis in axes]), len(known))
        if len(known) > len(first):
            first.append(run)
    return Classes(numbers, tuple(first))
