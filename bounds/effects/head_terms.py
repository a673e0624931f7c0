"""The terms that the effects of all faults of one query head share, computed once.

    terms = head_terms(state, gradient, batch=0, head=3)
    terms.pull                                 # (T, S): first-order change of the loss if row i moves towards v_j

For T rows, S keys and D_v channels this costs O(T S D_v); each bit of each element is then a closed form on top.

>>> row_slices(5, width=BLOCK_ELEMENTS // 2)
[slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.head_view import HeadView, head_view
from bounds.numerics.blocks import BLOCK_ELEMENTS
from bounds.numerics.rounding import accumulation, gamma, storage


@dataclass(frozen=True, eq=False)
class HeadTerms:
    """The terms that the effects of all faults of one query head share; float64, without sinks.

    Attributes:
        state, batch, head, view: whose they are.
        gradient: (T, D_v), derivative of the loss by out.
        noise: (T, D_v), rounding bound of the clean evaluation of each element of out (P4).
        length: (T,), of the rows of out.
        reach, reach_noise, pull: (T, S), of ``v_j - o_i``: its length, its largest element in units of the noise, its
            product with the gradient.
        value_noise, value_pull: (T, S), of v_j: its largest element in units of the noise of row i, its product with
            the gradient.
        mass_noise, mass_pull: (S, D_v), of the weights of key j: the largest in units of the noise, their product with
            the gradient.
    """

    state: AttentionState
    batch: int
    head: int
    view: HeadView
    gradient: Tensor
    noise: Tensor
    length: Tensor
    reach: Tensor
    reach_noise: Tensor
    pull: Tensor
    value_noise: Tensor
    value_pull: Tensor
    mass_noise: Tensor
    mass_pull: Tensor

    @property
    def rows_seen(self) -> Tensor:
        """Bool (T, 1): rows with a visible key; elsewhere softmax is undefined."""
        return self.view.visible.any(-1, keepdim=True)


def head_terms(state: AttentionState, gradient: Tensor, batch: int, head: int) -> HeadTerms:
    """Return the terms of query head ``head`` in sequence ``batch``; ``gradient`` has the shape of ``state.out``."""
    view = head_view(state, batch, head)
    slope, noise = gradient[batch, head].double(), _noise(state, view, batch, head)
    rows, keys, channels = *view.mass.shape, view.value.shape[-1]
    reach, reach_noise, pull, value_noise = torch.empty((4, rows, keys), dtype=torch.float64, device=noise.device)
    mass_noise = torch.zeros((keys, channels), dtype=torch.float64, device=noise.device)
    for block in row_slices(rows, view.key.shape[0] * channels):
        towards, scale = view.directions(block)[:, :keys], noise[block, None]
        reach[block] = towards.square().sum(-1).sqrt()
        reach_noise[block] = (towards.abs() / scale).amax(-1)
        pull[block] = (towards @ slope[block, :, None])[..., 0]
        value_noise[block] = (view.value[:keys].abs() / scale).amax(-1)
        mass_noise = torch.maximum(mass_noise, (view.mass[block, :, None].abs() / scale).amax(0))
    length = state.out[batch, head].double().square().sum(-1).sqrt()
    return HeadTerms(
        state=state,
        batch=batch,
        head=head,
        view=view,
        gradient=slope,
        noise=noise,
        length=length,
        reach=reach,
        reach_noise=reach_noise,
        pull=pull,
        value_noise=value_noise,
        value_pull=slope @ view.value[:keys].mT,
        mass_noise=mass_noise,
        mass_pull=view.mass.mT @ slope,
    )


def _noise(state: AttentionState, view: HeadView, batch: int, head: int) -> Tensor:
    arithmetic, stored = accumulation(state.out.dtype), storage(state.out.dtype)
    n = view.visible.sum(-1, keepdim=True).double()
    magnitude = view.mass.abs() @ view.value[: view.keys].abs()
    out = state.out[batch, head].double().abs()
    absolute = stored.absolute + (n + 2) * arithmetic.underflow
    return gamma(n + 2, arithmetic.roundoff) * magnitude + stored.roundoff * out + absolute


def row_slices(count: int, width: int) -> list[slice]:
    """Cut ``count`` rows of ``width`` elements into slices of bounded size."""
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    return [slice(start, start + step) for start in range(0, count, step)]
