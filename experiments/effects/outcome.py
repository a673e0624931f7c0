"""The effect of a fault on the model in numbers, and its outcome in one word.

masked     the output is bitwise that of the fault-free pass
nonfinite  the output or the loss has a NaN or Inf
critical   a top-1 prediction changes, or the loss moves by more than ``critical_loss``; a bare encoder predicts
nothing, so for it the relative change of the output must be larger than ``critical_loss``
benign     everything else
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.effects.baseline_rows import BaselineRows, RowDifferences, measure_rows
from experiments.effects.loss import Evaluation, mean_losses
from experiments.effects.row_kernels import as_array, as_tensor, changed_rows, quiet, row_norms


@dataclass(frozen=True)
class Effect:
    """The effect of one fault on the output of the model.

    Attributes:
        outcome: ``masked``, ``benign``, ``critical`` or ``nonfinite``.
        injected_loss: loss of the injected pass, nats; ``None`` without a loss.
        loss_diff: injected loss minus baseline loss, nats; ``None`` without a loss.
        relative_change: relative L2 change of the output.
        kl_mean: mean KL divergence of the predictions, nats; ``None`` for bare encoders.
        top1_changed: positions whose most likely token changed; ``None`` for bare encoders.
        nonfinite_rows: positions of the output that hold NaN or Inf.
    """

    outcome: str
    injected_loss: float | None
    loss_diff: float | None
    relative_change: float
    kl_mean: float | None
    top1_changed: int | None
    nonfinite_rows: int


def effect_of(
    baseline: Evaluation,
    injected: Evaluation,
    batch: Mapping[str, Tensor],
    family: str,
    critical_loss: float,
    baseline_rows: BaselineRows | None = None,
) -> Effect:
    """Return the effect of a fault: compare an injected pass with its baseline.

    Unchanged rows keep the loss of the baseline, so the change of the loss keeps its digits; ``injected.loss`` can
    differ in the last digits.

    Padding does not count, except that ``masked`` compares every bit of the output, and every NaN or Inf makes it
    ``nonfinite``. Only rows that differ bitwise from the baseline enter the computation.

    Args:
        baseline: The fault-free pass.
        injected: The faulty pass.
        batch: The input of both passes.
        family: The family of the model.
        critical_loss: A larger change of the loss is critical, nats.
        baseline_rows: ``BaselineRows.of(family, baseline.output, batch)``, if it exists already.

    Raises:
        ValueError: The outputs have different shapes, no position counts, or the baseline is all zeros.
    """
    before, after = baseline.output, injected.output
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(
            f"injected: got {after.dtype} {tuple(after.shape)}, allowed the baseline's {before.dtype}"
            f" {tuple(before.shape)}"
        )
    known = baseline_rows or BaselineRows.of(family, before, batch)
    values = after.reshape(-1, after.shape[-1])
    rows = torch.arange(len(values), device=values.device)
    rows = changed_rows(known.values, rows, values).nonzero().flatten()
    differences = measure_rows(known, rows, values.index_select(0, rows))
    runs = torch.zeros_like(rows)
    losses = [loss for loss, _ in losses_of_differences(known, rows, runs, differences, 1)]
    return effects_of_differences(known, rows, runs, differences, losses, critical_loss)[0]


def losses_of_differences(
    baseline: BaselineRows, rows: Tensor, runs: Tensor, differences: RowDifferences, num_runs: int
) -> list[tuple[float | None, Tensor | None]]:
    """Return, for each of R runs, the mean loss and the mean losses of its sequences, (B,) float64, in nats.

    Return None for an encoder.

    Args:
        baseline: The fault-free rows.
        rows: (N,) int64, the numbers of the rows that differ bitwise from the baseline; each at most once per run.
        runs: (N,) int64, their runs, ``0 .. R - 1``.
        differences: The differences of the N rows.
        num_runs: R.
    """
    if baseline.answers is None or differences.losses is None:
        return [(None, None)] * num_runs
    losses = as_tensor(baseline.answers.losses).expand(num_runs, -1).clone()
    losses[runs, rows] = differences.losses
    means, sequence_means = mean_losses(losses, baseline.targets.view(baseline.shape))
    return list(zip(means, sequence_means, strict=True))


@quiet
def effects_of_differences(
    baseline: BaselineRows,
    rows: Tensor,
    runs: Tensor,
    differences: RowDifferences,
    losses: Sequence[float | None],
    critical_loss: float,
) -> list[Effect]:
    """Return the effects of R runs from the differences of their changed rows.

    Args:
        baseline: The fault-free rows.
        rows: (N,) int64, the numbers of the rows that differ bitwise from the baseline; each at most once per run.
        runs: (N,) int64, their runs, ``0 .. R - 1``.
        differences: The differences of the N rows.
        losses: The losses of the R runs, nats; None without a loss.
        critical_loss: A larger change of the loss is critical, nats.
    """
    num_runs = len(losses)

    def spread(values: Tensor, elsewhere: Tensor) -> Tensor:
        """Return (R, B * T): the values at their runs and rows, ``elsewhere`` at all others."""
        table = elsewhere.expand(num_runs, -1).clone()
        table[runs, rows] = values
        return table

    def spread_real(values: Tensor) -> Tensor:
        # an unchanged row contributes 0, but the change of a NaN is unknown
        nothing = torch.zeros_like(baseline.norms).masked_fill_(~baseline.finite, torch.nan)
        return spread(values, nothing).masked_fill_(~baseline.real, 0.0)

    changed = torch.bincount(runs, minlength=num_runs).tolist()
    nonfinite = spread(~differences.finite, ~baseline.finite).sum(dim=1).tolist()
    changes = _relative(spread_real(differences.norms), baseline, changed)
    divergences: list[float | None] = [None] * num_runs
    moved: list[int | None] = [None] * num_runs
    if differences.divergences is not None and differences.moved is not None:
        divergences = (as_array(spread_real(differences.divergences)).sum(axis=-1) / int(baseline.real.sum())).tolist()
        moved = (spread(differences.moved, torch.zeros_like(baseline.real)) & baseline.real).sum(dim=1).tolist()
    effects = []
    for run, injected_loss in enumerate(losses):
        loss_diff = None if baseline.loss is None or injected_loss is None else injected_loss - baseline.loss
        broken = nonfinite[run] > 0 or (injected_loss is not None and not _is_finite(injected_loss))
        moves = abs(changes[run] if loss_diff is None else loss_diff) > critical_loss
        if not changed[run] and not nonfinite[run]:
            outcome = "masked"
        else:
            outcome = "nonfinite" if broken else "critical" if moved[run] or moves else "benign"
        effects.append(
            Effect(outcome, injected_loss, loss_diff, changes[run], divergences[run], moved[run], nonfinite[run])
        )
    return effects


def _relative(changes: Tensor, baseline: BaselineRows, changed: Sequence[int]) -> list[float]:
    size = float(row_norms(as_array(baseline.norms.where(baseline.real, 0.0).unsqueeze(0)))[0])
    if size == 0.0 and any(changed):
        raise ValueError("baseline: got nothing but zeros, so no change is relative to it")
    norms = row_norms(as_array(changes))
    relative: list[float] = (norms / size if size else norms).tolist()
    return relative


def _is_finite(value: float) -> bool:
    return value - value == 0.0
