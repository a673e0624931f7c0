"""Measures of a fault's effect on the output: loss, KL divergence, changed predictions, change of hidden states.

This module computes losses from the logits, in float64 and in the same way for every model, so they do not depend on
how a model class reduces its own loss. It converts logits in small pieces, so peak memory grows only by megabytes. It
never
replaces a NaN or infinity: they give a NaN or infinite loss. ``experiments.effects.row_kernels`` has the arithmetic on
rows.

    outputs = model(**model_inputs(batch))
    evaluation = loss_and_logits("causal", outputs, batch)     # .loss, .sequence_losses, .output

>>> logits = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]])
>>> evaluation = loss_and_logits("causal", logits, {"input_ids": torch.tensor([[0, 1]])})
>>> round(evaluation.loss, 6), evaluation.sequence_losses.shape    # one target: the second token, probability 1/2
(0.693147, torch.Size([1]))
>>> top1_changed(logits, -logits)
1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.effects.row_kernels import (
    answers_of,
    as_array,
    as_tensor,
    chances_of,
    divergences,
    pieces,
    quiet,
    row_norms,
)
from experiments.errors import UsageError
from experiments.inputs.batches import IGNORED
from experiments.inputs.families import FAMILIES
from experiments.registry import loaded


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The answer of one forward pass.

    Attributes:
        loss: Mean cross-entropy over all targets of the batch, in nats per token; None for an encoder.
        sequence_losses: The mean over the targets of each sequence, (B,) float64; None for an encoder.
        output: The logits (B, T, V), or the last hidden state (B, T, D) of an encoder, as the model gave them.
    """

    loss: float | None
    sequence_losses: Tensor | None
    output: Tensor


class RelativeChange(NamedTuple):
    """The distance of one tensor from another.

    Attributes:
        l2_relative: ``||injected - baseline|| / ||baseline||``.
        max_abs: ``max |injected - baseline|``.
    """

    l2_relative: float
    max_abs: float


def loss_and_logits(family: str, outputs: Any, batch: Mapping[str, Tensor]) -> Evaluation:
    """Return the logits (or hidden state) of a model's outputs, and their loss against the batch.

    Args:
        family: A name of ``FAMILIES``.
        outputs: The model's outputs, or the bare tensor.
        batch: A batch from ``validate_batch``, on any device.

    Raises:
        UsageError: The family is unknown, the outputs have no logits, or a sequence has no target.
    """
    output = output_of(family, outputs)
    targets = checked_targets(family, output, batch)
    if targets is None:
        return Evaluation(None, None, output)
    flat = targets.flatten()
    losses = torch.zeros(len(flat), dtype=torch.float64, device=output.device)
    losses[flat != IGNORED] = token_losses(output.flatten(0, 1), flat)
    means, sequence_means = mean_losses(losses.unsqueeze(0), targets)
    return Evaluation(means[0], sequence_means[0], output)


def output_of(family: str, outputs: Any) -> Tensor:
    """Take the logits (or hidden state) out of a model's outputs. Raises UsageError for outputs without them."""
    return _answer(outputs, FAMILIES.find(family).answer)


def checked_targets(family: str, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the targets (B, T) of an output (B, T, V), on its device; None for an encoder.

    Raises:
        UsageError: The family is unknown, the labels have another shape, or a sequence has no target.
    """
    if not FAMILIES.find(family).targets:
        return None
    targets = aligned_targets(family, batch).to(output.device)
    if targets.shape != output.shape[:2]:
        raise UsageError(
            f"labels: got shape {tuple(targets.shape)} for logits of {tuple(output.shape)}; allowed (B, T)"
        )
    missing = (targets == IGNORED).all(dim=1)
    if bool(missing.any()):
        empty = missing.nonzero().flatten().tolist()
        raise UsageError(
            f"labels: sequences {empty} of the batch have no target; allowed one or more in every sequence"
        )
    return targets


@quiet
def mean_losses(losses: Tensor, targets: Tensor) -> tuple[list[float], Tensor]:
    """Return the mean losses of passes, and of their sequences.

    Args:
        losses: (R, B * T) float64, one row for each pass, 0 at positions without a target.
        targets: (B, T), the targets of each pass.

    Returns:
        R floats, the means over all targets; and (R, B) float64, the means over the targets of each sequence, which do
        not depend on the other sequences of the batch.
    """
    B, T = targets.shape
    counts = (targets != IGNORED).sum(dim=1)
    sums = as_array(losses).reshape(-1, B, T).sum(axis=-1)
    means: list[float] = (sums.sum(axis=-1) / int(counts.sum())).tolist()
    return means, as_tensor(sums) / counts


def aligned_targets(family: str, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the token that each position of the logits should predict.

    Returns:
        (B, T) int64 on the device of the batch, ``IGNORED`` (-100) at positions without a target.
    """
    known = FAMILIES.find(family)
    if known.needs_labels and "labels" not in batch:
        raise UsageError(f"labels: missing; a batch of a {family} model must carry them, -100 where there is no target")
    targets: Tensor = loaded(known.targets)(batch)
    return targets


@quiet
def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every target, ``-log softmax(logits)[target]``, in nats.

    Args:
        logits: (N, V), any floating dtype.
        targets: (N,) int64 in ``0 .. V - 1``, or -100 for none.

    Returns:
        (N',) float64, one for each of the N' targets that are not -100, in their order.
    """
    rows = (targets != IGNORED).nonzero().flatten()
    losses = torch.empty(len(rows), dtype=torch.float64, device=logits.device)
    for piece in pieces(len(rows), logits.shape[-1]):
        chosen = rows[piece]
        values = as_array(logits.index_select(0, chosen).double())
        losses[piece] = as_tensor(answers_of(values, as_array(targets[chosen]), scratch=values).losses)
    return losses


@quiet
def kl_per_position(baseline: Tensor, injected: Tensor) -> Tensor:
    """Return ``KL(softmax(baseline) || softmax(injected))`` in nats for every row.

    Args:
        baseline: Logits (N, V), any floating dtype.
        injected: Logits (N, V).

    Returns:
        (N,) float64; 0 for equal rows, never negative, and NaN or infinite if logits are not finite.
    """
    _same_shape(baseline, injected)
    found = torch.empty(len(baseline), dtype=torch.float64, device=baseline.device)
    for piece in pieces(*baseline.shape):
        before, after = as_array(baseline[piece].double()), as_array(injected[piece].double())
        none = as_array(torch.full((len(before),), IGNORED, device=baseline.device))
        answers = answers_of(before, none), answers_of(after, none)
        found[piece] = as_tensor(divergences(after - before, chances_of(before, answers[0]), *answers))
    return found


def kl_mean(baseline: Tensor, injected: Tensor, mask: Tensor | None = None) -> float:
    """Return the mean over positions of ``KL(baseline || injected)`` in nats.

    Args:
        baseline: Logits (B, T, V).
        injected: Logits (B, T, V).
        mask: Bool (B, T), True where a position counts; None for all.

    Raises:
        ValueError: Different shapes, or no position counts.
    """
    rows = _counted(baseline, injected, mask)
    return float(kl_per_position(*rows).mean())


def top1_changed(baseline: Tensor, injected: Tensor, mask: Tensor | None = None) -> int:
    """Return the number of positions whose most likely token changes.

    Of equal logits the first one wins. If the largest logit is not finite (a NaN or +infinity anywhere, or only
    -infinity), softmax is NaN and the position has no most likely token. Such a position counts as changed, unless the
    baseline has none there either.

    Args:
        baseline: Logits (B, T, V).
        injected: Logits (B, T, V).
        mask: Bool (B, T), True where a position counts; None for all.

    Raises:
        ValueError: Different shapes, or no position counts.
    """
    before, after = _counted(baseline, injected, mask)
    before_exists, after_exists = before.amax(dim=-1).isfinite(), after.amax(dim=-1).isfinite()
    moved = before_exists & after_exists & (before.argmax(dim=-1) != after.argmax(dim=-1))
    return int((moved | (before_exists ^ after_exists)).sum())


@quiet
def relative_change(baseline: Tensor, injected: Tensor, mask: Tensor | None = None) -> RelativeChange:
    """Measure how far the injected hidden state is from the baseline's, in float64.

    Args:
        baseline: (B, T, D), any floating dtype, finite and not all zero.
        injected: (B, T, D).
        mask: Bool (B, T), True where a position counts; None for all.

    Returns:
        Exactly 0 and 0 for equal tensors; NaN or infinite if ``injected`` is.

    Raises:
        ValueError: The shapes differ, no position counts, or the baseline is all zeros.
    """
    before, after = (rows.double() for rows in _counted(baseline, injected, mask))
    size = _norm(before)
    if size == 0.0:
        raise ValueError("baseline: got nothing but zeros, so no change is relative to it")
    change = after - before
    return RelativeChange(_norm(change) / size, float(change.abs().amax()))


def _answer(outputs: Any, name: str) -> Tensor:
    answer = outputs if isinstance(outputs, Tensor) else getattr(outputs, name, None)
    if not isinstance(answer, Tensor) or answer.ndim != 3:
        shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
        raise UsageError(
            f"outputs: got {type(outputs).__name__}{shape}, allowed a 3-D tensor or an object with .{name}"
        )
    return answer


def _counted(baseline: Tensor, injected: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both tensors as rows (N, V), without the positions that do not count."""
    _same_shape(baseline, injected)
    if mask is None:
        before, after = baseline.flatten(0, -2), injected.flatten(0, -2)
    elif mask.dtype != torch.bool or mask.shape != baseline.shape[:-1]:
        raise ValueError(f"mask: got {mask.dtype} {tuple(mask.shape)}, allowed bool {tuple(baseline.shape[:-1])}")
    elif bool(mask.all()):
        return _counted(baseline, injected, None)
    else:
        before, after = baseline[mask.to(baseline.device)], injected[mask.to(injected.device)]
    if len(before) == 0:
        raise ValueError("mask: got no position that counts, allowed one or more")
    return before, after


def _same_shape(baseline: Tensor, injected: Tensor) -> None:
    if baseline.shape != injected.shape:
        raise ValueError(f"injected: got shape {tuple(injected.shape)}, allowed the baseline's {tuple(baseline.shape)}")


def _norm(rows: Tensor) -> float:
    return float(row_norms(row_norms(as_array(rows))[None, :])[0])
