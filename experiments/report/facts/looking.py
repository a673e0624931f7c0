"""The detectors of a point of the grid, and their verdicts on its fault-free passes.

    point = {"detect.detectors": '["lite"]', "detect.tolerance": "0.0"}     # texts of plan.csv
    detectors_of(config.detect, point)           # ("finite", "W_sum", ...)
    clean_of(load_clean(folder), point)          # the rows of clean.csv that belong to this point

If a detector is not used at a point, it missed nothing there: it has no recall, which differs from a recall of 0.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import pandas as pd

from experiments.config.sections import DetectConfig

AXES = ("detect.tolerance", "detect.detectors")
"""The swept fields that decide which rows of ``clean.csv`` belong to a point."""


def detectors_of(config: DetectConfig, point: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the detectors at a point; suites are replaced by their members, classes by their names.

    Args:
        config: the campaign's section, for a point that does not name its own detectors.
        point: swept field -> text of ``plan.csv``; fields other than ``AXES`` are ignored.

    Raises:
        UsageError: a detector is unknown, or a user's class does not load.
    """
    if "detect.detectors" in point:
        config = dataclasses.replace(config, detectors=json.loads(point["detect.detectors"]))
    return config.names()


def clean_of(clean: pd.DataFrame, point: Mapping[str, str]) -> pd.DataFrame:
    """Return the rows of ``clean.csv`` for the detectors of a point, at the point's tolerance.

    A field that is not swept selects nothing: all rows have its one value. Arguments and errors as in ``detectors_of``.
    """
    if "detect.tolerance" in point:
        clean = clean[clean["tolerance"] == json.loads(point["detect.tolerance"])]
    if "detect.detectors" in point:
        clean = clean[clean["detector"].isin(detectors_of(DetectConfig(), point))]
    return clean
