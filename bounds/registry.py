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

BUILT_IN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bounds.finite_detector": ("finite",),
        "bounds.projections.projection_detectors": ("P_q", "P_k", "P_v", "P4_q", "P4_k", "P4_v"),
        "bounds.ranges.range_detectors": ("rng_q", "rng_k", "rng_v", "s_stat"),
        "bounds.products.score_detectors": ("S_row", "S_col", "S_tile", "S_cs"),
        "bounds.products.output_detectors": ("O_row", "O4_row", "O_col", "O_hull", "O_norm", "KV"),
        "bounds.products.element_detectors": ("P1_q", "P1_k", "P1_v", "S_elem", "O_elem"),
        "bounds.softmax.softmax_detectors": ("W_sum", "W_simplex", "W_elem", "W_kl"),
        "bounds.epsilon.epsilon_detectors": (
            *("s@w", "s@w_tight", "q@o", "comb"),
            *("oracle_s@w", "oracle_q@o", "oracle_comb"),
        ),
        "bounds.fused.fused_detectors": (
            *("lse_bounds", "lse_key", "fused_norm", "fused_hull", "fused_sum", "fused_kv"),
        ),
        "bounds.published.attnchecker": ("attnchecker",),
        "bounds.published.ranger": ("ranger",),
        "bounds.published.realm": ("realm",),
        "bounds.published.flash_abft": ("flash_abft",),
    }
)
"""By module, the names of the detectors that it registers."""

_PLACES = {name: module for module, names in BUILT_IN.items() for name in names}
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
