"""What a fault did to the model: the effect, in numbers, and the outcome, in one word.

    masked     the output is bitwise that of the fault-free pass
    nonfinite  NaN or Inf in the output or the loss
    critical   a top-1 prediction changes, or the loss moves by more than ``critical_loss``; for a bare encoder, which
               predicts nothing, its output moves by more than that, relatively
    benign     the rest

Public names: ``Effect``, ``effect_of``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.objective import Evaluation, kl_mean, relative_change, top1_changed
from experiments.windows import real_positions
from fault_injection.model_outputs import bitwise_equal


@dataclass(frozen=True)
class Effect:
    """The effect of one fault on the output of the model.

    Attributes:
        outcome: ``masked``, ``benign``, ``critical`` or ``nonfinite``.
        loss_diff: injected minus baseline loss, nats; ``None`` without a loss.
        relative_change: L2 change of the output, relative.
        kl_mean: mean KL divergence of the predictions, nats; ``None`` for bare encoders.
        top1_changed: positions whose most likely token changed; ``None`` for bare encoders.
        nonfinite_rows: positions of the output that hold NaN or Inf.
    """

    outcome: str
    loss_diff: float | None
    relative_change: float
    kl_mean: float | None
    top1_changed: int | None
    nonfinite_rows: int


def effect_of(
    baseline: Evaluation, injected: Evaluation, batch: Mapping[str, Tensor], family: str, critical_loss: float
) -> Effect:
    """Compare an injected pass with its baseline.

    Padding does not count, but every bit of the output does for ``masked``, and every NaN or Inf for ``nonfinite``.
    """
    predicts = family != "encoder"
    loss_diff = None
    if baseline.loss is not None and injected.loss is not None:
        loss_diff = injected.loss - baseline.loss
    nonfinite_rows = int((~torch.isfinite(injected.output).all(-1)).sum())
    if not nonfinite_rows and bitwise_equal(baseline.output, injected.output):
        return Effect("masked", loss_diff, 0.0, 0.0 if predicts else None, 0 if predicts else None, 0)
    real = real_positions(batch)
    change = relative_change(baseline.output, injected.output, real).l2_relative
    divergence = kl_mean(baseline.output, injected.output, real) if predicts else None
    changed = top1_changed(baseline.output, injected.output, real) if predicts else None
    if nonfinite_rows or (injected.loss is not None and not _is_finite(injected.loss)):
        outcome = "nonfinite"
    elif changed or abs(change if loss_diff is None else loss_diff) > critical_loss:
        outcome = "critical"
    else:
        outcome = "benign"
    return Effect(outcome, loss_diff, change, divergence, changed, nonfinite_rows)


def _is_finite(value: float) -> bool:
    return value - value == 0.0
