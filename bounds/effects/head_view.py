"""One query head of an attention call in float64, and the change of its output when its logits change.

Closed forms in real arithmetic (docs/theory.md, T20-T22), evaluated so that nothing overflows and nothing cancels.

>>> weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
>>> delta = torch.tensor([0.5, 0.0], dtype=torch.float64)                           # the logit of key 0 gains 0.5
>>> tilt = score_tilt(weights.log(), 1 - weights, delta)
>>> moved = weights[0] + tilt[0] * (1 - weights[0])
>>> expected = torch.softmax(weights.log() + delta, -1)[0]
>>> bool((moved - expected).abs() < 1e-15)
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.epsilon.bounds import visible_keys


@dataclass(frozen=True)
class LogitMap:
    """How a raw score becomes a logit, up to what is added to it or to its whole row.

    Attributes:
        slope: factor between the scores as the product returned them and the logits.
        cap: soft cap: logit = cap * tanh(slope * score / cap); None without one.
        mask_added: whether hidden keys keep their score under the mask, so that an infinite one is not hidden. Effects
            do not depend on it, only what is predicted to give NaN does.
    """

    slope: float
    cap: float | None = None
    mask_added: bool = True

    def logit(self, scores: Tensor) -> Tensor:
        """Return the logits of float64 ``scores``, without what is added to them."""
        scaled = self.slope * scores
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def change(self, scores: Tensor, added: Tensor) -> Tensor:
        """Return by how much the logits change when ``added`` is added to ``scores``; float64, broadcast."""
        if self.cap is None:
            return self.slope * added
        return self.logit(scores + added) - self.logit(scores)


def plain_logit_map(state: AttentionState) -> LogitMap | None:
    """Return the map of a state whose logits are its scaled scores, None for any other state.

    With a position bias alone pass ``LogitMap(state.scaling / state.score_factor)``; with a soft cap name it.
    """
    return LogitMap(state.scaling / state.score_factor) if state.has_bias_or_cap is False else None


@dataclass(frozen=True, eq=False)
class HeadView:
    """One query head of one sequence, float64; S' counts the keys and the columns of sinks, which have no key.

    Attributes:
        query: (T, d).
        key, value: (S', d) and (S', D_v), with rows of zeros for sinks.
        scores: (T, S'), raw; 0 for sinks.
        mass: (T, S), the factor of the values.
        visible: bool (T, S').
        log_weights, weights: (T, S'), the softmax of the stored logits over the visible keys; -inf and 0 elsewhere.
        others: (T, S'), ``1 - weights`` without cancellation.
        mean: (T, D_v), the rows of ``weights @ value``.
        top: (T, 1), the key with the largest weight.
        top_direction: (T, D_v), ``value[top] - mean`` without cancellation.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    mass: Tensor
    visible: Tensor
    log_weights: Tensor
    weights: Tensor
    others: Tensor
    mean: Tensor
    top: Tensor
    top_direction: Tensor

    @property
    def keys(self) -> int:
        """Number S of true keys, sinks left out."""
        return int(self.mass.shape[-1])

    def directions(self, rows: slice = slice(None)) -> Tensor:
        """Return ``value_j - mean_i``, (rows, S', D_v): where T20 moves row i when it moves weight towards key j."""
        top, moved = self.top[rows, :, None], self.top_direction[rows, None]
        difference = self.value[None] - self.mean[rows, None]
        return difference.scatter_(1, top.expand(-1, 1, difference.shape[-1]), moved)


def head_view(state: AttentionState, batch: int, head: int) -> HeadView:
    """Return the float64 tensors of query head ``head`` in sequence ``batch``."""
    shared = head // (state.query.shape[1] // state.key.shape[1])
    keys, columns = state.key.shape[2], state.logits.shape[-1]
    query, key, value = state.query[batch, head].double(), state.key[batch, shared], state.value[batch, shared]
    key, value = (torch.nn.functional.pad(t.double(), (0, 0, 0, columns - keys)) for t in (key, value))
    if state.scores is not None:
        scores = torch.nn.functional.pad(state.scores[batch, head].double(), (0, columns - keys))
    else:
        scores = state.score_factor * query @ key.mT
    visible = visible_keys(state.visible, state.logits.shape)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if visible is not None:
        seen = visible.expand(state.logits.shape)[batch, head]
    mass = mass_of(state)[batch, head]
    logits = torch.where(seen, state.logits[batch, head].double(), -math.inf)
    # A row without a visible key has no softmax; nothing is read from it.
    log_weights = torch.where(seen, torch.log_softmax(logits, -1), -math.inf)
    weights = log_weights.exp()
    top = weights.argmax(-1, keepdim=True)
    rest = weights.scatter(-1, top, 0.0)
    largest, remaining, elsewhere = weights.gather(-1, top), rest.sum(-1, keepdim=True), rest @ value
    best = value[top[:, 0]]
    return HeadView(
        query=query,
        key=key,
        value=value,
        scores=scores,
        mass=mass.double(),
        visible=seen,
        log_weights=log_weights,
        weights=weights,
        others=(1 - weights).scatter(-1, top, remaining),
        mean=elsewhere + largest * best,
        top=top,
        top_direction=remaining * best - elsewhere,
    )


def score_tilt(log_weights: Tensor, others: Tensor, delta: Tensor) -> Tensor:
    """Return t of T20: raising the logit of key j by delta moves the row's output by ``t * (v_j - o)``.

    Args:
        log_weights: float64, logarithm of the key's weight; -inf (a masked key) gives t = 0.
        others: float64, weight of all other keys of the row; where it is 0 nothing can move and t is 0.
        delta: change of the logit; -inf removes the key. Broadcast.

    ``t = w (e^delta - 1) / (1 - w + w e^delta)`` is evaluated so that nothing overflows and nothing cancels.
    """
    size = -delta.abs()
    shrunk = torch.expm1(size)
    rising = -shrunk / (1 + others * torch.exp(size - log_weights))
    weights = torch.exp(log_weights)
    falling = weights * shrunk / (others + weights * torch.exp(size))
    movable = (others > 0) & (log_weights > -math.inf)
    return torch.where(movable, torch.where(delta > 0, rising, falling), 0.0)


def softmax_change(log_weights: Tensor, weights: Tensor, top: Tensor, added: Tensor) -> Tensor:
    """Return by how much the weights of a row change when ``added`` is added to its logits (T22).

    Args:
        log_weights: float64 (..., S'), logarithm of a softmax; -inf for masked keys.
        weights: float64 (..., S'), the softmax itself.
        top: int64 (..., 1), index of the largest weight.
        added: float64 (..., S'); what all columns have in common drops out.

    Small changes keep their relative accuracy: they are built from expm1, not from a difference of weights.
    """
    shifted = added - added.gather(-1, top.expand(*added.shape[:-1], 1))
    hidden = log_weights == -math.inf
    small = torch.where(hidden, 0.0, shifted).abs().amax(-1, keepdim=True) <= 1
    raised = weights * torch.expm1(shifted.clamp(-1, 1))
    total = raised.sum(-1, keepdim=True)
    near = (raised - weights * total) / (1 + total)
    if bool(small.all()):
        return near
    exponent = torch.where(hidden, -math.inf, log_weights + shifted)
    return torch.where(small, near, torch.softmax(exponent, -1) - weights)


def tilted(view: HeadView, key: int, delta: Tensor) -> Tensor:
    """Return how out moves, (T, D_v), when the logits of one key change by ``delta`` (T,) (T20)."""
    tilt = score_tilt(view.log_weights[:, key], view.others[:, key], delta)
    direction = view.value[key] - view.mean
    return tilt[:, None] * torch.where(view.top == key, view.top_direction, direction)


def mass_of(state: AttentionState) -> Tensor:
    """Return the factor of the values, (B, H, T, S); if it was not recorded, the weights of the keys."""
    return state.weights[..., : state.key.shape[2]] if state.mass is None else state.mass


def in_units_of(moved: Tensor, length: Tensor) -> Tensor:
    """Return changes of rows in units of the rows' lengths; a row of zeros that nothing moves has not changed."""
    return torch.where(moved == 0, 0.0, moved / length)


def readers_of(state: AttentionState, head: int) -> range:
    """Return the query heads that read a key/value head."""
    group = state.query.shape[1] // state.key.shape[1]
    return range(head * group, (head + 1) * group)
