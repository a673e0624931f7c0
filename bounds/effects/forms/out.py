"""A fault in one element of the output: nothing else moves."""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.certificate_terms import CertificateTerms
from bounds.effects.closed_form import ClosedForm, Place
from bounds.effects.flips import Flips, flipped
from bounds.effects.head_terms import HeadTerms
from bounds.effects.head_view import LogitMap, in_units_of
from bounds.effects.severity_terms import Index, SeverityTerms


def exact(state: AttentionState, index: Place, after: float, logit_map: LogitMap, effect: Tensor) -> None:
    """Write the change of out into ``effect`` (T20-T25)."""
    effect[index] = after - state.out[index].double()


def severity(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    """Return the predicted severity of many faults."""
    return terms.relative(added.abs(), index[:3])


def sweep(readers: list[HeadTerms], before: Tensor, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of one bit in all elements."""
    (terms,) = readers
    after = flipped(before, bit)
    added = after.double() - before.double()
    return Flips(
        "out",
        bit,
        (terms.batch, terms.head),
        before,
        after,
        effect=added.abs(),
        relative=in_units_of(added.abs(), terms.length[:, None]),
        noise_ratio=added.abs() / terms.noise,
        loss=added * terms.gradient,
        nonfinite=~torch.isfinite(after),
        counted=terms.rows_seen.expand(before.shape),
    )


def bound(state: AttentionState, terms: CertificateTerms, error: Tensor) -> Tensor:
    """Return the bound of the certificate (T26) for an error of at most ``error``."""
    return error


CLOSED_FORM = ClosedForm(
    name="out",
    exact=exact,
    parts=(),
    severity=severity,
    sweeps={"out": sweep},
    bound=bound,
)
