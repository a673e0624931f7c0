"""The effects of many faults, computed only from the rows that they changed.

The fast engine runs faults together and knows, for each, the rows (b, t) of the output that may differ from the
baseline; all others are bitwise equal. The effects equal those of ``effect_of`` on the whole output, to the last bit
(on the CPU), because both use the same arithmetic on rows.

    baseline_rows = BaselineRows.of("causal", evaluation.output, batch)        # once
    found = effects_of_rows(baseline_rows, rows, logits, runs, num_runs, critical_loss=1e-3)

>>> logits = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]])
>>> baseline_rows = BaselineRows.of("causal", logits, {"input_ids": torch.tensor([[0, 1]])})
>>> one = torch.tensor([1])
>>> found = effects_of_rows(baseline_rows, one, torch.tensor([[1.0, 3.0]]), one, num_runs=2, critical_loss=1e-3)
>>> [(run.effect.outcome, run.effect.top1_changed) for run in found]
[('masked', 0), ('critical', 1)]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.effects.baseline_rows import BaselineRows, measure_rows
from experiments.effects.outcome import Effect, effects_of_differences, losses_of_differences
from experiments.effects.row_kernels import changed_rows

__all__ = ["BaselineRows", "RowEffect", "effects_of_rows"]


@dataclass(frozen=True, eq=False)
class RowEffect:
    """The effect of one run.

    Attributes:
        effect: The same as ``effect_of`` returns.
        sequence_losses: The mean losses of the sequences, (B,) float64, nats; None for an encoder.
    """

    effect: Effect
    sequence_losses: Tensor | None


def effects_of_rows(
    baseline_rows: BaselineRows, rows: Tensor, logits: Tensor, runs: Tensor, num_runs: int, critical_loss: float
) -> list[RowEffect]:
    """Return the effects of R runs: compare their rows with the baseline.

    Args:
        baseline_rows: The rows of the fault-free output.
        rows: (N,) int64, numbers ``b * T + t``; each at most once per run. All rows that differ bitwise from the
            baseline must be given; equal rows may be given, and are left out after a comparison.
        logits: (N, V) of the baseline's dtype: the logits of these rows, or hidden states of an encoder.
        runs: (N,) int64, the run of each row, sorted, ``0 .. num_runs - 1``.
        num_runs: R. A run without rows is masked.
        critical_loss: A larger change of the loss is critical, nats.

    Returns:
        One effect for each run, in order.

    Raises:
        ValueError: The arguments do not fit together, or the baseline is all zeros.
    """
    _check(baseline_rows, rows, logits, runs, num_runs)
    chosen = changed_rows(baseline_rows.values, rows, logits).nonzero().flatten()
    if len(chosen) < len(rows):
        rows, logits, runs = rows[chosen], logits.index_select(0, chosen), runs[chosen]
    differences = measure_rows(baseline_rows, rows, logits)
    losses = losses_of_differences(baseline_rows, rows, runs, differences, num_runs)
    means = [mean for mean, _ in losses]
    effects = effects_of_differences(baseline_rows, rows, runs, differences, means, critical_loss)
    return [RowEffect(effect, sequences) for effect, (_, sequences) in zip(effects, losses, strict=True)]


def _check(baseline: BaselineRows, rows: Tensor, logits: Tensor, runs: Tensor, num_runs: int) -> None:
    width, known = baseline.values.shape[1], len(baseline.values)
    for name, numbers, limit in (("rows", rows, known), ("runs", runs, num_runs)):
        if numbers.dtype != torch.int64 or numbers.ndim != 1 or len(numbers) != len(logits):
            raise ValueError(f"{name}: got {numbers.dtype} {tuple(numbers.shape)}, allowed int64 ({len(logits)},)")
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < limit:
            raise ValueError(
                f"{name}: got {int(numbers.min())} .. {int(numbers.max())}, allowed numbers from 0 to {limit - 1}"
            )
    if logits.dtype != baseline.values.dtype or logits.shape != (len(rows), width):
        raise ValueError(
            f"logits: got {logits.dtype} {tuple(logits.shape)}, allowed {baseline.values.dtype} ({len(rows)}, {width})"
        )
    if bool((runs.diff() < 0).any()):
        raise ValueError("runs: got an unsorted order, allowed the rows of run 0, then those of run 1, and so on")
    if len((runs * known + rows).unique()) < len(rows):
        raise ValueError("rows: got a row twice in one run, allowed each at most once")
