"""The sum of every row of softmax weights, over all columns: it must be 1.

    check = row_sums(weights, visible_counts(state))       # RowCheck; judged("W_sum", check).violations is 0, by proof

A masked column has weight exactly 0 in a correct pass, so the sum needs no mask, and a fault that gives a masked key a
weight is seen. The tolerance depends on the number of visible keys and on the format alone, never on the data.

>>> logits = torch.tensor([[0.3, -torch.inf, -torch.inf], [0.3, 1.0, -2.0]])
>>> weights, n = torch.softmax(logits, -1), torch.tensor([1, 3])
>>> check = row_sums(weights, n)
>>> bool((check.residual <= check.tolerance).all()), bool((check.tolerance < 2e-6).all())
(True, True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck
from bounds.numerics.blocks import BLOCK_ELEMENTS, row_blocks
from bounds.numerics.chain import lambert_table
from bounds.numerics.rounding import softmax_error


@torch.no_grad()
def row_sums(weights: Tensor, n: Tensor) -> RowCheck:
    """Return ``|sum_j w_j - 1|`` of every row against its proved bound (docs/theory.md, F11).

    Args:
        weights: (..., T, S) as the softmax stored them, all columns, a sink's included; in any supported dtype.
        n: int64, number of visible keys, broadcastable to (..., T). Rows with n = 0 are not checked.

    Returns:
        RowCheck with residuals (..., T), float64.

    Raises:
        ValueError: for a dtype without an error model.
    """
    spread = largest_spread(n)
    # In float64 the checker's own sum is no more precise than the one it checks: 2 n roundings, as sum w < 2.
    tolerance = softmax_error(n, spread, weights.dtype).row_sum(spread, n) + 2.0**-52 * (n + 2)
    residual = torch.empty(weights.shape[:-1], dtype=torch.float64, device=weights.device)
    # The sum makes one temporary, so a larger block fits the cache, and fewer calls are made.
    for block in row_blocks(tuple(residual.shape), weights.shape[-1], 2 * BLOCK_ELEMENTS):
        torch.sum(weights[block], -1, dtype=torch.float64, out=residual[block])
    return RowCheck(residual.sub_(1).abs_(), tolerance, n > 0)


def visible_counts(state: AttentionState) -> Tensor:
    """Return the number of visible keys of each row, int64, (1 or B, 1 or H, 1 or T): as small as the mask allows.

    For ``state.derived``. A sink column counts as a key; without a mask every row sees every column.
    """
    columns = state.logits.shape[-1]
    if state.visible is None:
        return torch.full((1, 1, 1), columns, dtype=torch.int64, device=state.logits.device)
    visible = state.visible.reshape((1,) * (4 - state.visible.ndim) + tuple(state.visible.shape))
    counts = visible.sum(-1)
    return counts if visible.shape[-1] == columns else counts * columns


def largest_spread(n: Tensor) -> Tensor:
    """Return W0((n - 1) / e), float64: no row of n keys has a larger ``E = sum_j w_j delta_j`` (docs/theory.md, T2)."""
    return lambert_table(int(n.max()) if n.numel() else 1, n.device)[n]
