"""One merged checksum for a whole attention head, in the manner of Flash-ABFT: a published method to compare with.

Vasileios Titopoulos, Kosmas Alexandridis, Giorgos Dimitrakopoulos, "Custom Algorithm-based Fault Tolerance for
Attention Layers in Transformers", IEEE International System-on-Chip Conference (SOCC) 2025, arXiv:2507.16676.

    detector = get_detector("flash_abft")
    for state in clean_states: detector.calibrate(state)      # fault-free calls of inputs that are not evaluated
    detector.check(state)

>>> from bounds import get_detector
>>> ones = torch.ones(1, 1, 2, 2)
>>> state = AttentionState(query=ones, key=ones, value=ones, logits=2 * ones, weights=ones / 2, out=ones,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False, layer=0)
>>> merged_checksums(state).predicted.item(), merged_checksums(state).actual.item()
(4.0, 4.0)
>>> detector = get_detector("flash_abft")
>>> detector.calibrate(state)
>>> detector.check(state).violations
0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Verdict
from bounds.core.row_check import RowCheck, judged
from bounds.epsilon.bounds import visible_keys
from bounds.published.calibrated_detector import CalibratedDetector
from bounds.published.product_checksums import written_rows
from bounds.registry import register_detector

MARGIN = 2.0
"""How many times the largest clean deviation is accepted (ours)."""


@dataclass(frozen=True, eq=False)
class MergedChecksums:
    """The two checksums of every head, (B, H) float64.

    Attributes:
        predicted: ``sum_i sum_j w_ij sum_c V_jc``, the weights w computed from the logits.
        actual: ``sum_i sum_c O_ic``.
        magnitude: ``sum_i sum_j w_ij sum_c |V_jc|``, the unit that deviations are measured in.
    """

    predicted: Tensor
    actual: Tensor
    magnitude: Tensor


@torch.no_grad()
def merged_checksums(state: AttentionState) -> MergedChecksums:
    """Return predicted and actual checksum of every head; rows that see no key are left out."""
    logits = state.logits.double()
    if (visible := visible_keys(state.visible, state.logits.shape)) is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    # Columns beyond the keys are a sink's: they are part of the normalisation and carry no value.
    weights = torch.softmax(logits, -1)[..., : state.key.shape[2]]
    received, value = written_rows(state, weights).sum(-2), state.value.double()
    return MergedChecksums(
        predicted=(received * state.per_query_head(value.sum(-1))).sum(-1),
        actual=written_rows(state, state.out).double().sum((-2, -1)),
        magnitude=(received * state.per_query_head(value.abs().sum(-1))).sum(-1),
    )


@register_detector
class FlashAbftDetector(CalibratedDetector[float]):
    """The sum of a head's outputs equals what the logits and the row sums of V predict.

    Reproduced: a single check per head, over all its queries, that spans softmax, division and value product: predicted
    is the sum over queries of exp(s_ij - max) / normaliser times the row sums of V, actual the sum of all outputs.

    Not reproduced: the hardware, and the online recurrence (it yields the same sums). In the accelerator both paths
    consume the same scores, maxima and exponentials; here the predicted path forms its own from the stored logits, in
    float64, so that a fault in the weights is seen too: kinder than the original. As in the original, both paths share
    logits and V, so faults in q, k, v, scores and logits that stay finite are invisible. The threshold is ours (the
    method was at hand, the error bound of the paper's experiments was not): twice the largest clean deviation of the
    layer in calibration, measured relative to ``sum w |V|``, so that it fits any scale of V and any number of queries.

    False positives: no theorem rules them out.
    """

    name = "flash_abft"
    needs = frozenset({"key", "value", "logits", "out"})
    statement = (
        "sum of a head's outputs = sum of softmax(logits) times the row sums of V (Titopoulos et al., SOCC 2025)"
    )
    cost = "n exp"

    def learn(self, state: AttentionState, known: float | None) -> float:
        """Return the largest relative rounding of the layer's checksum, this call included.

        Raises:
            ValueError: when the call is not finite.
        """
        sums = state.derived(merged_checksums)
        deviation = (sums.predicted - sums.actual).abs()
        largest = float(torch.where(deviation == 0, 0.0, deviation / sums.magnitude).max())
        if not largest < torch.inf:
            raise ValueError(f"calibrate: the checksum of layer {state.layer} is not finite, so it is not fault-free")
        return max(known or 0.0, largest)

    def derive(self, state: AttentionState) -> None:
        """Compute the checksums."""
        state.derived(merged_checksums)

    @torch.no_grad()
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge every head; positions are (batch, head)."""
        sums = state.derived(merged_checksums)
        threshold = MARGIN * self.learned(state) * sums.magnitude
        check = RowCheck((sums.predicted - sums.actual).abs(), threshold)
        return judged(self.name, check, allowance=self.tolerance, detail="the sum of the outputs is not as predicted")
