"""Named lists of detectors: the name of a suite can be used wherever names of detectors are given.

| suite | purpose |
|---|---|
| ``lite`` | the cheapest checks that see every operator |
| ``full`` | every operator, by rows and by columns |
| ``full-g4`` | ``full`` and sharper sums over groups and tiles, for half precision |
| ``full-g1`` | ``full``, and every element of every product computed again |
| ``epsilon`` | the chain of epsilon |
| ``oracles`` | the chain against the fault-free pass |
| ``competitors`` | published methods to compare with; they have no proofs, and some are calibrated |
| ``fused`` | checks for kernels that show no scores |
| ``all`` | every registered detector, those of users included |

>>> expand(["epsilon", "finite", "q@o"])
('s@w', 'q@o', 'comb', 'finite')
>>> expand(["epsilom"])                                                 # doctest: +ELLIPSIS
Traceback (most recent call last):
    ...
ValueError: detector: got 'epsilom', allowed ...; did you mean 'epsilon'?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from bounds.registry import list_detectors

EVERYTHING = "all"
"""The suite of all registered detectors."""

_LITE = ("finite", "P_q", "P_k", "P_v", "S_row", "W_sum", "W_simplex", "O_row")
_FULL = (*_LITE, "S_col", "W_elem", "O_col", "O_hull", "rng_q", "rng_k", "rng_v", "s_stat", "KV")

SUITES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lite": _LITE,
        "full": _FULL,
        "full-g4": (*_FULL, "P4_q", "P4_k", "P4_v", "O4_row", "S_tile"),
        "full-g1": (*_FULL, "P1_q", "P1_k", "P1_v", "S_elem", "O_elem"),
        "epsilon": ("s@w", "q@o", "comb"),
        "oracles": ("oracle_s@w", "oracle_q@o", "oracle_comb"),
        "competitors": ("attnchecker", "ranger", "realm", "flash_abft"),
        "fused": ("lse_bounds", "lse_key", "fused_hull", "fused_norm", "fused_sum", "fused_kv"),
    }
)
"""By name, the members of the suites that are fixed."""


def suite_names() -> tuple[str, ...]:
    """Return the names of all suites."""
    return (*SUITES, EVERYTHING)


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return the detectors in a list of detectors and suites, each once, in the order of their first occurrence.

    Args:
        names: names of registered detectors and of suites.

    Raises:
        ValueError: for a name that is neither, with the nearest one.
    """
    expanded: dict[str, None] = {}
    for name in names:
        expanded |= dict.fromkeys(_members(name))
    return tuple(expanded)


def _members(name: str) -> tuple[str, ...]:
    registered = list_detectors()
    if name == EVERYTHING:
        return registered
    if name in SUITES:
        return SUITES[name]
    if name in registered:
        return (name,)
    allowed = (*registered, *suite_names())
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"detector: got {name!r}, allowed {', '.join(allowed)}{hint}")
