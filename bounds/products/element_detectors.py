"""The checks of every element: each product is computed again in float64.

| name | what must hold | rows |
|---|---|---|
| ``P1_q``, ``P1_k``, ``P1_v`` | every channel of an operand is its projection | (batch, head, query or key, channel) |
| ``S_elem`` | every score is the product of its query and its key | (batch, head, query) |
| ``O_elem`` | every output is the product of the mass and the values | (batch, head, query, channel) |

They are the checks over groups with groups of one, so what is proved of those holds of these. A sum over g elements
that were stored in a half format must allow g roundings; one element allows one, half the distance of neighbouring
numbers, and almost every flip is seen. The price is the work of the products themselves, in float64. Together with
``full`` they are the suite ``full-g1``.

>>> import torch
>>> query, key = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)
>>> scores = query @ key.mT
>>> scores[0, 0, 1, 2] += 0.5                                                    # a fault
>>> state = AttentionState(query=query, key=key, value=key, logits=scores, weights=scores, out=query, scores=scores,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> ScoreElements().check(state).positions
((0, 0, 1),)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import row_blocks
from bounds.numerics.line_sums import LINE_ELEMENTS
from bounds.products import output_sums, score_sums
from bounds.products.output_detectors import OutputGroups
from bounds.products.product_detector import key_counts, required, value_product
from bounds.products.score_detectors import ScoreTiles
from bounds.projections.projection_detectors import KeyProjection, QueryProjection, ValueProjection
from bounds.registry import register_detector


def score_elements(state: AttentionState) -> RowCheck:
    """Return of every row of scores, (B, H, T), the element furthest outside its tolerance (F6)."""
    scores, addend = required(state, "scores"), state.score_addend
    residual, tolerance = (torch.empty(scores.shape[:3], dtype=torch.float64, device=scores.device) for _ in range(2))
    batch, groups, keys, _ = state.key.shape
    share = scores.shape[1] // groups
    # The cut of the rows must not depend on how many groups of heads there are: the bits of the products would.
    for sequences, group, rows in row_blocks((batch, groups, scores.shape[2]), share * keys, LINE_ELEMENTS):
        own = sequences, slice(group.start * share, group.stop * share), rows
        added = None if addend is None else _part(addend, own)
        operands = state.query[own], state.key[sequences, group], scores[own]
        part = _furthest(score_sums.tile_sums(*operands, state.score_factor, added, width=1))
        residual[own], tolerance[own] = part.residual, part.tolerance
    return RowCheck(residual, tolerance)


def _part(addend: Tensor, part: tuple[slice, slice, slice]) -> Tensor:
    """Return the addend of some sequences, heads and rows; an axis of 1 stands for all."""
    addend = addend.reshape((1,) * (4 - addend.ndim) + tuple(addend.shape))
    sizes = addend.shape[:3]
    return addend[tuple(slice(None) if size == 1 else own for size, own in zip(sizes, part, strict=True))]


def _furthest(check: RowCheck) -> RowCheck:
    tolerance = check.tolerance.expand(check.residual.shape)
    # NaN counts as the largest, and an infinite tolerance fires like NaN.
    excess = torch.where(torch.isfinite(tolerance), check.residual - tolerance, torch.nan)
    where = excess.argmax(-1, keepdim=True)
    return RowCheck(check.residual.gather(-1, where)[..., 0], tolerance.gather(-1, where)[..., 0])


def output_elements(state: AttentionState) -> RowCheck:
    """Return the check of every output, (B, H, T, D_v) (F8), for ``state.derived``."""
    mass, out, seen = state.derived(value_product)
    check = output_sums.group_sums(mass, state.value, out, state.derived(key_counts), width=1)
    return replace(check, checked=None if seen is None else seen[..., None])


@register_detector
class QueryElements(QueryProjection):
    """Queries, channel by channel."""

    name = "P1_q"
    group = 1
    statement = "q_c = x.W_c + b_c for every channel, and q is its tail of the projection (F15, F16)"
    cost = "D d"


@register_detector
class KeyElements(KeyProjection):
    """Keys, channel by channel."""

    name = "P1_k"
    group = 1
    statement = "k_c = x.W_c + b_c for every channel, and k is its tail of the projection (F15, F16)"
    cost = "D d"


@register_detector
class ValueElements(ValueProjection):
    """Values, channel by channel."""

    name = "P1_v"
    group = 1
    statement = "v_c = x.W_c + b_c for every channel, and v is its tail of the projection (F15, F16)"
    cost = "D d"


@register_detector
class ScoreElements(ScoreTiles):
    """Scores, one by one. Units of the residual and of ``tolerance``: score."""

    name = "S_elem"
    statement = "s_ij = factor q_i . k_j + addend_ij for every i and j (T7, F6)"
    cost = "n d"
    equation = staticmethod(score_elements)


@register_detector
class OutputElements(OutputGroups):
    """Outputs, one by one. Units of the residual and of ``tolerance``: value."""

    name = "O_elem"
    statement = "o_ic = sum_j w_ij v_jc for every i and c (T7, F8)"
    cost = "n d"
    equation = staticmethod(output_elements)
