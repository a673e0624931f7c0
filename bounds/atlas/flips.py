"""Every single-bit flip of one attention call, predicted in closed form: no model is run.

    for flips in every_flip(state, gradient, LogitMap(state.scaling)):
        flips.location, flips.bit, flips.loss            # one bit of all elements of one tensor of one head

T20-T25 of docs/theory.md give the change of out, the gradient of the loss turns it into a first-order change of the
loss. For the scores of a head with n keys and d channels this costs O(n^2 (d + bits)): the distances between
values and outputs once, then one closed form per bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.flips import Flips
from bounds.effects.forms import CLOSED_FORMS, scores
from bounds.effects.head_terms import HeadTerms, head_terms
from bounds.effects.head_view import LogitMap
from fault_injection.locations import LOCATION_TABLE
from fault_injection.numbers.bits import float_format


def every_flip(
    state: AttentionState, gradient: Tensor, logit_map: LogitMap | None, locations: Collection[str] | None = None
) -> Iterator[Flips]:
    """Yield all single-bit flips of an attention call, one bit of one head's tensor at a time.

    Args:
        state: a fault-free call.
        gradient: (B, H, T, D_v), derivative of the loss by ``state.out``.
        logit_map: how scores become logits; None leaves out scores, q and k.
        locations: which to predict, of q, k, v, scores, weights, masked weights, out (default: all).
    """
    group = state.query.shape[1] // state.key.shape[1]
    for batch in range(state.query.shape[0]):
        for shared in range(state.key.shape[1]):
            readers = [head_terms(state, gradient, batch, shared * group + member) for member in range(group)]
            for form in CLOSED_FORMS:
                row = LOCATION_TABLE[form.name]
                if (row.through_softmax and logit_map is None) or getattr(state, row.tensor) is None:
                    continue
                chosen = [sweep for name, sweep in form.sweeps.items() if locations is None or name in locations]
                for sweep in chosen:
                    for heads in [readers] if row.shared else [[reader] for reader in readers]:
                        tensor = _tensor(heads[0], form.name)
                        for bit in range(float_format(tensor.dtype).width):
                            yield sweep(heads, tensor, bit, logit_map or LogitMap(1.0))


def score_flips(terms: HeadTerms, bit: int, logit_map: LogitMap) -> Flips:
    """Return the flips of ``bit`` in the scores of one head."""
    return scores.sweep([terms], _tensor(terms, "scores"), bit, logit_map)


def _tensor(terms: HeadTerms, location: str) -> Tensor:
    """Return the tensor of a head, (rows, columns), without the columns of sinks."""
    row = LOCATION_TABLE[location]
    tensor: Tensor = getattr(terms.state, row.tensor)
    head = terms.head // (terms.state.query.shape[1] // tensor.shape[1])
    return tensor[terms.batch, head, :, : terms.view.keys] if row.over_pairs else tensor[terms.batch, head]
