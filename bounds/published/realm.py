"""Statistical checksums in the manner of ReaLM: a published method to compare with.

Tong Xie, Jiawang Zhao, Zishen Wan, Zuodong Zhang, Yuan Wang, Runsheng Wang, Ru Huang, Meng Li, "ReaLM: Reliable and
Efficient Large Language Model Inference with Statistical Algorithm-Based Fault Tolerance", DAC 2025, arXiv:2503.24053;
code of its error injection: https://github.com/PKU-SEC-Lab/ReaLM_DAC25.

    detector = get_detector("realm")
    for state in clean_states: detector.calibrate(state)      # fault-free calls of inputs that are not evaluated
    detector.check(state)

>>> from bounds import get_detector
>>> ones = torch.ones(1, 1, 2, 2)
>>> state = AttentionState(query=ones, key=ones, value=ones, scores=2 * ones, logits=2 * ones, weights=ones / 2,
...                        mass=ones / 2, out=ones, scaling=1.0, kv_equal=True, has_bias_or_cap=False, layer=0)
>>> detector = get_detector("realm")
>>> detector.calibrate(state)
>>> detector.check(state).violations
0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Verdict
from bounds.core.row_check import RowCheck
from bounds.products.product_detector import required
from bounds.published.calibrated_detector import CalibratedDetector
from bounds.published.product_checksums import joint_verdict, output_deviations, score_deviations, written_rows
from bounds.registry import register_detector

STEPS = 127
"""Quantization steps between 0 and the largest magnitude of an INT8 tensor."""

MARGIN = 2.0
"""How many times the largest deviation of a column in calibration counts as rounding (ours; INT8 has no rounding)."""

FREQUENCY = 1
"""Columns that must deviate before the error counts as harmful (ours: the most sensitive choice)."""


@dataclass(frozen=True)
class Clean:
    """What calibration saw of one product of one layer.

    Attributes:
        magnitude: largest |entry| of the product.
        deviation: largest |deviation| of a column's checksum.
    """

    magnitude: float = 0.0
    deviation: float = 0.0

    @property
    def step(self) -> float:
        """The step of the INT8 tensor that the product would be quantized to."""
        return self.magnitude / STEPS


Statistics = Mapping[str, Clean]


@register_detector
class RealmDetector(CalibratedDetector[Statistics]):
    """Checksum deviations count only where their sum, size and number say that the error is harmful.

    Per product (QK^T, and weights times V, each head of each batch entry by itself), with e_j the deviation of column
    j's checksum: the matrix-sum deviation ``MSD = |sum_j e_j|``, and the frequency, the number of columns with
    ``|e_j| > theta_mag``. It alarms iff ``MSD > theta_MSD`` and ``frequency >= FREQUENCY``: the critical region.

    Reproduced: the one-sided checksums of the products, MSD, magnitude and frequency as the statistics that decide, a
    critical region in their plane outside of which a deviation is accepted, and thresholds that are characterized
    offline for each layer and product.

    Not reproduced: the shape and the parameters of the region. The paper fits them, for each model and component, to
    injections of many errors at once into INT8 arithmetic; the fits are not part of its published code, and the full
    text was not at hand. Ours, chosen in the method's favour: theta_MSD is one INT8 step of the product (its largest
    clean magnitude / 127), below which an error would vanish in requantization; theta_mag is that step, or twice the
    largest deviation of a column in calibration where rounding alone is larger (floating-point products are not exact
    as INT8 ones are); one column suffices. The paper separates components that tolerate few large errors from sensitive
    ones before a normalisation; here both products are treated as sensitive, since nothing clips a large float as
    requantization does, and with a larger frequency hardly a single bit flip would raise an alarm. Projections and
    feed-forward layers are no part of an attention state; circuits, voltages and recovery are not modelled.

    False positives: no theorem rules them out.
    """

    name = "realm"
    needs = frozenset({"query", "key", "value", "scores", "mass", "out"})
    statement = "checksum deviations of QK^T and WV stay outside the critical region of MSD and frequency (DAC 2025)"
    cost = "n + d"

    def learn(self, state: AttentionState, known: Statistics | None) -> Statistics:
        """Return magnitude and rounding of the layer's products, this call included.

        Raises:
            ValueError: when the call is not finite.
        """
        statistics = dict(known or {})
        for name, product, deviations in _products(state):
            magnitude, deviation = float(product.abs().max()), float(deviations.abs().max())
            if not (magnitude < torch.inf and deviation < torch.inf):
                raise ValueError(f"calibrate: {name} of layer {state.layer} are not finite, so they are not fault-free")
            before = statistics.get(name, Clean())
            statistics[name] = Clean(max(before.magnitude, magnitude), max(before.deviation, deviation))
        return statistics

    def derive(self, state: AttentionState) -> None:
        """Compute the deviations of both products."""
        if self.applicable(state) is None:
            state.derived(score_deviations)
            state.derived(output_deviations)

    @torch.no_grad()
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge both products of every head; positions are (batch, head)."""
        known = self.learned(state)
        checks = {name: critical(deviations, known[name]) for name, _, deviations in _products(state)}
        return joint_verdict(self.name, checks, self.tolerance)


def critical(deviations: Tensor, clean: Clean) -> RowCheck:
    """Return how far into the critical region each product lies, in units of its border; (..., columns) -> (...)."""
    magnitude = deviations.abs().topk(FREQUENCY, dim=-1).values[..., -1]
    matrix_sum = deviations.sum(-1).abs()
    # Both conditions must hold, so the weaker of the two decides; minimum passes NaN on, and NaN fires.
    residual = torch.minimum(
        _in_units(magnitude, max(clean.step, MARGIN * clean.deviation)), _in_units(matrix_sum, clean.step)
    )
    return RowCheck(residual, torch.ones_like(residual))


def _in_units(values: Tensor, threshold: float) -> Tensor:
    # A product that was 0 throughout calibration has a threshold of 0: nothing is 0 of it, all else is beyond it.
    return torch.where(values == 0, 0.0, values / threshold)


def _products(state: AttentionState) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, stored product and column deviations of both products."""
    scores, out = required(state, "scores"), written_rows(state, state.out)
    return [
        ("scores", scores, state.derived(score_deviations)[0]),
        ("outputs", out, state.derived(output_deviations)[0]),
    ]
