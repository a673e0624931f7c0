"""The detectors for fused attention kernels, which show queries, keys, values, outputs and lse only.

| name | what must hold |
|---|---|
| ``lse_bounds`` | lse lies between ``alpha q.mean(k) + ln n`` and ``alpha |q| max|k| + ln n`` |
| ``lse_key`` | ``lse >= alpha q.k_j`` for a visible key j |
| ``fused_norm``, ``fused_hull`` | an output is no longer than the longest value, and in the box of the values |
| ``fused_sum`` | the outputs of the appended columns are the sum of the others, and 1 |
| ``fused_kv`` | K = V: ``lse - ln n <= alpha q.o <= lse`` |

They read a ``FusedState``; on an eager ``AttentionState``, which has no lse, they say so. A query, key or value that
was wrong before the kernel started gives a correct call of another input: none of them can see it.

>>> from bounds.fused.fused_attention import fused_attention
>>> query, key, value = torch.ones(3, 1, 1, 2, 4)
>>> state = fused_attention(query, key, value, causal=True)
>>> [detector().check(state).violations for detector in (LseBounds, FusedSum)]
[0, 0]
>>> FusedKeyValue().check(state).reason
'the model does not guarantee that keys and values are equal'
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from bounds.core.detector import Detector, Verdict
from bounds.core.row_check import RowCheck, judged
from bounds.fused.fused_attention import FusedState
from bounds.fused.fused_statistics import key_value, lse_bounds, lse_key, output_hull, output_norm, output_sum
from bounds.numerics.rounding import MAX_KEYS, reduced_precision
from bounds.registry import register_detector


class _FusedDetector(Detector):
    """Shared by the detectors of fused kernels: which rows they check, and what they cannot judge."""

    needs = frozenset({"query", "key", "value", "out", "lse"})
    rows: ClassVar[staticmethod[[FusedState], RowCheck]]

    @torch.no_grad()
    def derive(self, state: Any) -> None:
        """Evaluate the invariant."""
        if self.applicable(state) is None:
            state.derived(type(self).rows)

    def applicable(self, state: Any) -> str | None:
        """Return why the invariant says nothing about ``state``, or None when it applies."""
        if (reason := super().applicable(state)) is not None:
            return reason
        if (keys := state.key.shape[2]) > MAX_KEYS:
            return f"its rows have {keys} keys, and no error bound is proved for more than {MAX_KEYS}"
        return reduced_precision(state.query)

    @torch.no_grad()
    def judge(self, state: Any, baseline: Any) -> Verdict:
        """Judge every row with a visible key."""
        return judged(self.name, state.derived(type(self).rows), allowance=self.tolerance)


@register_detector
class LseBounds(_FusedDetector):
    """Lse lies between its bounds by Jensen and Cauchy-Schwarz. Units: logits."""

    name = "lse_bounds"
    statement = "alpha q.mean(k) + ln n <= lse <= alpha |q| max|k| + ln n (T10, tolerance F18)"
    cost = "d"
    rows = staticmethod(lse_bounds)


@register_detector
class LseKey(_FusedDetector):
    """Lse is no smaller than the logit of one visible key: j = i, or the last that a mask shows. Units: logits."""

    name = "lse_key"
    statement = "lse >= alpha q.k_j for one visible key j, j = i or the last (T11, tolerance F18)"
    cost = "d"
    rows = staticmethod(lse_key)


@register_detector
class FusedNorm(_FusedDetector):
    """No output is longer than the longest visible value. Units: values."""

    name = "fused_norm"
    statement = "|o| <= max_j |v_j| (T12, tolerance F19)"
    cost = "d"
    rows = staticmethod(output_norm)


@register_detector
class FusedHull(_FusedDetector):
    """Every output channel lies between the smallest and the largest visible value. Units: the proved bound."""

    name = "fused_hull"
    statement = "min_j v_jc <= o_c <= max_j v_jc (T12, tolerance F19)"
    cost = "d"
    rows = staticmethod(output_hull)


@register_detector
class FusedSum(_FusedDetector):
    """The kernel's output of the appended columns: the sum of the channels, and 1. Units: the proved bound."""

    name = "fused_sum"
    needs = _FusedDetector.needs | {"appended"}
    statement = "o of column sum_c v_c = sum_c o_c, and o of a column of ones = 1 (T13, tolerance F20)"
    cost = "d, and 2 columns (4 in half formats) in the kernel"
    rows = staticmethod(output_sum)


@register_detector
class FusedKeyValue(_FusedDetector):
    """Where keys are values, query times output is the mean logit. Units: logits."""

    name = "fused_kv"
    statement = "K = V: lse - ln n <= alpha q.o <= lse (T14, tolerance F21)"
    cost = "d"
    rows = staticmethod(key_value)

    def applicable(self, state: Any) -> str | None:
        """Return why the invariant says nothing about ``state``, or None when it applies."""
        if (reason := super().applicable(state)) is not None:
            return reason
        return None if state.kv_equal else "the model does not guarantee that keys and values are equal"
