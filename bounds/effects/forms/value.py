"""A fault in one channel of one value: every row moves by its weight of the key."""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms, row_maximum, weighted_maximum, with_products
from bounds.effects.closed_form import ClosedForm, Place
from bounds.effects.flips import Flips, flipped, group_of
from bounds.effects.head_terms import HeadTerms
from bounds.effects.head_view import LogitMap, head_view, in_units_of, mass_of, readers_of
from bounds.effects.severity_terms import Index, SeverityTerms


def exact(state: AttentionState, index: Place, after: float, logit_map: LogitMap, effect: Tensor) -> None:
    """Write the change of out into ``effect`` (T20-T25)."""
    batch, head, row, column = index
    for reader in readers_of(state, head):
        view = head_view(state, batch, reader)
        effect[batch, reader, :, column] = view.mass[:, row] * (after - view.value[row, column])


def severity(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    """Return the predicted severity of many faults."""
    spread = terms.tensors["spread"][index[:3]].double()
    return torch.where(added == 0, 0.0, added.abs() * spread)


def sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all elements."""
    after = flipped(before, bit)
    added = after.double() - before.double()
    size = added.abs()
    masses = torch.stack([terms.view.mass.abs() for terms in readers])
    lengths = torch.stack([terms.length for terms in readers])
    noise = torch.stack([terms.mass_noise for terms in readers]).amax(0)
    pull = torch.stack([terms.mass_pull for terms in readers]).sum(0)
    share = in_units_of(masses, lengths[..., None]).amax((0, 1))[:, None]
    origin, counted = group_of(readers, before)
    return Flips(
        "v",
        bit,
        origin,
        before,
        after,
        effect=size * masses.square().sum((0, 1)).sqrt()[:, None],
        relative=torch.where(size == 0, 0.0, size * share),
        noise_ratio=size * noise,
        loss=added * pull,
        nonfinite=~(size * masses.amax((0, 1))[:, None] <= torch.finfo(readers[0].state.out.dtype).max),
        counted=counted,
    )


def bound(state: AttentionState, terms: CertificateTerms, error: Tensor) -> Tensor:
    """Return the bound of the certificate (T26) for an error of at most ``error``."""
    per_key = state.per_query_head(error)
    moved = weighted_maximum(mass_of(state), per_key)
    # The clean values may be longer than the stored ones by the error.
    grown = terms.product_growth * terms.total * row_maximum(per_key, terms.visible, terms.columns)
    return with_products(terms, moved + grown)


CLOSED_FORM = ClosedForm(
    name="v",
    exact=exact,
    parts=("spread",),
    severity=severity,
    sweeps={"v": sweep},
    bound=bound,
)
