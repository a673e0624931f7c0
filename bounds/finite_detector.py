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

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Detector, Verdict, first_positions
from bounds.epsilon.bounds import visible_keys
from bounds.numerics.blocks import row_blocks
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

    per_group = True

    @property
    def propagates(self) -> bool:
        """It also fires after a fault: a correct evaluation of a non-finite input gives a non-finite output."""
        return True

    @torch.no_grad()
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Count the rows of all tensors that are not finite."""
        rows_checked, positions, details = 0, [], []
        for name, bad, checked in _nonfinite_rows(state):
            rows_checked += getattr(state, name)[..., 0].numel() if checked is None else int(checked.sum())
            if bad is None or not len(rows := bad.nonzero()):
                continue
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

    @torch.no_grad()
    def check_each(self, state: AttentionState, baseline: Any = None) -> list[Verdict]:
        """Count the rows of each sequence, all at once."""
        sequences = state.rows[0]
        if (refused := self.refused(state, baseline)) is not None:
            return [refused] * sequences
        found = torch.zeros((2, sequences), dtype=torch.int64, device=state.out.device)
        for name, bad, checked in _nonfinite_rows(state):
            found[0] += getattr(state, name)[0, ..., 0].numel() if checked is None else checked.flatten(1).sum(1)
            if bad is not None:
                found[1] += bad.flatten(1).sum(1)
        return [Verdict(self.name, rows, broken, broken) for rows, broken in found.mT.tolist()]


def _nonfinite_rows(state: AttentionState) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Yield for each tensor its name, which rows are not finite (None: none), and which were checked (None: all)."""
    visible = visible_keys(state.visible, state.logits.shape)
    sees = None if visible is None else visible.any(-1).expand(state.rows)
    for name in ("query", "key", "value"):
        yield name, _broken(getattr(state, name), None), None
    for name in ("scores", "logits"):
        if (tensor := getattr(state, name)) is not None:
            yield name, _broken(tensor, _columns(visible, tensor.shape[-1])), None
    for name in ("weights", "out"):
        bad = _broken(getattr(state, name), None)
        yield name, bad if bad is None or sees is None else bad & sees, sees


def _columns(visible: Tensor | None, keys: int) -> Tensor | None:
    # The score product has no sink columns; the softmax appends them after the keys.
    return visible if visible is None or visible.shape[-1] == 1 else visible[..., :keys]


def _broken(tensor: Tensor, visible: Tensor | None) -> Tensor | None:
    """Return which rows of ``tensor`` hold a non-finite visible entry; None if no entry is non-finite."""
    # One pass settles a clean tensor; NaN and infinities show in the extremes.
    if not tensor.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        return None
    bad = torch.empty(tensor.shape[:-1], dtype=torch.bool, device=tensor.device)
    for block in row_blocks(tuple(bad.shape), tensor.shape[-1]):
        bad[block] = ~torch.isfinite(tensor[block].abs().amax(-1))
    if visible is not None:
        # Only in the rows found does it matter which keys are hidden.
        rows = bad.nonzero(as_tuple=True)
        seen = visible.expand(tensor.shape)[rows]
        bad[rows] = ~torch.isfinite(torch.where(seen, tensor[rows], 0.0)).all(-1)
    return bad
