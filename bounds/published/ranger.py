"""Ranges of values learned from fault-free calls, in the manner of Ranger: a published method to compare with.

Zitao Chen, Guanpeng Li, Karthik Pattabiraman, "A Low-cost Fault Corrector for Deep Neural Networks through Range
Restriction", 51st Annual IEEE/IFIP International Conference on Dependable Systems and Networks (DSN), 2021,
arXiv:2003.13874; code: https://github.com/DependableSystemsLab/Ranger.

    detector = get_detector("ranger")
    for state in clean_states: detector.calibrate(state)      # fault-free calls of inputs that are not evaluated
    detector.check(state)

>>> from bounds import get_detector
>>> ones = torch.ones(1, 1, 2, 2)
>>> state = AttentionState(query=ones, key=ones, value=ones, logits=2 * ones, weights=ones / 2, out=ones,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False, layer=0)
>>> detector = get_detector("ranger")
>>> detector.check(state).reason
'it has seen no fault-free call of layer 0 in calibration'
>>> detector.calibrate(state)
>>> detector.check(state).violations
0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Verdict
from bounds.core.row_check import RowCheck
from bounds.epsilon.bounds import visible_keys
from bounds.published.calibrated_detector import CalibratedDetector
from bounds.published.product_checksums import joint_verdict, seen_rows
from bounds.registry import register_detector

RESTRICTED = ("query", "key", "value", "logits", "weights", "out")
"""The tensors with a restricted range, in the order of the computation."""

Ranges = Mapping[str, tuple[float, float]]


@register_detector
class RangerDetector(CalibratedDetector[Ranges]):
    """Every value of a tensor is between the smallest and the largest that calibration saw in this layer's tensor.

    Reproduced: one lower and one upper bound per layer and tensor, profiled on fault-free inputs that are not the
    evaluated ones; the bounds are the extremes themselves (100 % of the profile, the paper's default), without margin.

    Not reproduced: Ranger corrects, it truncates to the bound and never raises an alarm; here a value that it would
    truncate is an alarm. The paper restricts the activation functions of convolutional networks and the operations
    after them. Attention has none besides softmax, so the restricted tensors are ours: q, k, v, the visible logits,
    the weights and the output, all a fault can hit. The looser percentiles of the paper's trade-off are not offered.

    False positives: no theorem rules them out. A clean input with a value beyond everything profiled raises one.
    """

    name = "ranger"
    needs = frozenset(RESTRICTED)
    statement = "each tensor lies in the range that its layer showed on calibration inputs (Chen et al., DSN 2021)"
    cost = "n + d"

    def learn(self, state: AttentionState, known: Ranges | None) -> Ranges:
        """Return the ranges of the layer's tensors, widened to hold this call.

        Raises:
            ValueError: when the call is not finite.
        """
        ranges = dict(known or {})
        for name, low, high in _extremes(state):
            if not low.numel():
                continue
            below, above = float(low.min()), float(high.max())
            if not (below > -torch.inf and above < torch.inf):
                raise ValueError(f"calibrate: {name} of layer {state.layer} is not finite, so it is not fault-free")
            before = ranges.get(name, (below, above))
            ranges[name] = min(before[0], below), max(before[1], above)
        return ranges

    @torch.no_grad()
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge the rows of all tensors; the residual is the distance from the range, in units of the tensor."""
        ranges = self.learned(state)
        checks = {}
        for name, low, high in _extremes(state):
            # Rows that see no key are all that calibration showed: nothing is known of the tensor, so nothing passes.
            below, above = ranges.get(name, (torch.inf, -torch.inf))
            residual = torch.maximum(below - low, high - above)
            checks[name] = RowCheck(residual, torch.zeros_like(residual))
        return joint_verdict(self.name, checks, self.tolerance)


def _extremes(state: AttentionState) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, smallest and largest entry of every row that exists, (rows,) float64, of each restricted tensor.

    Logits are read where they are visible; rows that see no key are left out, softmax is not defined on them.
    """
    seen = seen_rows(state)
    visible = visible_keys(state.visible, state.logits.shape)
    found = []
    for name in RESTRICTED:
        tensor = getattr(state, name)
        low_source = high_source = tensor
        if name == "logits" and visible is not None:
            low_source, high_source = tensor.masked_fill(~visible, torch.inf), tensor.masked_fill(~visible, -torch.inf)
        low, high = low_source.amin(-1).double(), high_source.amax(-1).double()
        if seen is not None and name in ("logits", "weights", "out"):
            low, high = low[seen], high[seen]
        found.append((name, low, high))
    return found
