"""A fault in one channel of one query: the logits of its row change along the keys (T22)."""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms, product_slack, through_softmax
from bounds.effects.closed_form import ClosedForm, Place
from bounds.effects.flips import Flips, flipped, overflowed
from bounds.effects.head_terms import HeadTerms, row_slices
from bounds.effects.head_view import LogitMap, head_view, in_units_of, softmax_change
from bounds.effects.severity_terms import Index, SeverityTerms


def exact(state: AttentionState, index: Place, after: float, logit_map: LogitMap, effect: Tensor) -> None:
    """Write the change of out into ``effect`` (T20-T25)."""
    batch, head, row, column = index
    view = head_view(state, batch, head)
    added = state.score_factor * (after - view.query[row, column]) * view.key[:, column]
    change = softmax_change(
        view.log_weights[row], view.weights[row], view.top[row], logit_map.change(view.scores[row], added)
    )
    effect[batch, head, row] = change @ view.value


def severity(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    """Return the predicted severity of many faults."""
    batch, head, row, channel = index
    key, value = terms.tensors["key"], terms.tensors["value"]
    shared = head // terms.group
    log_weights = terms.tensors["log_weights"][batch, head, row].double()
    delta = terms.slope * added[:, None] * key[batch, shared, :, channel].double()
    top = log_weights.argmax(-1, keepdim=True)
    change = softmax_change(log_weights, log_weights.exp(), top, delta)
    moved = torch.empty_like(added)
    place = batch * key.shape[1] + shared
    for one in place.unique():
        mine = place == one
        moved[mine] = (change[mine] @ value.flatten(0, 1)[one].double()).norm(dim=-1)
    return terms.relative(moved, (batch, head, row))


def sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all elements."""
    (terms,) = readers
    view, state = terms.view, terms.state
    after = flipped(before, bit)
    added = state.score_factor * (after.double() - before.double())
    limit = torch.finfo((state.logits if state.scores is None else state.scores).dtype).max
    effect, relative, noise, loss = torch.empty((4, *before.shape), dtype=torch.float64, device=before.device)
    bad = ~torch.isfinite(after)
    for channels in row_slices(before.shape[1], view.scores.numel()):
        raw = added[:, channels, None] * view.key.mT[None, channels]
        raised = logit_map.logit(overflowed(view.scores[:, None] + raw, limit))
        highest = torch.where(view.visible[:, None], raised, -torch.inf).amax(-1)
        exposed = raised.amax(-1) if logit_map.mask_added else highest
        bad[:, channels] |= ~(exposed <= limit) | (highest < -limit)
        change = softmax_change(
            view.log_weights[:, None],
            view.weights[:, None],
            view.top[:, None],
            logit_map.change(view.scores[:, None], raw),
        )
        moved = change @ view.value
        effect[:, channels] = moved.square().sum(-1).sqrt()
        relative[:, channels] = in_units_of(effect[:, channels], terms.length[:, None])
        noise[:, channels] = (moved.abs() / terms.noise[:, None]).amax(-1)
        loss[:, channels] = (moved @ terms.gradient[..., None])[..., 0]
    counted = terms.rows_seen.expand(before.shape)
    return Flips("q", bit, (terms.batch, terms.head), before, after, effect, relative, noise, loss, bad, counted)


def bound(state: AttentionState, terms: CertificateTerms, error: Tensor) -> Tensor:
    """Return the bound of the certificate (T26) for an error of at most ``error``."""
    real = terms.scaling * error * 2 * terms.key_radius
    return through_softmax(terms, real + product_slack(terms, terms.scaling * error * terms.longest_key))


CLOSED_FORM = ClosedForm(
    name="q",
    exact=exact,
    parts=("key", "value", "log_weights"),
    severity=severity,
    sweeps={"q": sweep},
    bound=bound,
)
