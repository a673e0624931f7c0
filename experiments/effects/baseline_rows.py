"""The rows of a fault-free output, and the distance of a faulty output's rows from them.

A fault changes some rows (b, t) of the logits (B, T, V). All other rows equal the baseline bitwise and contribute to no
difference. The answers of the baseline's rows are computed once; the logits themselves are not copied.

    rows = BaselineRows.of("causal", logits, batch)
    measured = measure_rows(rows, numbers, faulty)

>>> logits = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]])
>>> rows = BaselineRows.of("causal", logits, {"input_ids": torch.tensor([[0, 1]])})
>>> measure_rows(rows, torch.tensor([0]), torch.tensor([[2.0, 0.0]])).moved    # the first of equal ones stays the first
tensor([False])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.effects.loss import Evaluation, checked_targets, mean_losses
from experiments.effects.row_kernels import (
    Array,
    RowAnswers,
    answers_of,
    as_array,
    as_tensor,
    chances_of,
    divergences,
    finite_rows,
    is_near,
    joined,
    likeliest_of,
    nearby,
    pieces,
    quiet,
    row_norms,
)
from experiments.inputs.batches import IGNORED, real_positions


class RowDifferences(NamedTuple):
    """The differences of N rows from the baseline's; the last three are None for an encoder.

    Attributes:
        finite: (N,) bool, whether the row has no NaN and no infinity.
        norms: (N,) float64, the Euclidean norm of the change.
        losses: (N,) float64, nats; 0 without a target.
        divergences: (N,) float64, KL(baseline || row), nats.
        moved: (N,) bool, whether the most likely token changed (a row may also gain or lose one).
    """

    finite: Tensor
    norms: Tensor
    losses: Tensor | None
    divergences: Tensor | None
    moved: Tensor | None


@dataclass(frozen=True, eq=False)
class BaselineRows:
    """The rows of one fault-free output, numbered ``b * T + t``.

    Attributes:
        family: ``causal``, ``masked``, ``encoder-decoder`` or ``encoder``.
        shape: (B, T).
        values: (B * T, V), the output itself, not a copy if it is contiguous.
        real: (B * T,) bool, False at padding.
        targets: (B * T,) int64, -100 without a target, and everywhere for an encoder.
        finite: (B * T,) bool.
        norms: (B * T,) float64, Euclidean.
        answers: The answers of the rows; None for an encoder.
        loss: ``Evaluation.loss`` of the output, nats; None for an encoder.
    """

    family: str
    shape: tuple[int, int]
    values: Tensor
    real: Tensor
    targets: Tensor
    finite: Tensor
    norms: Tensor
    answers: RowAnswers | None
    loss: float | None

    @classmethod
    @quiet
    def of(cls, family: str, output: Tensor, batch: Mapping[str, Tensor]) -> BaselineRows:
        """Return the rows of a fault-free output, with everything that comparisons need.

        Args:
            family: The family of the model, as for ``loss_and_logits``.
            output: Logits (B, T, V), or the hidden state (B, T, D) of an encoder.
            batch: A batch from ``validate_batch``.

        Raises:
            UsageError: The family is unknown, or a sequence has no target.
            ValueError: The shape of the mask is not that of the output.
        """
        targets = checked_targets(family, output, batch)
        real = _real(output, batch)
        values = output.reshape(-1, output.shape[-1])
        flat_targets = torch.full_like(real, IGNORED, dtype=torch.int64) if targets is None else targets.flatten()
        finite, norms, answers = [], [], []
        for piece in pieces(*values.shape):
            rows = as_array(values[piece].double())
            norms.append(row_norms(rows))
            finite.append(finite_rows(values[piece], norms[-1]))
            if targets is not None:
                answers.append(answers_of(rows, as_array(flat_targets[piece])))
        shape = output.shape[0], output.shape[1]
        known = shape, values, real, flat_targets, as_tensor(joined(finite)), as_tensor(joined(norms))
        if targets is None:
            return cls(family, *known, None, None)
        every = RowAnswers(*map(joined, zip(*answers, strict=True)))
        return cls(family, *known, every, mean_losses(as_tensor(every.losses).unsqueeze(0), targets)[0][0])

    def evaluation(self) -> Evaluation:
        """Return what ``loss_and_logits`` returns of the same output, without a second softmax."""
        output = self.values.view(*self.shape, -1)
        if self.answers is None:
            return Evaluation(None, None, output)
        losses = as_tensor(self.answers.losses).unsqueeze(0)
        means, sequence_means = mean_losses(losses, self.targets.view(self.shape))
        return Evaluation(means[0], sequence_means[0], output)


def _real(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    real = real_positions(batch).to(output.device)
    if real.shape != output.shape[:2]:
        raise ValueError(f"mask: got {real.dtype} {tuple(real.shape)}, allowed bool {tuple(output.shape[:2])}")
    if not bool(real.any()):
        raise ValueError("mask: got no position that counts, allowed one or more")
    return real.flatten()


@quiet
def measure_rows(baseline: BaselineRows, rows: Tensor, values: Tensor) -> RowDifferences:
    """Compare rows with the baseline's rows of the same numbers; a row's result does not depend on other rows.

    Args:
        baseline: The rows of the fault-free output.
        rows: (N,) int64 numbers of rows, in any order; a number may occur several times.
        values: (N, V), logits or hidden states of the faulty passes.
    """
    # sorted by number, so that rows of many passes share one softmax of the baseline
    order = rows.argsort(stable=True)
    rows, back = rows[order], order.argsort()
    chosen = list(pieces(*values.shape))
    comparison = _Comparison(baseline, values, len(rows[chosen[0]]))
    found = [comparison.piece(rows[part], order[part]) for part in chosen]
    columns: list[Any] = [
        None if column[0] is None else as_tensor(joined(column))[back] for column in zip(*found, strict=True)
    ]
    return RowDifferences(*columns)


class _Comparison:
    """Compares pieces of at most ``most`` rows with a baseline; keeps the baseline's rows of the last piece."""

    def __init__(self, baseline: BaselineRows, values: Tensor, most: int) -> None:
        self.baseline, self.values = baseline, values
        self.targets = as_array(baseline.targets)
        # without these buffers, allocating memory takes more than half of the time of simple arithmetic
        shape = most, values.shape[1]
        self.gathered = values.new_empty(shape)
        self.after, self.scratch, self.before, self.softmax = (baseline.norms.new_empty(shape) for _ in range(4))
        self.numbers: list[int] | None = None
        self.original: Array = None
        self.chances: Array = None

    def piece(self, rows: Tensor, where: Tensor) -> tuple[Array, ...]:
        """Return the columns of ``RowDifferences`` for sorted rows (N,) whose values are ``values[where]``."""
        original, chances = self._originals(rows)
        injected = self._selected(self.values, where)
        change = after = as_array(self.after[: len(rows)].copy_(injected))
        likeliest = None if self.baseline.answers is None else likeliest_of(after)
        change -= original
        norms = row_norms(change)
        # where the baseline is finite, a change is finite if and only if the row is
        finite = finite_rows(injected, norms)
        if self.baseline.answers is None or likeliest is None:
            return finite, norms, None, None, None
        numbers = as_array(rows)
        before, targets = self.baseline.answers.chosen(numbers), self.targets[numbers]
        near = is_near(norms)
        if near.all():
            losses, apart = nearby(change, chances, targets, before)
        elif not near.any():
            losses, apart = self._far(injected, change, chances, targets, before)
        else:
            losses, apart = self._losses_and_divergences(near, injected, change, chances, targets, before)
        return finite, norms, losses, apart, _moved(before, *likeliest)

    def _far(
        self, injected: Tensor, change: Array, chances: Array, targets: Array, before: RowAnswers
    ) -> tuple[Array, Array]:
        """Return the losses and divergences of rows that a fault moved far."""
        after = as_array(self.scratch[: len(injected)].copy_(injected))
        answers = answers_of(after, targets, scratch=after)
        return answers.losses, divergences(change, chances, before, answers)

    def _losses_and_divergences(
        self, near: Array, injected: Tensor, change: Array, chances: Array, targets: Array, before: RowAnswers
    ) -> tuple[Array, Array]:
        losses, apart = before.losses + 0.0, before.losses + 0.0
        for some, far in ((near, False), (~near, True)):
            own = chances[some] if len(chances) > 1 else chances
            facts = change[some], own, targets[some], before.chosen(some)
            losses[some], apart[some] = self._far(injected[as_tensor(some)], *facts) if far else nearby(*facts)
        return losses, apart

    def _originals(self, rows: Tensor) -> tuple[Array, Array]:
        """Return the baseline's rows and their softmax, (N, V), or (1, V) if all are one row; None for an encoder."""
        numbers = rows.tolist()
        distinct = list(dict.fromkeys(numbers))
        if distinct != self.numbers:
            self.numbers, answers = distinct, self.baseline.answers
            some = torch.tensor(distinct, dtype=torch.int64, device=rows.device)
            known = slice(0, len(distinct))
            self.original = as_array(self.before[known].copy_(self._selected(self.baseline.values, some)))
            if answers is not None:
                self.chances = chances_of(self.original, answers.chosen(as_array(some)), as_array(self.softmax[known]))
        if 1 < len(distinct) < len(rows):
            place = {number: i for i, number in enumerate(distinct)}
            inverse = [place[number] for number in numbers]
            return self.original[inverse], None if self.chances is None else self.chances[inverse]
        return self.original, self.chances

    def _selected(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return some rows; the next call overwrites them."""
        if len(rows) == 1:
            return values.narrow(0, int(rows), 1)
        return torch.index_select(values, 0, rows, out=self.gathered[: len(rows)])


def _moved(before: RowAnswers, top: Array, largest: Array) -> Array:
    # x - x is 0 only for finite numbers
    existed, exists = before.largest - before.largest == 0.0, largest - largest == 0.0
    return (existed ^ exists) | (existed & exists & (before.top != top))
