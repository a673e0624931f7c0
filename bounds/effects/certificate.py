"""Bound the effect of a single fault on the output of an attention call, from the checks of that call (T26).

    certificate = certify(state, FaultChecks(q=p_q, k=p_k, v=p_v, scores=s_row, weights=w_sum, out=o_row))
    certificate.largest_relative            # no row of out is off by more than this share of its length

The checks are equations that one changed element breaks by exactly its error: projections for q, k and v, row sums for
scores, weights and out. If none fires, the error is at most the sum of two tolerances, and T26 turns that into a bound
on every row of the output. It bounds the distance between the stored output and the output that a fault-free pass would
have stored, so it includes the rounding of both passes. A location without a check is not certified, and is reported.

>>> from bounds.products import output_sums

>>> from bounds.products import score_sums
>>> q, k, v = torch.randn(3, 1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
>>> a = q @ k.mT
>>> w = torch.softmax(a, -1)
>>> state = AttentionState(query=q, key=k, value=v, logits=a, scores=a, weights=w, out=w @ v, scaling=1.0,
...                        kv_equal=False, has_bias_or_cap=False)
>>> certificate = certify(state, FaultChecks(scores=score_sums.row_sums(q, k, a),
...                                          out=output_sums.row_sums(w, v, state.out)))
>>> sorted(certificate.bounds), bool((certificate.bounds["scores"] < 1e-3).all())
(['out', 'scores'], True)
>>> certificate.largest_relative, certificate.reason
(None, 'no check covers q, k, v, weights')
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck
from bounds.effects.certificate_terms import certificate_terms
from bounds.effects.forms import CLOSED_FORMS
from bounds.effects.head_view import in_units_of
from bounds.numerics.rounding import reduced_precision
from fault_injection.locations import LOCATION_TABLE

KAPPA = 2.0**-6
"""The rate at which a tolerance may grow with its element: at most two storage roundings of 2^-8, and less than 2^-10
for everything else. A fault can hide this share of its size in its own tolerance."""


@dataclass(frozen=True, eq=False)
class FaultChecks:
    """For each location, the check with a residual that a single changed element moves by exactly its error.

    Residuals are absolute values; (B, H, T) for q, scores, weights and out, (B, H_kv, S) for k and v. One more axis,
    of groups, tiles or elements, is allowed. None where no such check was made.

    Attributes:
        q, k, v: sums of the channels of a projection where nothing lies between it and the attention product
            (``projection_sums.row_sums``); where something does (a rotation), the element-by-element check of that.
        scores: ``score_sums.row_sums`` or ``tile_sums``.
        weights: ``softmax_sums.row_sums``.
        out: ``output_sums.row_sums`` or ``group_sums``.
    """

    q: RowCheck | None = None
    k: RowCheck | None = None
    v: RowCheck | None = None
    scores: RowCheck | None = None
    weights: RowCheck | None = None
    out: RowCheck | None = None


@dataclass(frozen=True, eq=False)
class Certificate:
    """Bounds on the effect of one fault in one element of one location.

    Attributes:
        bounds: by location, float64 (B, H, T): bound on the Euclidean length of the change of each row of out; infinite
            where a check has no finite residual, NaN in rows without a visible key.
        reasons: by location, why there is no bound.
        largest_relative: largest bound of any location in units of the row's length, over all rows; None unless every
            location is certified.
        median_relative: the median over rows of the same.
    """

    bounds: Mapping[str, Tensor]
    reasons: Mapping[str, str]
    largest_relative: float | None
    median_relative: float | None

    @property
    def reason(self) -> str | None:
        """Why the output as a whole is not certified, None when it is."""
        if not self.reasons:
            return None
        uncovered = [location for location, reason in self.reasons.items() if reason == _UNCOVERED]
        parts = [f"no check covers {', '.join(uncovered)}"] if uncovered else []
        others = [f"{location}: {reason}" for location, reason in self.reasons.items() if reason != _UNCOVERED]
        return "; ".join(parts + others)


_UNCOVERED = "no check covers it"


@torch.no_grad()
def certify(state: AttentionState, checks: FaultChecks) -> Certificate:
    """Return bounds on the effect of a single fault on each row of the output (docs/theory.md, T26).

    Args:
        state: the call, faulty or not.
        checks: residuals and tolerances computed on that call. The user's addition to a tolerance does not matter,
            because the bound uses the residual. The bound holds whether or not a check fires.

    Temporary memory is bounded (``bounds.numerics.blocks``).
    """
    terms = certificate_terms(state)
    bounds: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for entry in dataclasses.fields(FaultChecks):
        location, check = entry.name, getattr(checks, entry.name)
        reason = _reason(state, location, check)
        if reason is not None:
            reasons[location] = reason
            continue
        bound = CLOSED_FORMS[location].bound(state, terms, largest_error(check))
        # NaN (an infinite error times nothing) is no bound either.
        bounds[location] = torch.where(terms.checked, torch.where(bound >= 0, bound, math.inf), math.nan)
    largest, median = (None, None) if reasons else _summary(state, bounds, terms.checked)
    return Certificate(bounds, reasons, largest, median)


def _reason(state: AttentionState, location: str, check: RowCheck | None) -> str | None:
    if check is None:
        return _UNCOVERED
    through_softmax = LOCATION_TABLE[location].through_softmax
    if through_softmax and state.has_bias_or_cap is None:
        return "it is not known how the scores become logits"
    if through_softmax and state.has_bias_or_cap and state.scores is None:
        return "the logits have a bias or soft cap, and this state does not carry the scores"
    return reduced_precision(state.query) or reduced_precision(state.value)


def _summary(state: AttentionState, bounds: Mapping[str, Tensor], checked: Tensor) -> tuple[float | None, float | None]:
    length = state.out.double().square().sum(-1).sqrt()
    worst = torch.stack(list(bounds.values())).amax(0)
    relative = in_units_of(worst, length)[checked.expand(worst.shape)]
    return (float(relative.max()), float(relative.median())) if len(relative) else (None, None)


def largest_error(check: RowCheck) -> Tensor:
    """Return the largest error of one element that leaves this residual, one number a row, float64.

    A residual r means that the error is at most r plus the tolerance of the clean call, which is at most that of this
    call plus KAPPA times the error.
    """
    error = (check.residual.clamp(min=0.0) + check.tolerance) / (1 - KAPPA)
    error = torch.where(torch.isfinite(error), error, math.inf)
    if check.checked is not None:
        error = torch.where(check.checked, error, math.inf)
    return error.amax(-1) if error.ndim == 4 else error
