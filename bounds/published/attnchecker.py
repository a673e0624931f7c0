"""Checksums and extreme values in the manner of ATTNChecker: a published method to compare with.

Yuhang Liang, Xinyi Li, Jie Ren, Ang Li, Bo Fang, Jieyang Chen, "ATTNChecker: Highly-Optimized Fault Tolerant Attention
for Large Language Model Training", PPoPP 2025, doi:10.1145/3710848.3710870, arXiv:2410.11720; thresholds and decisions
from the authors' code, https://github.com/liangyh911/ATTNChecker, ``OptABFT_v4/opt_kernels.cu`` and ``CUDABlas.cu``.

>>> from bounds import get_detector
>>> ones = torch.ones(1, 1, 2, 2)
>>> state = AttentionState(query=ones, key=ones, value=ones, scores=2 * ones, logits=2 * ones, weights=ones / 2,
...                        mass=ones / 2, out=ones, scaling=1.0, kv_equal=True, has_bias_or_cap=False)
>>> get_detector("attnchecker").check(state).violations
0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Detector, Verdict
from bounds.core.row_check import RowCheck
from bounds.products.product_detector import required
from bounds.published.product_checksums import joint_verdict, output_deviations, score_deviations, written_rows
from bounds.registry import register_detector

CHECKSUM_THRESHOLD = 1.0
"""``E`` of the authors' kernels: a checksum that is off by more is an error."""

NEAR_INF = 1e10
"""Magnitude above which the authors' kernels count a finite number as near-INF."""


@register_detector
class AttnCheckerDetector(Detector):
    """Column and row checksums of both products, and extreme values, as ATTNChecker decides on them.

    Reproduced: unweighted column and row checksums of QK^T and of (weights) V, compared with the authors' E = 1; a
    column alarms when its checksum is off by more than E, or is INF or NaN; a row alarms when its checksum is INF or
    NaN, or off by more than E *and* the row holds a number beyond their near-INF threshold 1e10 (without one the
    authors' kernel takes the checksum for the faulty part and renews it). Both thresholds are absolute and the same
    for all formats, as in their code, which was written for float32 and float16.

    Not reproduced: correction, and the weighted checksums that locate what is corrected; the output projection
    (section S_O), which is no part of an attention state; and checksums that are passed from the hidden states through
    the projections, which let the authors see a fault in q, k or v in the products. In their place q, k and v are
    searched for NaN, INF and near-INF, the errors the paper is about; a moderate fault in q, k or v before its use
    stays unseen here, where ATTNChecker would see it if it moved a column of QK^T by more than E. Checksums are summed
    in float64 instead of the model's format, so that they do not overflow and add no rounding of their own: kinder than
    the original. Frequency-reduced checking is not reproduced either: every call is checked.

    False positives: no theorem rules them out. In half formats the rounding of stored scores alone can exceed E.
    """

    name = "attnchecker"
    needs = frozenset({"query", "key", "value", "scores", "mass", "out"})
    statement = "column and row sums of QK^T and WV agree within 1, nothing is beyond 1e10 (Liang et al., PPoPP 2025)"
    cost = "n + d"
    proved = False

    def derive(self, state: AttentionState) -> None:
        """Compute the deviations of both products."""
        if self.applicable(state) is None:
            state.derived(score_deviations)
            state.derived(output_deviations)

    @torch.no_grad()
    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        """Judge rows of q, k, v by their extreme values, columns and rows of both products by their checksums."""
        score_columns, score_rows = state.derived(score_deviations)
        out_columns, out_rows = state.derived(output_deviations)
        checks = {name: _extreme_values(getattr(state, name)) for name in ("query", "key", "value")}
        checks["score columns"] = _checksums(score_columns)
        checks["score rows"] = _checksums(score_rows, of=required(state, "scores"))
        checks["out columns"] = _checksums(out_columns)
        checks["out rows"] = _checksums(out_rows, of=written_rows(state, state.out))
        return joint_verdict(self.name, checks, self.tolerance)


def _largest(rows: Tensor) -> Tensor:
    # amax passes NaN on, and a NaN fires.
    return rows.abs().amax(-1).double()


def _extreme_values(tensor: Tensor) -> RowCheck:
    """Return the check that a row of ``tensor`` holds nothing beyond NEAR_INF."""
    largest = _largest(tensor)
    return RowCheck(largest, torch.full_like(largest, NEAR_INF))


def _checksums(deviations: Tensor, of: Tensor | None = None) -> RowCheck:
    """Return the check of deviations against E; given the product's rows, finite ones count only beside a near-INF."""
    residual = deviations.abs()
    if of is not None:
        renewed = torch.isfinite(residual) & (_largest(of) <= NEAR_INF)
        residual = residual.masked_fill(renewed, 0.0)
    return RowCheck(residual, torch.full_like(residual, CHECKSUM_THRESHOLD))
