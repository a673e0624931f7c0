"""Find a detector by its name.

Public names: ``register_detector``, ``get_detector``, ``list_detectors``.

>>> from bounds import get_detector, list_detectors
>>> "s@w" in list_detectors(), get_detector("q@o").cost
(True, 'n + d')
>>> get_detector("s@v")                                                 # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
ValueError: detector: got 's@v', allowed KV, ...; did you mean 's@w'?
"""

from __future__ import annotations

import difflib
from typing import TypeVar

from bounds.core.detector import Detector

_DETECTORS: dict[str, type[Detector]] = {}

DetectorClass = TypeVar("DetectorClass", bound=type[Detector])


def register_detector(detector: DetectorClass) -> DetectorClass:
    """Make a Detector class available under its ``name``; use it as a class decorator.

    Raises:
        ValueError: when the name is taken, or an oracle's name does not start with ``oracle_`` (or another's does).
    """
    name = detector.name
    if name in _DETECTORS:
        raise ValueError(f"detector: the name {name!r} is taken by {_DETECTORS[name].__qualname__}")
    if detector.oracle != name.startswith("oracle_"):
        raise ValueError(
            f"detector: {name!r} with oracle = {detector.oracle}; exactly the oracles' names start with 'oracle_'"
        )
    _DETECTORS[name] = detector
    return detector


def list_detectors() -> tuple[str, ...]:
    """Return the names of all registered detectors, sorted."""
    return tuple(sorted(_DETECTORS))


def get_detector(name: str, tolerance: float = 0.0) -> Detector:
    """Return a new detector.

    Args:
        name: one of ``list_detectors()``.
        tolerance: allowance that is added to the proved tolerances, in the detector's own units.

    Raises:
        ValueError: for an unknown name or an invalid tolerance.
    """
    if name not in _DETECTORS:
        close = difflib.get_close_matches(name, _DETECTORS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"detector: got {name!r}, allowed {', '.join(list_detectors())}{hint}")
    return _DETECTORS[name](tolerance)


def is_oracle(name: str) -> bool:
    """Whether a detector of this name reads the fault-free pass."""
    return name.startswith("oracle_")
