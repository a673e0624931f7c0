"""A fault in one channel of one key: one logit changes in every row that sees it (T20)."""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms, product_slack, row_maximum, through_softmax
from bounds.effects.closed_form import ClosedForm, Place
from bounds.effects.flips import Flips, flipped, group_of, overflowed
from bounds.effects.head_terms import HeadTerms, row_slices
from bounds.effects.head_view import LogitMap, head_view, in_units_of, readers_of, score_tilt, tilted
from bounds.effects.severity_terms import Index, SeverityTerms, tilt_of


def exact(state: AttentionState, index: Place, after: float, logit_map: LogitMap, effect: Tensor) -> None:
    """Write the change of out into ``effect`` (T20-T25)."""
    batch, head, row, column = index
    for reader in readers_of(state, head):
        view = head_view(state, batch, reader)
        added = state.score_factor * (after - view.key[row, column]) * view.query[:, column]
        effect[batch, reader] = tilted(view, row, logit_map.change(view.scores[:, row], added))


def severity(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    """Return the predicted severity of many faults."""
    batch, shared, key, channel = index
    largest = torch.zeros_like(added)
    for reader in range(terms.group):
        head = shared * terms.group + reader
        query = terms.tensors["query"][batch, head, :, channel].double()
        tilt = tilt_of(terms.tensors["log_weights"][batch, head, :, key], terms.slope * added[:, None] * query)
        moved = tilt.abs() * terms.tensors["reach"][batch, head, :, key].double()
        largest = torch.maximum(largest, terms.relative(moved, (batch, head)).amax(-1))
    return largest


def sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all elements."""
    state, keys = readers[0].state, before.shape[0]
    after = flipped(before, bit)
    added = state.score_factor * (after.double() - before.double()).mT
    limit = torch.finfo((state.logits if state.scores is None else state.scores).dtype).max
    # (channels, keys) here: a channel of all keys is a row of scores.
    squares, relative, noise, loss = torch.zeros((4, *added.shape), dtype=torch.float64, device=before.device)
    bad = ~torch.isfinite(after).mT
    for terms in readers:
        view = terms.view
        scores = view.scores[:, None, :keys]
        exposed = (view.visible | logit_map.mask_added)[:, None, :keys] & terms.rows_seen[:, None]
        for channels in row_slices(added.shape[0], view.mass.numel()):
            raw = view.query[:, channels, None] * added[None, channels]
            tilt = score_tilt(
                view.log_weights[:, None, :keys], view.others[:, None, :keys], logit_map.change(scores, raw)
            )
            moved = tilt.abs() * terms.reach[:, None]
            squares[channels] += moved.square().sum(0)
            share = in_units_of(moved, terms.length[:, None, None]).amax(0)
            relative[channels] = torch.maximum(relative[channels], share)
            noise[channels] = torch.maximum(noise[channels], (tilt.abs() * terms.reach_noise[:, None]).amax(0))
            loss[channels] += (tilt * terms.pull[:, None]).sum(0)
            bad[channels] |= (exposed & ~(logit_map.logit(overflowed(scores + raw, limit)) <= limit)).any(0)
    origin, counted = group_of(readers, before)
    effect, relative, noise, loss = (part.mT for part in (squares.sqrt(), relative, noise, loss))
    return Flips("k", bit, origin, before, after, effect, relative, noise, loss, bad.mT, counted)


def bound(state: AttentionState, terms: CertificateTerms, error: Tensor) -> Tensor:
    """Return the bound of the certificate (T26) for an error of at most ``error``."""
    reached = row_maximum(state.per_query_head(error), terms.visible, terms.columns)
    real = terms.scaling * reached * terms.largest_query
    return through_softmax(terms, real + product_slack(terms, terms.scaling * reached * terms.query_length))


CLOSED_FORM = ClosedForm(
    name="k",
    exact=exact,
    parts=("query", "log_weights", "reach"),
    severity=severity,
    sweeps={"k": sweep},
    bound=bound,
)
