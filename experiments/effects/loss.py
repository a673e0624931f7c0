"""The answer of a model, and the loss of that answer.

This module computes losses from the logits, in float64 and in the same way for every model, so they do not depend on
how a model class reduces its own loss. It converts logits in small pieces, so peak memory grows only by megabytes. It
never replaces a NaN or infinity: they give a NaN or infinite loss. ``experiments.effects.row_kernels`` has the
arithmetic on rows.

    outputs = model(**model_inputs(batch))
    evaluation = loss_and_logits("causal", outputs, batch)     # .loss, .sequence_losses, .output

>>> logits = torch.tensor([[[0.0, 0.0], [3.0, 1.0]]])
>>> evaluation = loss_and_logits("causal", logits, {"input_ids": torch.tensor([[0, 1]])})
>>> round(evaluation.loss, 6), evaluation.sequence_losses.shape    # one target: the second token, probability 1/2
(0.693147, torch.Size([1]))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.effects.row_kernels import (
    answers_of,
    as_array,
    as_tensor,
    pieces,
    quiet,
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


def _answer(outputs: Any, name: str) -> Tensor:
    answer = outputs if isinstance(outputs, Tensor) else getattr(outputs, name, None)
    if not isinstance(answer, Tensor) or answer.ndim != 3:
        shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
        raise UsageError(
            f"outputs: got {type(outputs).__name__}{shape}, allowed a 3-D tensor or an object with .{name}"
        )
    return answer


def _same_shape(baseline: Tensor, injected: Tensor) -> None:
    if baseline.shape != injected.shape:
        raise ValueError(f"injected: got shape {tuple(injected.shape)}, allowed the baseline's {tuple(baseline.shape)}")
