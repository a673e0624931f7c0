"""Predict how far single faults move their layer's output, for many candidates at once, from a fault-free call.

    terms = severity_terms(state, "scores")
    terms.severity(indices, before, after)       # (N,) float64: largest change of a row of out, in units of its length

The formulas are T20-T25 of docs/theory.md, as in ``bounds.effects.fault_effect``, which follows one fault exactly. Here
the terms that all faults of a location share are computed once and kept in float32, and a candidate costs a few reads.
The result is a prediction for choosing faults (``fault.aim: effect``) and no bound: soft caps are treated as the
identity, and overflows inside the layer are ignored.

>>> q, k, v = torch.randn(3, 1, 1, 3, 2, generator=torch.Generator().manual_seed(0))
>>> a = q @ k.mT
>>> w = torch.softmax(a, -1)
>>> state = AttentionState(query=q, key=k, value=v, logits=a, scores=a, weights=w, out=w @ v, scaling=1.0,
...                        kv_equal=False, has_bias_or_cap=False)
>>> place, before = torch.tensor([[0, 0, 2, 1]]), state.out[0, 0, 2, 1].double()
>>> length = state.out[0, 0, 2].double().norm()
>>> found = severity_terms(state, "out").severity(place, before[None], (before + 0.5 * length)[None])
>>> round(float(found), 6)
0.5
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.forms import CLOSED_FORMS
from bounds.effects.head_view import head_view
from bounds.effects.severity_terms import PARTS, SHARED_PARTS, SeverityTerms
from fault_injection.locations import LOCATION_TABLE


@torch.no_grad()
def severity_terms(state: AttentionState, location: str) -> SeverityTerms:
    """Compute what the faults of ``location`` have in common, one query head after the other.

    Raises:
        ValueError: an unknown location.
    """
    form = CLOSED_FORMS[location]
    batches, heads = state.out.shape[:2]
    group = heads // state.key.shape[1]
    length = state.out.double().square().sum(-1).sqrt()
    kept: dict[str, list[Tensor]] = {name: [] for name in form.parts}
    for batch, head in itertools.product(range(batches), range(heads) if kept else ()):
        view = head_view(state, batch, head)
        for name, found in kept.items():
            if name not in SHARED_PARTS or head % group == 0:
                found.append(PARTS[name](view, length[batch, head]).float())
    tensors = {name: torch.stack(found).unflatten(0, (batches, -1)) for name, found in kept.items()}
    if "spread" in tensors:
        tensors["spread"] = tensors["spread"].unflatten(1, (-1, group)).amax(2)
    # A query or key reaches the logit by the whole scaling, a score by what is left of it behind the product.
    slope = state.scaling if LOCATION_TABLE[location].operand else state.scaling / state.score_factor
    return SeverityTerms(location, form.severity, slope, group, {**tensors, "length": length.float()})
