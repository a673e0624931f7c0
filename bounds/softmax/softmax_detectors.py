"""The detectors of the softmax: weights that sum to one, are a distribution, and are that of the logits.

| name | what must hold | cost |
|---|---|---|
| ``W_sum`` | the weights of a row sum to 1, over all columns | n |
| ``W_simplex`` | ``0 <= w <= 1 + tau``; masked weights are exactly 0 | n |
| ``W_elem`` | every weight is ``exp(a_j - a*) / sum exp(a - a*)`` | n exp |
| ``W_kl`` | ``sum w (ln w - a + lse) - sum w + 1 = 0`` | n exp |

They see faults of the softmax and of its stored weights, and nothing else: logits that are wrong have right weights.

>>> import torch
>>> from bounds.core.attention_state import AttentionState
>>> logits, values = torch.tensor([0.3, -1.2, 0.8]).view(1, 1, 1, 3), torch.eye(3).view(1, 1, 3, 3)
>>> weights = torch.softmax(logits, -1)
>>> state = AttentionState(query=logits, key=values, value=values, logits=logits, weights=weights,
...                        out=weights @ values, scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> [WeightSum().check(state).violations, WeightElements().check(state).violations]
[0, 0]
"""

from __future__ import annotations

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck, RowDetector
from bounds.numerics.rounding import MAX_KEYS
from bounds.registry import register_detector
from bounds.softmax.softmax_rows import divergence, elements, simplex
from bounds.softmax.softmax_sums import row_sums, visible_counts


def weight_sums(state: AttentionState) -> RowCheck:
    """Return the check of the rows' sums (F11), for ``state.derived``."""
    return row_sums(state.weights, state.derived(visible_counts))


class _SoftmaxDetector(RowDetector):
    """Shared by the detectors of the softmax. They judge every row with a visible key."""

    per_group = True

    def derive(self, state: AttentionState) -> None:
        """Count the visible keys."""
        state.derived(visible_counts)

    def applicable(self, state: AttentionState) -> str | None:
        """Return why the rounding errors of this softmax have no bound, or None when they have."""
        if (reason := super().applicable(state)) is not None:
            return reason
        keys = state.weights.shape[-1]
        return (
            f"its rows have {keys} keys, and no error bound is proved for more than {MAX_KEYS}"
            if keys > MAX_KEYS
            else None
        )


@register_detector
class WeightSum(_SoftmaxDetector):
    """The weights of a row sum to 1. Units of the residual and of ``tolerance``: weight."""

    name = "W_sum"
    needs = frozenset({"weights"})
    statement = "sum_j w_j = 1 over all columns, masked and sink columns included (F11)"
    cost = "n"

    def derive(self, state: AttentionState) -> None:
        """Compute the sums."""
        if self.applicable(state) is None:
            state.derived(weight_sums)

    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return the distance of every sum from 1."""
        return state.derived(weight_sums)


@register_detector
class WeightSimplex(_SoftmaxDetector):
    """No weight is negative or above 1, none is given to a masked key. Units: weight, beyond the limit."""

    name = "W_simplex"
    needs = frozenset({"weights"})
    statement = "0 <= w_j <= 1 + tau, and w_j = 0 exactly where j is masked (F12)"
    cost = "n"

    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return how far every row leaves the simplex."""
        return simplex(state.weights, state.derived(visible_counts), state.visible)


@register_detector
class WeightElements(_SoftmaxDetector):
    """Every weight is the softmax of the row's logits. Units: the proved bound, so that ``tolerance=1`` doubles it."""

    name = "W_elem"
    needs = frozenset({"logits", "weights"})
    statement = "w_j = exp(a_j - a*) / sum_k exp(a_k - a*) for every j (F13)"
    cost = "n exp"

    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return the largest error of every row's weights."""
        return elements(state.logits, state.weights, state.derived(visible_counts))


@register_detector
class WeightDivergence(_SoftmaxDetector):
    """The weights do not diverge from the softmax of the row's logits. Units: nats."""

    name = "W_kl"
    needs = frozenset({"logits", "weights"})
    statement = "sum_j w_j (ln w_j - a_j + lse) - sum_j w_j + 1 = 0 (T1, F14)"
    cost = "n exp"

    def check_rows(self, state: AttentionState) -> RowCheck:
        """Return the divergence of every row's weights."""
        return divergence(state.logits, state.weights, state.derived(visible_counts))
