r"""Choose the layers into which a run injects faults.

Candidates are all attention layers, the given ``layers``, or those whose module name matches ``pattern`` (both may
be given; then both must agree). ``mode`` picks among them:

    first     the first candidate
    all       every candidate, in one run
    random    one candidate, drawn for each run
    specific  every one of ``layers`` or of the matches (they must be given)

>>> candidate_layers(["h.0.attn", "h.1.attn", "h.2.attn"], pattern=r"h\.[12]")
[1, 2]
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fault_injection.names import nearest

if TYPE_CHECKING:
    import numpy as np

LAYER_MODES = ("first", "all", "random", "specific")


def candidate_layers(
    names: Sequence[str], layers: Sequence[int] | None = None, pattern: str | None = None
) -> list[int]:
    """Return the candidate layers in ascending order.

    Args:
        names: the module names of all attention layers, in order.
        layers: layer numbers; ``None`` for all.
        pattern: a regular expression that is searched in the names.

    Raises:
        ValueError: a layer does not exist, or the expression is not valid or matches nothing (the message lists the
            nearest names).
    """
    for layer in layers or ():
        if not 0 <= layer < len(names):
            raise ValueError(f"fault.layers: got {layer}, allowed 0..{len(names) - 1}")
    if layers is not None and not layers:
        raise ValueError("fault.layers: got an empty list; leave it out to mean every layer")
    candidates = sorted(set(layers)) if layers is not None else list(range(len(names)))
    if pattern is None:
        return candidates
    expression = compiled_pattern(pattern)
    matches = [layer for layer in candidates if expression.search(names[layer])]
    if not matches:
        plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
        close = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
        raise ValueError(
            f"fault.layer_pattern: {pattern!r} matches no attention layer; the nearest are {', '.join(close)}"
        )
    return matches


def compiled_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a layer pattern; raise ``ValueError`` if it is not valid."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"fault.layer_pattern: {pattern!r} is no regular expression: {error}") from error


def choose_layers(candidates: Sequence[int], mode: str, random: np.random.Generator) -> tuple[int, ...]:
    """Return the layers of one run; raise ``ValueError`` for an unknown mode."""
    if mode not in LAYER_MODES:
        raise ValueError(
            f"fault.layer_mode: got {mode!r}, allowed {', '.join(LAYER_MODES)}{nearest(mode, LAYER_MODES)}"
        )
    if not candidates:
        raise ValueError("fault.layers: got no candidate layers; a run without a layer would inject nothing")
    if mode == "first":
        return (candidates[0],)
    if mode == "random":
        return (candidates[int(random.integers(len(candidates)))],)
    return tuple(candidates)
