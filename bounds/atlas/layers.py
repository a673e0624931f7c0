"""The atlas of a model's attention: what every single-bit flip does, computed from one fault-free pass.

    python -m bounds.atlas MODEL --seq-len 64 --output atlas/

    with patched(model):
        for layer in compute_atlas(model, {"input_ids": ids}):
            layer.ranking[0]                                # the flip with the largest predicted change of the loss

The change of a layer's output is exact up to rounding (docs/theory.md, T20-T25). The change of the loss is its product
with one gradient: first order, a ranking and no bound. Flips that give NaN or Inf are a class of their own, as are
those that P4 proves to be no larger than the rounding of the clean evaluation.

>>> from bounds import AttentionState
>>> generator = torch.Generator().manual_seed(0)
>>> q, k, v, gradient = torch.randn(4, 1, 1, 3, 2, generator=generator)
>>> a = q @ k.mT
>>> w = torch.softmax(a, -1)
>>> state = AttentionState(query=q, key=k, value=v, logits=a, scores=a, weights=w, out=w @ v, scaling=1.0,
...                        kv_equal=False, has_bias_or_cap=False)
>>> atlas = layer_atlas(ObservedCall(state, gradient, LogitMap(1.0)), top=1)
>>> atlas.statistics["scores", 22].flips, atlas.statistics["v", 0].noise_level
(9, 6)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bounds.atlas.flips import every_flip, score_flips
from bounds.atlas.states import ObservedCall, observe
from bounds.atlas.statistics import FlipStatistics, RankedFlip, Ranking
from bounds.effects.fault_effect import LOCATIONS, effect_reason
from bounds.effects.head_terms import head_terms
from bounds.effects.head_view import LogitMap


@dataclass(frozen=True, eq=False)
class LayerAtlas:
    """The predictions for one attention call.

    Attributes:
        layer, name: number and qualified name of the attention core.
        statistics: by (location, bit). The locations are those of faults, and "masked weights": weights of keys that
            the query does not see.
        ranking: the finite flips with the largest predicted |loss change|, the worst first.
        reasons: by location, why nothing is predicted there.
        elements_dtype: by location, the format whose bits are flipped.
    """

    layer: int
    name: str
    statistics: Mapping[tuple[str, int], FlipStatistics]
    ranking: tuple[RankedFlip, ...]
    reasons: Mapping[str, str]
    elements_dtype: Mapping[str, torch.dtype]


@torch.no_grad()
def layer_atlas(call: ObservedCall, top: int = 20, locations: Collection[str] | None = None) -> LayerAtlas:
    """Predict every single-bit flip of one attention call.

    Args:
        call: a fault-free call with the gradient at its output.
        top: how many flips the ranking keeps.
        locations: which to predict (default: all).

    Temporary memory is a few matrices of one head; nothing of size (bits, n, n) is kept.
    """
    state = call.state
    layer = -1 if state.layer is None else state.layer
    statistics: dict[tuple[str, int], FlipStatistics] = {}
    dtypes: dict[str, torch.dtype] = {}
    ranking = Ranking(top, layer)
    for flips in every_flip(state, call.gradient, call.logit_map, locations):
        statistics.setdefault((flips.location, flips.bit), FlipStatistics()).add(flips)
        dtypes[flips.location] = flips.before.dtype
        ranking.add(flips)
    reasons = {location: effect_reason(state, location, call.logit_map) for location in LOCATIONS}
    given = {location: reason for location, reason in reasons.items() if reason is not None}
    return LayerAtlas(layer, state.name, statistics, ranking.worst(), given, dtypes)


def compute_atlas(
    model: nn.Module, inputs: Mapping[str, Any], layers: Collection[int] | None = None, *, top: int = 20
) -> list[LayerAtlas]:
    """Predict every single-bit flip in the attention of a patched causal language model.

    Args:
        model: patched (``fault_injection.patched``), in evaluation mode.
        inputs: keyword arguments of one forward pass, with ``input_ids`` (B, T).
        layers: numbers of the attention cores (default: all).
        top: how many flips the ranking of each layer keeps.

    Raises:
        ValueError: a layer that does not exist, fewer than two tokens, or a model without next-token logits.
    """
    return [layer_atlas(call, top) for call in observe(model, inputs, layers)]


@torch.no_grad()
def score_map(call: ObservedCall, bit: int) -> Tensor:
    """Return the predicted |loss change| of flipping ``bit`` of every score, (T, S) float64, the largest of all heads.

    Hidden keys and flips that give NaN or Inf are NaN.

    Raises:
        ValueError: when the scores of this call have no closed form.
    """
    if (reason := effect_reason(call.state, "scores", call.logit_map)) is not None:
        raise ValueError(f"scores of {call.state.name or 'this state'}: {reason}")
    largest = torch.full((call.state.rows[2], call.state.key.shape[2]), -1.0, dtype=torch.float64)
    for batch in range(call.state.rows[0]):
        for head in range(call.state.rows[1]):
            flips = score_flips(head_terms(call.state, call.gradient, batch, head), bit, call.logit_map or LogitMap(1))
            harm = torch.where(flips.counted & ~flips.nonfinite, flips.loss.abs(), -1.0)
            largest = torch.maximum(largest, harm.cpu())
    return torch.where(largest < 0, torch.nan, largest)
