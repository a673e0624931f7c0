"""Find a detector by its name.

The table says which module registers which names; a module is loaded when one of its detectors is asked for. To add a
detector to this package, decorate its class with ``register_detector`` and name it in ``BUILT_IN``.

>>> from bounds import get_detector, list_detectors
>>> "s@w" in list_detectors(), get_detector("q@o").cost
(True, 'n + d')
>>> get_detector("s@v")                                                 # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
ValueError: detector: got 's@v', allowed KV, ...; did you mean 's@w'?
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from fault_injection.names import nearest

if TYPE_CHECKING:
    from bounds.core.detector import Detector

BUILT_IN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "bounds.finite_detector": {
            "finite": "n + d",
        },
        "bounds.projections.projection_detectors": {
            "P_q": "D + d",
            "P_k": "D + d",
            "P_v": "D + d",
            "P4_q": "D d / 4",
            "P4_k": "D d / 4",
            "P4_v": "D d / 4",
        },
        "bounds.ranges.range_detectors": {
            "rng_q": "d, compare only",
            "rng_k": "d, compare only",
            "rng_v": "d, compare only",
            "s_stat": "n, compare only",
        },
        "bounds.products.score_detectors": {
            "S_row": "n + d",
            "S_col": "n + d",
            "S_tile": "n + n d / 32",
            "S_cs": "n + d",
        },
        "bounds.products.output_detectors": {
            "O_row": "n + d",
            "O4_row": "n d / 4",
            "O_col": "n + d",
            "O_hull": "d",
            "O_norm": "d",
            "KV": "n + d",
        },
        "bounds.products.element_detectors": {
            "P1_q": "D d",
            "P1_k": "D d",
            "P1_v": "D d",
            "S_elem": "n d",
            "O_elem": "n d",
        },
        "bounds.softmax.softmax_detectors": {
            "W_sum": "n",
            "W_simplex": "n",
            "W_elem": "n exp",
            "W_kl": "n exp",
        },
        "bounds.epsilon.epsilon_detectors": {
            "s@w": "n",
            "s@w_tight": "n exp",
            "q@o": "n + d",
            "comb": "n + d",
            "oracle_s@w": "n, and a second pass",
            "oracle_q@o": "n + d, and a second pass",
            "oracle_comb": "n + d, and a second pass",
        },
        "bounds.fused.fused_detectors": {
            "lse_bounds": "d",
            "lse_key": "d",
            "fused_norm": "d",
            "fused_hull": "d",
            "fused_sum": "d, and 2 columns (4 in half formats) in the kernel",
            "fused_kv": "d",
        },
        "bounds.published.attnchecker": {
            "attnchecker": "n + d",
        },
        "bounds.published.ranger": {
            "ranger": "n + d",
        },
        "bounds.published.realm": {
            "realm": "n + d",
        },
        "bounds.published.flash_abft": {
            "flash_abft": "n exp",
        },
    }
)
"""By module, the detectors that it registers, and what each costs (``Detector.cost``)."""

_PLACES = {name: module for module, costs in BUILT_IN.items() for name in costs}
_CLASSES: dict[str, type[Detector]] = {}

DetectorClass = TypeVar("DetectorClass", bound="type[Detector]")


def register_detector(detector: DetectorClass) -> DetectorClass:
    """Make a Detector class available under its ``name``; use it as a class decorator.

    Raises:
        ValueError: when the name is taken, or an oracle's name does not start with ``oracle_`` (or another's does).
    """
    name = detector.name
    if name in _CLASSES or _PLACES.get(name, detector.__module__) != detector.__module__:
        owner = _CLASSES[name].__qualname__ if name in _CLASSES else _PLACES[name]
        raise ValueError(f"detector: the name {name!r} is taken by {owner}")
    if detector.oracle != is_oracle(name):
        raise ValueError(
            f"detector: {name!r} with oracle = {detector.oracle}; exactly the oracles' names start with 'oracle_'"
        )
    _CLASSES[name] = detector
    return detector


def unregister_detector(name: str) -> None:
    """Undo ``register_detector``; ``KeyError`` for a name that was not registered."""
    del _CLASSES[name]


def list_detectors() -> tuple[str, ...]:
    """Return the names of all detectors, sorted; loads none of them."""
    return tuple(sorted({*_PLACES, *_CLASSES}))


def cost_of(name: str) -> str:
    """Return ``Detector.cost`` of a detector, without loading it; an empty text for a name that nobody registered."""
    if name in _CLASSES:
        return _CLASSES[name].cost
    return BUILT_IN[_PLACES[name]][name] if name in _PLACES else ""


def is_oracle(name: str) -> bool:
    """Whether a detector of this name reads the fault-free pass."""
    return name.startswith("oracle_")


def get_detector(name: str, tolerance: float = 0.0) -> Detector:
    """Return a new detector.

    Args:
        name: one of ``list_detectors()``.
        tolerance: allowance that is added to the proved tolerances, in the detector's own units.

    Raises:
        ValueError: for an unknown name or an invalid tolerance.
    """
    if name not in _CLASSES:
        if name not in _PLACES:
            allowed = list_detectors()
            raise ValueError(f"detector: got {name!r}, allowed {', '.join(allowed)}{nearest(name, allowed)}")
        importlib.import_module(_PLACES[name])
    return _CLASSES[name](tolerance)
