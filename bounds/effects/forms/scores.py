"""A fault in one score: one logit of one row changes (T20)."""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms, through_softmax
from bounds.effects.closed_form import ClosedForm, Place
from bounds.effects.flips import Flips, flipped
from bounds.effects.head_terms import HeadTerms
from bounds.effects.head_view import LogitMap, head_view, in_units_of, score_tilt, tilted
from bounds.effects.severity_terms import Index, SeverityTerms, tilt_of


def exact(state: AttentionState, index: Place, after: float, logit_map: LogitMap, effect: Tensor) -> None:
    """Write the change of out into ``effect`` (T20-T25)."""
    batch, head, row, column = index
    view = head_view(state, batch, head)
    delta = logit_map.change(view.scores[row, column], after - view.scores[row, column])
    effect[batch, head, row] = tilted(view, column, delta)[row]


def severity(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    """Return the predicted severity of many faults."""
    tilt = tilt_of(terms.tensors["log_weights"][index], terms.slope * added)
    return terms.relative(tilt.abs() * terms.tensors["reach"][index].double(), index[:3])


def sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all elements."""
    (terms,) = readers
    view, keys = terms.view, terms.view.keys
    after, scores = flipped(before, bit), view.scores[:, :keys]
    raised, others = logit_map.logit(after.double()), view.others[:, :keys]
    limit = torch.finfo(before.dtype).max
    tilt = score_tilt(view.log_weights[:, :keys], others, logit_map.change(scores, after.double() - scores))
    effect = tilt.abs() * terms.reach
    return Flips(
        "scores",
        bit,
        (terms.batch, terms.head),
        before,
        after,
        effect=effect,
        relative=in_units_of(effect, terms.length[:, None]),
        noise_ratio=tilt.abs() * terms.reach_noise,
        loss=tilt * terms.pull,
        # -inf removes a key, which is harmless unless it is the only one.
        nonfinite=~(raised <= limit) | ((raised < -limit) & (others == 0)),
        counted=view.visible[:, :keys],
    )


def bound(state: AttentionState, terms: CertificateTerms, error: Tensor) -> Tensor:
    """Return the bound of the certificate (T26) for an error of at most ``error``."""
    shifted = terms.slope * error * (1 + terms.logit_error)
    spread = shifted + terms.passes * terms.logit_error * terms.logit_size + terms.logit_floor
    return through_softmax(terms, spread / (1 - terms.logit_error))


CLOSED_FORM = ClosedForm(
    name="scores",
    exact=exact,
    parts=("log_weights", "reach"),
    severity=severity,
    sweeps={"scores": sweep},
    bound=bound,
)
