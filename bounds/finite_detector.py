"""The detector of NaN and Inf.

A clean pass is finite everywhere a result can come from: queries, keys, values, visible scores and logits, weights and
outputs. Scores and logits at masked positions are not read: an overwritten NaN there is harmless, and one that is
only added to a mask spreads to the weights of its row, where it is seen. Weights are read at masked positions too (they
must be exactly 0), but weights and outputs of rows without a visible key are not: softmax is undefined there.

>>> from bounds import AttentionState, get_detector
>>> zeros = torch.zeros(1, 1, 2, 2)
>>> out = torch.tensor([[0.0, float("nan")], [0.0, 0.0]]).view(1, 1, 2, 2)
>>> state = AttentionState(query=zeros, key=zeros, value=zeros, logits=zeros, weights=zeros + 0.5, out=out,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> verdict = get_detector("finite").check(state)
>>> verdict.violations, verdict.positions, verdict.detail
(1, ((0, 0, 0),), 'out: 1 row')
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bounds.attention_state import AttentionState
from bounds.blocks import row_blocks
from bounds.detector import Detector, Verdict, first_positions
from bounds.epsilon import visible_keys
from bounds.registry import register_detector


@register_detector
class FiniteDetector(Detector):
    """No NaN and no Inf where a result can come from.

    A row is a vector of one tensor along its last axis: (batch, head, query) or (batch, head, key). Positions are
    those of the first tensor that breaks the rule, in the order of the computation; ``detail`` names all of them.
    """

    name = "finite"
    needs = frozenset({"query", "key", "value", "logits", "weights", "out"})
    statement = "query, key, value, visible scores and logits, weights and out are finite (A5)"
    cost = "n + d"

    @torch.no_grad()
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Count the rows of all tensors that are not finite."""
        rows_checked, positions, details = 0, [], []
        for name, bad, checked in _nonfinite_rows(state):
            rows_checked += checked
            rows = bad.nonzero()
            if len(rows):
                positions.append(rows)
                details.append(f"{name}: {len(rows)} row{'s' if len(rows) > 1 else ''}")
        broken = sum(len(rows) for rows in positions)
        return Verdict(
            detector=self.name,
            rows_checked=rows_checked,
            violations=broken,
            nonfinite=broken,
            positions=first_positions(positions[0]) if positions else (),
            detail=", ".join(details),
        )


def _nonfinite_rows(state: AttentionState) -> Iterator[tuple[str, Tensor, int]]:
    """Yield for each tensor its name, which rows are not finite, and how many were checked."""
    visible = visible_keys(state.visible, state.logits.shape)
    sees = None if visible is None else visible.any(-1).expand(state.rows)
    for name in ("query", "key", "value"):
        bad = _broken(getattr(state, name), None)
        yield name, bad, bad.numel()
    for name in ("scores", "logits"):
        if (tensor := getattr(state, name)) is not None:
            bad = _broken(tensor, _columns(visible, tensor.shape[-1]))
            yield name, bad, bad.numel()
    for name in ("weights", "out"):
        bad = _broken(getattr(state, name), None)
        yield name, bad if sees is None else bad & sees, bad.numel() if sees is None else int(sees.sum())


def _columns(visible: Tensor | None, keys: int) -> Tensor | None:
    # The score product has no sink columns; the softmax appends them after the keys.
    return visible if visible is None or visible.shape[-1] == 1 else visible[..., :keys]


def _broken(tensor: Tensor, visible: Tensor | None) -> Tensor:
    """Return which rows of ``tensor`` hold a non-finite visible entry; the largest |entry| of a row tells."""
    bad = torch.zeros(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
    # One pass settles a clean tensor; NaN and infinities show in the extremes.
    if not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        return bad
    seen = None if visible is None else visible.expand(tensor.shape)
    for block in row_blocks(tuple(tensor.shape[:-1]), tensor.shape[-1]):
        part = tensor[block] if seen is None else torch.where(seen[block], tensor[block], 0.0)
        bad[block] = ~torch.isfinite(part.abs().amax(-1))
    return bad
