"""The detectors of the score product: what multiplied queries and keys returned their product.

| name | what must hold | rows |
|---|---|---|
| ``S_row`` | a row of scores sums to ``factor q_i . (sum_j k_j)`` | (batch, head, query) |
| ``S_col`` | a column of scores sums to ``factor k_j . (sum_i q_i)`` | (batch, head, key) |
| ``S_tile`` | ``S_row`` tile by tile of 32 keys | (batch, head, query, tile) |
| ``S_cs`` | no score is larger than the lengths of its query and key allow | (batch, head, query) |

They read every score, masked ones included, before scale, cap, bias and mask: a wrong entry is a wrong product whether
or not somebody hides it later. They see faults of the product and of its stored scores and nothing else: a query or
key that is wrong before the product has right scores (docs/theory.md, T9).

>>> import torch
>>> query, key = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 3, 4)
>>> scores = query @ key.mT
>>> scores[0, 0, 1, 2] += 0.5                                                    # a fault
>>> state = AttentionState(query=query, key=key, value=key, logits=scores, weights=scores, out=query, scores=scores,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> ScoreRows().check(state).positions, ScoreColumns().check(state).positions
(((0, 0, 1),), ((0, 0, 2),))
"""

from __future__ import annotations

from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck
from bounds.products import score_sums
from bounds.products.product_detector import ProductDetector, required
from bounds.registry import register_detector

TILE = 32
"""Number of keys of a tile of ``S_tile``."""


def score_rows(state: AttentionState) -> RowCheck:
    """Return the check of the rows of the scores, (B, H, T) (F6), for ``state.derived``."""
    return score_sums.row_sums(*_product(state))


def score_columns(state: AttentionState) -> RowCheck:
    """Return the check of the columns of the scores, (B, H, S) (F6), for ``state.derived``."""
    return score_sums.column_sums(*_product(state))


def score_tiles(state: AttentionState) -> RowCheck:
    """Return the check of tiles of the scores, (B, H, T, tiles) (F6), for ``state.derived``."""
    return score_sums.tile_sums(*_product(state), width=TILE)


def score_lengths(state: AttentionState) -> RowCheck:
    """Return the check of the scores' size, (B, H, T) (F7), for ``state.derived``."""
    return score_sums.length_bound(*_product(state))


def _product(state: AttentionState) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    return state.query, state.key, required(state, "scores"), state.score_factor, state.score_addend


class _ScoreDetector(ProductDetector):
    """Shared by the detectors of the score product."""

    needs = frozenset({"query", "key", "scores"})
    operand = "query"

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the scores cannot be compared with their operands, or None when they can."""
        zero = "the score product multiplies by 0: the scores say nothing of their operands"
        return super().applicable(state) or (zero if state.score_factor == 0 else None)


@register_detector
class ScoreRows(_ScoreDetector):
    """Sums of rows. Units of the residual and of ``tolerance``: score."""

    name = "S_row"
    statement = "sum_j s_ij = factor q_i . (sum_j k_j) + sum_j addend_ij over all keys (T7, F6)"
    cost = "n + d"
    equation = staticmethod(score_rows)


@register_detector
class ScoreColumns(_ScoreDetector):
    """Sums of columns. Units of the residual and of ``tolerance``: score."""

    name = "S_col"
    statement = "sum_i s_ij = factor k_j . (sum_i q_i) + sum_i addend_ij over all queries (T7, F6)"
    cost = "n + d"
    equation = staticmethod(score_columns)


@register_detector
class ScoreTiles(_ScoreDetector):
    """Sums of tiles of 32 keys. Units of the residual and of ``tolerance``: score."""

    name = "S_tile"
    statement = "sum_j s_ij = factor q_i . (sum_j k_j) + sum_j addend_ij over every 32 keys (T7, F6)"
    cost = "n + n d / 32"
    equation = staticmethod(score_tiles)


@register_detector
class ScoreLengths(_ScoreDetector):
    """Cauchy and Schwarz. Units of the residual and of ``tolerance``: length of a query, times the factor."""

    name = "S_cs"
    statement = "|s_ij| <= |factor| |q_i| |k_j| + |addend_ij| (F7)"
    cost = "n + d"
    equation = staticmethod(score_lengths)
