"""Count each fault once, define harmful and detected, and weight runs.

>>> runs = pd.DataFrame({"fault_id": ["a", "a", "b"], "scope": ["full", "full", "site"],
...                      "outcome": ["critical", "critical", None]})
>>> faults = distinct_faults(runs)
>>> len(faults), len(propagated(faults))          # two faults; the outcome of one was measured at the model's output
(2, 1)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from experiments.errors import UsageError, nearest
from experiments.tables.schema import HARMFUL

MEASURES = ("detected", "harmful")
"""The measures that a rate can have, and their faults: all distinct ones, or only propagated ones."""

OUTCOME_AXES = ("detect.critical_loss", "detect.correct")
"""The fields of ``detect`` that change the effect of a fault or the name of its outcome."""


def require_columns(frame: pd.DataFrame, names: Iterable[str]) -> None:
    """Raise ``UsageError`` for the first name that is not a column of the frame."""
    for name in names:
        if name not in frame.columns:
            held = ", ".join(map(str, frame.columns))
            raise UsageError(f"column {name!r}: not in this table, which has {held}{nearest(name, frame.columns)}")


def listed(by: str | Sequence[str] | None) -> list[str]:
    """Return the names to group by as a list; an empty list means one group of everything."""
    return [by] if isinstance(by, str) else list(by or [])


def distinct_faults(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each distinct fault, in the order of the table.

    A fault that was drawn twice is one experiment, done twice. Two experiments differ in the campaign, in a swept field
    of ``detect`` or ``run``, or in ``fault_id``. Of the rows of one fault, a propagated row stays, or else a row with
    an outcome, or else the first.

    All weighted draws (``sampling_weight`` not 1) stay: they are draws with replacement from unequal probabilities, and
    their estimator counts a fault as often as it was drawn.

    Raises:
        UsageError: weights are wrong, or all are 0.

    >>> runs = pd.DataFrame({"fault_id": ["a", "a", "b"], "scope": ["site", "full", "site"],
    ...                      "outcome": [None, "benign", None]})
    >>> distinct_faults(runs).index.tolist()
    [1, 2]
    """
    return _distinct(runs, ())


def outcome_faults(runs: pd.DataFrame, by: Collection[str] = ()) -> pd.DataFrame:
    """Return the distinct propagated faults, each once for all settings of detectors that do not change its outcome.

    Of the swept fields of ``detect`` only those in ``OUTCOME_AXES`` change an outcome, so only these, and the fields in
    ``by``, distinguish experiments.

    >>> runs = pd.DataFrame({"fault_id": ["a", "a"], "scope": "full", "outcome": "benign", "detect.tolerance": [0, 1]})
    >>> len(distinct_faults(runs)), len(outcome_faults(runs)), len(outcome_faults(runs, ["detect.tolerance"]))
    (2, 1, 2)
    """
    idle = [name for name in _detect_axes(runs) if name not in OUTCOME_AXES and name not in by]
    return propagated(_distinct(runs, idle))


def detection_faults(runs: pd.DataFrame, by: Collection[str] = ()) -> pd.DataFrame:
    """Return the distinct faults, if the same detectors checked all of them (or all of each group of ``by``).

    Raises:
        UsageError: runs differ in a field of ``detect`` that is not in ``by``. Then a fault would count once for every
            setting, and the result would describe no setting.
    """
    check_one_setting(runs, by)
    return distinct_faults(runs)


def check_one_setting(runs: pd.DataFrame, by: Collection[str] = ()) -> None:
    """Raise ``UsageError`` if runs differ in a field of ``detect`` that is not in ``by``."""
    for axis in _detect_axes(runs):
        values = [] if axis in by else runs[axis].dropna().unique()
        if len(values) > 1:
            given = ", ".join(map(str, values[:4]))
            raise UsageError(
                f"{axis}: got runs with {given}, allowed runs of one value; select them before, or group by {axis}"
            )


def _detect_axes(runs: pd.DataFrame) -> list[str]:
    return [name for name in map(str, runs.columns) if name.startswith("detect.")]


def _distinct(runs: pd.DataFrame, idle: Collection[str]) -> pd.DataFrame:
    """Return one row for each distinct fault; swept fields in ``idle`` do not distinguish experiments."""
    require_columns(runs, ["fault_id", "scope", "outcome"])
    weights = weights_of(runs)
    if weights is not None:
        if not weights.any():
            raise UsageError(f"sampling_weight: got 0 in all {len(runs)} runs, allowed at least one positive")
        return _distinct_draws(runs, idle)
    key = [
        name
        for name in runs.columns
        if name not in idle and (name == "campaign" or str(name).startswith(("detect.", "run.")))
    ]
    known = runs["outcome"].notna().to_numpy(bool)
    preference = np.where(known & (runs["scope"] == "full").to_numpy(bool), 0, np.where(known, 1, 2))
    order = np.argsort(preference, kind="stable")
    repeated = runs[[*key, "fault_id"]].iloc[order].duplicated().to_numpy()
    return runs.iloc[np.sort(order[~repeated])]


def _distinct_draws(runs: pd.DataFrame, idle: Collection[str]) -> pd.DataFrame:
    """Return each weighted draw (a repeat of a grid point) once, ignoring the fields in ``idle``."""
    swept = [name for name in idle if runs[name].nunique(dropna=False) > 1]
    if not swept:
        return runs
    require_columns(runs, ["repeat"])
    known = ("campaign", "seed", "model", "dtype", "source", "location", "kind", "bit", "repeat", "fault_id")
    key = [name for name in runs.columns if name in known or ("." in str(name) and name not in idle)]
    return runs[~runs[key].duplicated().to_numpy()]


def propagated(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose outcome was measured at the model's output: the only fair sample of outcomes.

    >>> runs = pd.DataFrame({"scope": ["site", "full", "full"], "outcome": ["masked", "benign", None]})
    >>> propagated(runs).index.tolist()
    [1]
    """
    require_columns(runs, ["scope", "outcome"])
    return runs[(runs["scope"] == "full").to_numpy(bool) & runs["outcome"].notna().to_numpy(bool)]


def harmful(runs: pd.DataFrame) -> NDArray[np.bool_]:
    """Return, for each run, whether its outcome is critical or nonfinite.

    >>> harmful(pd.DataFrame({"outcome": ["masked", "critical", None]})).tolist()
    [False, True, False]
    """
    require_columns(runs, ["outcome"])
    return runs["outcome"].isin(HARMFUL).to_numpy(bool)


def detected(runs: pd.DataFrame) -> NDArray[np.bool_]:
    """Return, for each run, whether a proved detector fired that sees only the faulty pass.

    >>> detected(pd.DataFrame({"violation_detected": [True, False]})).tolist()
    [True, False]
    """
    require_columns(runs, ["violation_detected"])
    return runs["violation_detected"].to_numpy(bool)


def measured(runs: pd.DataFrame, measure: str, by: Collection[str] = ()) -> tuple[pd.DataFrame, NDArray[np.bool_]]:
    """Return the distinct faults of a measure, and whether each of them counts for it.

    Args:
        runs: runs of one or several campaigns.
        measure: one of ``MEASURES``.
        by: the columns that will make groups; a fault counts in each.

    Raises:
        UsageError: the measure is not one of ``MEASURES``, or ``detected`` is asked of several settings of ``detect``.
    """
    if measure not in MEASURES:
        raise UsageError(f"measure: got {measure!r}, allowed {', '.join(MEASURES)}{nearest(measure, MEASURES)}")
    if measure == "detected":
        faults = detection_faults(runs, by)
        return faults, detected(faults)
    faults = outcome_faults(runs, by)
    return faults, harmful(faults)


def sampling_weights(runs: pd.DataFrame) -> NDArray[np.float64]:
    """Return the weight of each run: ``sampling_weight``, or 1 if a campaign has none.

    Raises:
        UsageError: a weight is missing in some runs, negative, or not finite.
    """
    if "sampling_weight" not in runs.columns or runs["sampling_weight"].isna().all():
        return np.ones(len(runs))
    weights = runs["sampling_weight"].to_numpy(np.float64, na_value=np.nan)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        raise UsageError(f"sampling_weight: got {weights[wrong][0]} in {wrong.sum()} runs, allowed numbers from 0 on")
    return weights


def weights_of(runs: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return the weight of each run, or None if all weights are equal because faults were drawn uniformly."""
    weights = sampling_weights(runs)
    return weights if (weights != 1).any() else None
