"""The effect of one changed element on a layer's output, in closed form (docs/theory.md, T20-T25).

>>> from bounds.effects.head_view import plain_logit_map
>>> query, value = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
>>> scores, weights = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
>>> state = AttentionState(query=query, key=query, value=value, scores=scores, logits=scores, weights=weights,
...                        out=weights @ value, scaling=1.0, kv_equal=False, has_bias_or_cap=False)
>>> changed = local_effect(state, "scores", (0, 0, 1, 0), after=-41.5, logit_map=plain_logit_map(state))
>>> changed[0, 0].round(decimals=6).tolist()        # out after the fault minus out before it: row 1 of head 0 moves
[[0.0, 0.0], [-0.5, 0.5]]

The formulas hold in real arithmetic and are evaluated in float64; the model's own arithmetic differs by rounding.
Scores, queries and keys act through the softmax, so that only *differences* of logits matter: a position bias or a
shift of a whole row drops out, a soft cap does not and must be known (``LogitMap``). Masked scores have no effect. A
masked weight has one: it multiplies its value like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.forms import CLOSED_FORMS
from bounds.effects.head_view import LogitMap
from fault_injection.locations import LOCATION_TABLE

LOCATIONS = CLOSED_FORMS.names()
"""The locations whose faults have a closed form."""


def effect_reason(state: AttentionState, location: str, logit_map: LogitMap | None) -> str | None:
    """Return why the effect of a fault in ``location`` has no closed form here, or None when it has one.

    Raises:
        ValueError: for an unknown location.
    """
    CLOSED_FORMS.check(location)
    if location == "scores" and state.scores is None:
        return "this state does not carry the scores"
    if LOCATION_TABLE[location].through_softmax and logit_map is None:
        return "it is not known how the scores become logits (a soft cap changes differences, a bias does not)"
    return None


@torch.no_grad()
def local_effect(
    state: AttentionState,
    location: str,
    index: tuple[int, int, int, int],
    after: float,
    logit_map: LogitMap | None = None,
) -> Tensor:
    """Return how ``state.out`` changes when one element of one tensor becomes ``after``, all later steps recomputed.

    Args:
        state: a fault-free call.
        location: ``q k v scores weights out``. Keys and values are two tensors here, even where the model ties them.
        index: (batch, head, row, column) in that tensor; the head of k and v is a key/value head, which all query
            heads of its group read.
        after: the new value, finite (or -inf for a score: the key disappears).
        logit_map: how scores become logits; needed for q, k and scores.

    Returns:
        (B, H, T, D_v), float64; zero where nothing changes. Formulas T20-T25 of docs/theory.md.

    Raises:
        ValueError: when there is no closed form (``effect_reason``) or no such location.
    """
    if (reason := effect_reason(state, location, logit_map)) is not None:
        raise ValueError(f"the effect of a fault in {location} of {state.name or 'this state'}: {reason}")
    effect = torch.zeros(state.out.shape, dtype=torch.float64, device=state.out.device)
    # Out, values and weights do not read the map.
    CLOSED_FORMS[location].exact(state, index, after, logit_map or LogitMap(1.0), effect)
    return effect
