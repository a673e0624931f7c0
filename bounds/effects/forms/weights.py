"""A fault in one weight: its row moves along the value of the key, masked or not."""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms, with_products
from bounds.effects.closed_form import ClosedForm, Place
from bounds.effects.flips import Flips, flipped
from bounds.effects.head_terms import HeadTerms
from bounds.effects.head_view import LogitMap, head_view, in_units_of
from bounds.effects.severity_terms import Index, SeverityTerms


def exact(state: AttentionState, index: Place, after: float, logit_map: LogitMap, effect: Tensor) -> None:
    """Write the change of out into ``effect`` (T20-T25)."""
    batch, head, row, column = index
    view = head_view(state, batch, head)
    # What multiplies the value is the weight as the model casts it.
    stored = torch.tensor(after, dtype=torch.float64).to(state.weights.dtype)
    cast = stored if state.mass is None else stored.to(state.mass.dtype)
    effect[batch, head, row] = (cast.to(view.value) - view.mass[row, column]) * view.value[column]


def severity(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    """Return the predicted severity of many faults."""
    batch, head, _, key = index
    shared = head // terms.group
    length = terms.tensors["value"][batch, shared, key].double().norm(dim=-1)
    return terms.relative(added.abs() * length, index[:3])


def sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all weights of visible keys."""
    return _weights_where("weights", readers[0], before, bit, readers[0].view.visible)


def masked_sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all weights of hidden keys."""
    view = readers[0].view
    return _weights_where("masked weights", readers[0], before, bit, ~view.visible & view.visible.any(-1, keepdim=True))


def _weights_where(location: str, terms: HeadTerms, before: Tensor, bit: int, counted: Tensor) -> Flips:
    view, value = terms.view, terms.view.value[: terms.view.keys]
    after = flipped(before, bit)
    cast = after if terms.state.mass is None else after.to(terms.state.mass.dtype)
    added = cast.double() - view.mass
    effect = added.abs() * value.square().sum(-1).sqrt()
    largest = added.abs() * value.abs().amax(-1)
    return Flips(
        location,
        bit,
        (terms.batch, terms.head),
        before,
        after,
        effect=effect,
        relative=in_units_of(effect, terms.length[:, None]),
        noise_ratio=added.abs() * terms.value_noise,
        loss=added * terms.value_pull,
        nonfinite=~(largest <= torch.finfo(terms.state.out.dtype).max) | ~torch.isfinite(cast),
        counted=counted[:, : view.keys],
    )


def bound(state: AttentionState, terms: CertificateTerms, error: Tensor) -> Tensor:
    """Return the bound of the certificate (T26) for an error of at most ``error``."""
    recast = terms.cast.roundoff * (2 * terms.total + error) + 2 * terms.cast.absolute
    moved = (error + recast) * terms.longest_value[..., None]
    return with_products(terms, moved)


CLOSED_FORM = ClosedForm(
    name="weights",
    exact=exact,
    parts=("value",),
    severity=severity,
    sweeps={"weights": sweep, "masked weights": masked_sweep},
    bound=bound,
)
