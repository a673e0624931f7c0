"""Checksum deviations of the two matrix products of attention, as published checkers form them, and one joint verdict.

    columns, rows = score_deviations(state)              # of scores = factor QK^T + addend
    columns, rows = output_deviations(state)             # of out = mass V

A deviation is the sum over a column (or row) of the stored product minus the same sum formed from its operands (Huang,
Abraham, "Algorithm-Based Fault Tolerance for Matrix Operations", IEEE Transactions on Computers C-33(6), 1984). It is 0
in real numbers; what rounding makes of it has no bound here, unlike in the detectors with theorems.

>>> q, k = torch.tensor([[1.0], [2.0]]).view(1, 1, 2, 1), torch.tensor([[3.0], [4.0]]).view(1, 1, 2, 1)
>>> scores = q @ k.mT
>>> scores[0, 0, 1, 0] += 10.0                                          # a fault
>>> state = AttentionState(query=q, key=k, value=k, scores=scores, logits=scores, weights=scores, out=k,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> [deviations.flatten().tolist() for deviations in score_deviations(state)]
[[10.0, 0.0], [0.0, 10.0]]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Verdict, extreme
from bounds.core.row_check import RowCheck, judged
from bounds.epsilon.bounds import visible_keys
from bounds.products.product_detector import required


def seen_rows(state: AttentionState) -> Tensor | None:
    """Return which query rows see any key, (B, H, T) bool; None where all do."""
    visible = visible_keys(state.visible, state.logits.shape)
    if visible is None:
        return None
    seen = visible.any(-1)
    return None if bool(seen.all()) else seen.expand(state.rows)


def written_rows(state: AttentionState, tensor: Tensor) -> Tensor:
    """Return a (B, H, T, ...) tensor with 0 in the rows that see no key: softmax is not defined there."""
    seen = seen_rows(state)
    return tensor if seen is None else tensor.masked_fill(~seen.unsqueeze(-1), 0.0)


@torch.no_grad()
def score_deviations(state: AttentionState) -> tuple[Tensor, Tensor]:
    """Return the deviations of the columns, (B, H, S), and rows, (B, H, T), of ``state.scores``; float64.

    Raises:
        ValueError: when the state carries no scores.
    """
    query, key, scores = state.query.double(), state.key.double(), required(state, "scores").double()
    columns = scores.sum(-2) - state.score_factor * _times(query.sum(-2, keepdim=True), key.mT).squeeze(-2)
    rows = scores.sum(-1) - state.score_factor * _times(query, key.sum(-2).unsqueeze(-1)).squeeze(-1)
    if state.score_addend is not None:
        addend = state.score_addend.double().expand(scores.shape)
        columns, rows = columns - addend.sum(-2), rows - addend.sum(-1)
    return columns, rows


@torch.no_grad()
def output_deviations(state: AttentionState) -> tuple[Tensor, Tensor]:
    """Return the deviations of the columns, (B, H, D_v), and rows, (B, H, T), of ``state.out``; float64.

    Rows of queries that see no key are left out: softmax is not defined on them, they may hold NaN.

    Raises:
        ValueError: when the state carries no mass.
    """
    mass, out = (written_rows(state, tensor.double()) for tensor in (required(state, "mass"), state.out))
    value = state.value.double()
    columns = out.sum(-2) - _times(mass.sum(-2, keepdim=True), value).squeeze(-2)
    rows = out.sum(-1) - _times(mass, value.sum(-1, keepdim=True)).squeeze(-1)
    return columns, rows


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of a (B, H, m, p) and a (B, H_kv, p, r) tensor, head by head, without repeating the second."""
    batch, heads, rows, inner = left.shape
    groups = heads // right.shape[1]
    grouped = left.reshape(batch, right.shape[1], groups * rows, inner) @ right
    return grouped.view(batch, heads, rows, right.shape[-1])


def joint_verdict(name: str, checks: Mapping[str, RowCheck], allowance: float = 0.0) -> Verdict:
    """Return one verdict on several sets of rows; ``detail`` names the sets that fired.

    Args:
        name: of the detector.
        checks: by what was checked, in the order of the computation. Positions are those of the first that fires.
        allowance: what the user adds to every tolerance.
    """
    verdicts = {what: judged(name, check, allowance=allowance) for what, check in checks.items()}
    fired = {what: verdict for what, verdict in verdicts.items() if verdict.fired}
    return Verdict(
        detector=name,
        rows_checked=sum(verdict.rows_checked for verdict in verdicts.values()),
        violations=sum(verdict.violations for verdict in fired.values()),
        nonfinite=sum(verdict.nonfinite for verdict in fired.values()),
        positions=next(iter(fired.values())).positions if fired else (),
        largest_ratio=extreme(torch.max, *(verdict.largest_ratio for verdict in verdicts.values())),
        detail=", ".join(f"{what}: {verdict.violations}" for what, verdict in fired.items()),
    )
