"""The terms that all bounds of a certificate share: sizes of an attention call, row by row, and its rounding errors.

>>> per_key = torch.tensor([[[1.0, 5.0, 2.0]]])
>>> causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
>>> row_maximum(per_key, causal, 3).tolist()
[[[1.0, 5.0, 5.0]]]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.head_view import mass_of
from bounds.epsilon.bounds import visible_keys
from bounds.numerics.blocks import row_blocks
from bounds.numerics.rounding import Storage, accumulation, cast, gamma, softmax_error, storage
from bounds.softmax.softmax_sums import largest_spread, visible_counts


@dataclass(frozen=True, eq=False)
class CertificateTerms:
    """Sizes and rounding errors of one call; float64, (B, H, T) unless said otherwise.

    Attributes:
        visible: as in the state, of four axes, or None; ``columns`` of the softmax, sinks included.
        checked: bool, rows with a visible key.
        scaling, slope: factors from q.k and from a score to a logit.
        total: bound on the sum of the clean weights after their cast; less 1, on what rounding moves them by, summed.
        cast: what the cast of the weights costs.
        longest_seen, value_radius: of the visible values: the longest, the distance of the farthest from a centre.
        longest_value: (B, H), of all values.
        longest_key, key_radius: of the visible keys: the longest, the largest element of their distance from a centre.
        query_length, largest_query: length and largest element of the query.
        logit_size: largest visible |logit| plus largest visible |scaled score|.
        logit_error, logit_floor: relative and absolute rounding of a logit, given its score.
        score_error, score_growth: storage of a score; rounding of its product.
        passes: how many roundings of a logit a fault in one score can bring into play: 2, or 4 where the whole row is
            computed anew.
        product_growth: gamma of the value product.
        products: rounding of the value product, clean and faulty pass together, without what grows with the change.
        out_error: storage of the output.
    """

    visible: Tensor | None
    columns: int
    checked: Tensor
    scaling: float
    slope: float
    total: Tensor
    cast: Storage
    longest_seen: Tensor
    value_radius: Tensor
    longest_value: Tensor
    longest_key: Tensor
    key_radius: Tensor
    query_length: Tensor
    largest_query: Tensor
    logit_size: Tensor
    logit_error: float
    logit_floor: float
    score_error: float
    score_growth: float
    passes: int
    product_growth: Tensor
    products: Tensor
    out_error: float


def certificate_terms(state: AttentionState) -> CertificateTerms:
    """Return the terms of a call; O(T S) work and bounded temporary memory."""
    visible, columns = visible_keys(state.visible, state.logits.shape), state.logits.shape[-1]
    counts = visible_counts(state)
    checked, n = (counts > 0).expand(state.rows), counts.clamp(min=1)
    spread = largest_spread(n)
    total = 1 + softmax_error(n, spread, state.weights.dtype).row_sum(spread, n)
    narrowed = _cast(state)
    total = (total * (1 + narrowed.roundoff) + n * narrowed.absolute).expand(state.rows)
    query = state.query.double()
    seen = {name: row_maximum(size, visible, columns) for name, size in _sizes_of_keys(state).items()}
    plain = state.has_bias_or_cap is False
    arithmetic, stored = accumulation(state.logits.dtype), _coarsest(state)
    logit_error = (3 if plain else 8) * arithmetic.roundoff + (1 if plain else 5) * stored.roundoff
    out_arithmetic, out_stored = accumulation(state.out.dtype), storage(state.out.dtype)
    growth = gamma(n.double() + 3, out_arithmetic.roundoff).expand(state.rows)
    scores = state.logits if state.scores is None else state.scores
    value_length = state.per_query_head(_length(state.value))
    return CertificateTerms(
        visible=visible,
        columns=columns,
        checked=checked,
        scaling=abs(state.scaling),
        slope=abs(state.scaling / state.score_factor),
        total=total,
        cast=narrowed,
        longest_seen=seen["value"],
        value_radius=seen["value radius"],
        longest_value=value_length.amax(-1),
        longest_key=seen["key"],
        key_radius=seen["key radius"],
        query_length=query.square().sum(-1).sqrt(),
        largest_query=query.abs().amax(-1),
        logit_size=_logit_size(state, visible),
        logit_error=logit_error,
        logit_floor=32 * (stored.absolute + (state.query.shape[-1] + 8) * arithmetic.underflow),
        score_error=storage(scores.dtype).roundoff,
        score_growth=gamma(state.query.shape[-1] + 3, accumulation(state.query.dtype).roundoff),
        passes=2 if plain and columns == state.key.shape[2] else 4,
        product_growth=growth,
        products=_products(state, growth, total, seen["value"], value_length)
        + 2 * math.sqrt(state.out.shape[-1]) * (out_stored.absolute + (n + 3) * out_arithmetic.underflow),
        out_error=out_stored.roundoff,
    )


def _products(state: AttentionState, growth: Tensor, total: Tensor, seen: Tensor, value_length: Tensor) -> Tensor:
    """Return the rounding of the value product, as it was computed and as a clean pass would have computed it."""
    mass = mass_of(state)
    carried = torch.empty(state.rows, dtype=torch.float64, device=mass.device)
    for block in row_blocks(state.rows, mass.shape[-1]):
        carried[block] = (mass[block].double().abs() @ value_length[block[:2]][..., None])[..., 0]
    stored = storage(state.out.dtype).roundoff
    return growth * (carried + total * seen) + 2 * stored * _length(state.out)


def _cast(state: AttentionState) -> Storage:
    return Storage(0.0, 0.0) if state.mass is None else cast(state.weights.dtype, state.mass.dtype)


def _coarsest(state: AttentionState) -> Storage:
    # Half-precision scores may be scaled and capped before they are widened for the softmax.
    tensors = (state.logits,) if state.scores is None else (state.logits, state.scores)
    stored = [storage(tensor.dtype) for tensor in tensors] + [cast(tensors[-1].dtype, state.logits.dtype)]
    return Storage(max(s.roundoff for s in stored), max(s.absolute for s in stored))


def _length(vectors: Tensor) -> Tensor:
    return vectors.double().square().sum(-1).sqrt()


def _sizes_of_keys(state: AttentionState) -> dict[str, Tensor]:
    """Return sizes (B, H, S'); a sink is a key and a value of zeros."""
    sinks = state.logits.shape[-1] - state.key.shape[2]
    key, value = (F.pad(tensor.double(), (0, 0, 0, sinks)) for tensor in (state.key, state.value))
    centre = (key.amax(2, keepdim=True) + key.amin(2, keepdim=True)) / 2
    sizes = {
        "value": _length(value),
        "value radius": _length(value - value.mean(2, keepdim=True)),
        "key": _length(key),
        "key radius": (key - centre).abs().amax(-1),
    }
    return {name: state.per_query_head(size) for name, size in sizes.items()}


def _logit_size(state: AttentionState, visible: Tensor | None) -> Tensor:
    size = torch.zeros(state.rows, dtype=torch.float64, device=state.logits.device)
    slope = abs(state.scaling / state.score_factor)
    for tensor, factor in ((state.logits, 1.0), (state.scores, slope)):
        if tensor is None:
            continue
        columns = tensor.shape[-1]
        seen = None if visible is None else visible.expand(state.logits.shape)[..., :columns]
        for block in row_blocks(state.rows, columns):
            part = tensor[block] if seen is None else torch.where(seen[block], tensor[block], 0.0)
            size[block] += factor * part.abs().amax(-1).double()
    return size if state.scores is not None else 2 * size


def row_maximum(per_key: Tensor, visible: Tensor | None, columns: int) -> Tensor:
    """Return for every row the largest of the non-negative numbers of its visible keys, (B, H, T or 1).

    Args:
        per_key: (B, H, S).
        visible: bool, broadcastable to (B, H, T, columns), of four axes; None for all.
        columns: of the softmax; those beyond S (sinks) count as 0.
    """
    if visible is None:
        return per_key.amax(-1, keepdim=True)
    keys = per_key.shape[-1]
    shape = (*per_key.shape[:2], visible.shape[-2])
    seen = visible.expand(*shape, columns)[..., :keys]
    largest = torch.empty(shape, dtype=torch.float64, device=per_key.device)
    for block in row_blocks(shape, keys):
        largest[block] = torch.where(seen[block], per_key[block[:2]][..., None, :], 0.0).amax(-1)
    return largest


def weighted_maximum(mass: Tensor, per_key: Tensor) -> Tensor:
    """Return for every row the largest product of |mass| (B, H, T, S) and the number of the key, (B, H, T)."""
    largest = torch.empty(mass.shape[:-1], dtype=torch.float64, device=per_key.device)
    for block in row_blocks(tuple(mass.shape[:-1]), mass.shape[-1]):
        largest[block] = (mass[block].double().abs() * per_key[block[:2]][..., None, :]).amax(-1)
    return largest


def product_slack(terms: CertificateTerms, change: Tensor) -> Tensor:
    """Return how much further apart rounding can move two logits of a row, both passes together.

    Args:
        terms: of the call.
        change: (B, H, T), bound on the change of one logit in real numbers.
    """
    relative = terms.score_error + terms.logit_error
    size = 2 * terms.score_growth * terms.scaling * terms.query_length * terms.longest_key
    size = size + 2 * relative * terms.logit_size + terms.logit_floor
    return 2 * (change * (terms.score_growth + 2 * relative) + size) / (1 - 2 * relative)


def through_softmax(terms: CertificateTerms, spread: Tensor) -> Tensor:
    """Return T26 for logits whose changes differ by at most ``spread`` within a row, with the rounding behind them."""
    moved = torch.where(torch.isfinite(spread), torch.tanh(spread / 4) * 2 * terms.value_radius, math.inf)
    stored = 2 * (terms.total - 1) * terms.longest_seen
    return with_products(terms, moved + stored)


def with_products(terms: CertificateTerms, moved: Tensor) -> Tensor:
    """Return the bound on a row of out whose products of weights and values move by ``moved``."""
    # The last factor covers the float64 arithmetic of this module.
    return (moved + terms.products) / (1 - terms.out_error) * (1 + 2.0**-20)
