"""The closed forms of one location: four questions about its faults, each answered by one function.

``bounds.effects.forms`` has one module for each location, and the table of them. ``local_effect``, ``severity_terms``,
the atlas and the certificate ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms
from bounds.effects.flips import Flips
from bounds.effects.head_terms import HeadTerms
from bounds.effects.head_view import LogitMap
from bounds.effects.severity_terms import Index, SeverityTerms

Place = tuple[int, int, int, int]
"""Batch, head, row and column of one element."""

Sweep = Callable[[list[HeadTerms], Tensor, int, LogitMap], Flips]


@dataclass(frozen=True)
class ClosedForm:
    """The formulas of one location.

    Attributes:
        name: the location.
        exact: ``exact(state, index, after, logit_map, effect)`` writes the change of out, when one element becomes
            ``after``, into ``effect`` (B, H, T, D_v), which is zero.
        parts: the parts of a call that ``severity`` needs (``severity_terms.PARTS``).
        severity: ``severity(terms, index, added)`` returns how far N candidates move a row of out, relative to it.
        sweeps: by name, ``sweep(readers, before, bit, logit_map)``: the flips of one bit in every element of the tensor
            of one head, read by the query heads ``readers``. The atlas shows each name as a line of its own.
        bound: ``bound(state, terms, error)`` returns how far an error of at most ``error`` can move a row (T26).
    """

    name: str
    exact: Callable[[AttentionState, Place, float, LogitMap, Tensor], None]
    parts: tuple[str, ...]
    severity: Callable[[SeverityTerms, Index, Tensor], Tensor]
    sweeps: Mapping[str, Sweep]
    bound: Callable[[AttentionState, CertificateTerms, Tensor], Tensor]
