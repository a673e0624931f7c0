"""The KL divergence of two tables of logits, through the kernels that a campaign uses."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.effects.row_kernels import answers_of, as_array, as_tensor, chances_of, divergences, pieces, quiet
from experiments.inputs.batches import IGNORED


@quiet
def kl_per_position(baseline: Tensor, injected: Tensor) -> Tensor:
    """Return ``KL(softmax(baseline) || softmax(injected))`` in nats for every row.

    Args:
        baseline: Logits (N, V), any floating dtype.
        injected: Logits (N, V).

    Returns:
        (N,) float64; 0 for equal rows, never negative, NaN or infinite where logits are not finite.
    """
    found = torch.empty(len(baseline), dtype=torch.float64, device=baseline.device)
    for piece in pieces(*baseline.shape):
        before, after = as_array(baseline[piece].double()), as_array(injected[piece].double())
        none = as_array(torch.full((len(before),), IGNORED, device=baseline.device))
        answers = answers_of(before, none), answers_of(after, none)
        found[piece] = as_tensor(divergences(after - before, chances_of(before, answers[0]), *answers))
    return found
