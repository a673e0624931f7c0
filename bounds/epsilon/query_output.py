"""The q@o path: epsilon from the output, ``(a* - alpha q.o) / alpha``, and how far it may be from the weights' epsilon.

If the values equal the keys, ``alpha q.o = sum_j w_j alpha q.k_j = sum_j w_j a_j``: the output of attention knows
epsilon without the weights. If they differ, the two are at most ``alpha |q| max_j |v_j - k_j|`` apart, over the
visible keys (docs/theory.md, T6); that slack widens the bounds. The rounding tolerance is F4.

>>> from bounds.epsilon.bounds import compute_attention_bounds
>>> q, k = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), torch.eye(2).view(1, 1, 2, 2)
>>> a = q @ k.mT
>>> w = torch.softmax(a, -1)
>>> state = AttentionState(query=q, key=k, value=k, logits=a, weights=w, out=w @ k, scaling=1.0,
...                        kv_equal=True, has_bias_or_cap=False)
>>> bounds = compute_attention_bounds(a, w, d=2, scale=1.0)
>>> path = compute_query_output(state, bounds)
>>> bool((path.epsilon - bounds.epsilon).abs() <= path.tolerance), float(path.slack)
(True, 0.0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.epsilon.bounds import AttentionBounds, visible_keys
from bounds.numerics.blocks import row_blocks
from bounds.numerics.fixed_order import wide
from bounds.numerics.rounding import Storage, accumulation, cast, gamma, reduced_precision, storage
from bounds.numerics.selection import selected, selection
from bounds.softmax.softmax_sums import largest_spread


@dataclass(frozen=True, eq=False)
class QueryOutput:
    """Epsilon by the q@o path; all tensors float64 (B, H, T), in units of epsilon.

    Attributes:
        epsilon: ``a* / alpha - q.o``.
        slack: by how much T6 widens the bounds; 0 when the model has K = V.
        tolerance: rounding tolerance on top of that of the bounds (F4).
    """

    epsilon: Tensor
    slack: Tensor
    tolerance: Tensor


def query_output_reason(state: AttentionState) -> str | None:
    """Return why T6 does not apply to ``state``, or None if it applies."""
    if state.has_bias_or_cap is None:
        return "it is not known whether the logits have a bias or soft cap"
    if state.has_bias_or_cap:
        return "the logits have a bias or soft cap: they are not scaling * q.k, so q.o is not their weighted mean"
    size, value_size = state.query.shape[-1], state.value.shape[-1]
    if size != value_size:
        return f"queries have {size} channels and values {value_size}: q.o does not exist"
    keys, columns = state.key.shape[2], state.logits.shape[-1]
    if keys != columns:
        return f"the softmax has {columns} columns for {keys} keys (sinks): their logits are no q.k"
    return reduced_precision(state.query) or reduced_precision(state.value)


@torch.no_grad()
def compute_query_output(state: AttentionState, bounds: AttentionBounds) -> QueryOutput:
    """Return epsilon by the q@o path, its slack and its rounding tolerance.

    Args:
        state: a state to which T6 applies (``query_output_reason`` is None).
        bounds: the bounds of the same state's logits and weights, with ``scale=state.scaling``.

    Raises:
        ValueError: when T6 does not apply.
    """
    if (reason := query_output_reason(state)) is not None:
        raise ValueError(f"q@o does not apply to {state.name or 'this state'}: {reason}")
    dot, terms, length, absolute_query = _channel_sums(state)
    mass, farthest, reach = _key_sums(state)
    slack = length * farthest
    tolerance = _tolerance(state, bounds, length, absolute_query, terms, mass, reach)
    tolerance = tolerance + slack * bounds.error.row_sum(_spread(bounds), bounds.n)
    checker = 2.0**-52 * (bounds.n + state.query.shape[-1] + 16).double() * (length * mass + terms + slack)
    return QueryOutput(
        epsilon=bounds.a_star / bounds.scale - dot,
        slack=slack,
        tolerance=(tolerance + checker) * (1 + 2.0**-28),
    )


def _channel_sums(state: AttentionState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q.o, sum |q_c o_c|, |q| and sum |q_c|, each (B, H, T) float64."""
    sums = torch.empty((4, *state.rows), dtype=torch.float64, device=state.query.device)
    for block in row_blocks(state.rows, state.query.shape[-1]):
        query = wide(state.query[block])
        terms = query * wide(state.out[block])
        sums[0][block] = terms.sum(-1)
        sums[1][block] = terms.abs_().sum(-1)
        sums[2][block] = torch.mul(query, query, out=terms).sum(-1)
        sums[3][block] = torch.abs(query, out=terms).sum(-1)
    dot, terms, squares, absolute = sums.unbind(0)
    return dot, terms, squares.sqrt_(), absolute


def _tolerance(
    state: AttentionState,
    bounds: AttentionBounds,
    length: Tensor,
    absolute_query: Tensor,
    terms: Tensor,
    mass: Tensor,
    reach: Tensor,
) -> Tensor:
    """Return the rounding terms of docs/theory.md, F4: value product, cast of the weights, score product, operands."""
    channels = state.query.shape[-1]
    sums, products = accumulation(state.out.dtype), accumulation(state.query.dtype)
    n = bounds.n.double()
    stored_out, narrowed = storage(state.out.dtype), _cast(state)
    output = gamma(n + 2, sums.roundoff) * (1 + narrowed.roundoff) * length * mass + stored_out.roundoff * terms
    output = output + (stored_out.absolute + 2 * (n + 3) * sums.underflow) * absolute_query
    # What the cast adds to a weight is multiplied, and rounded, like the weight.
    weights = length * (narrowed.roundoff * mass + narrowed.absolute * reach * (1 + gamma(n + 2, sums.roundoff)))
    stored = _coarsest([t.dtype for t in (state.query, state.scores, state.logits) if t is not None])
    # The scores may be stored twice: after the product and after the scaling.
    twice = 2 * stored.roundoff + stored.roundoff**2
    flushed = (1 + 1 / bounds.scale) * (stored.absolute + 2 * (channels + 3) * products.underflow)
    total = 1 + bounds.error.row_sum(_spread(bounds), bounds.n)
    scores = gamma(channels + 3, products.roundoff) * length * mass + twice * bounds.magnitude + flushed * total
    read_as_zero = 2 * absolute_query * total + length * _value_lengths(state) + channels**0.5 * mass
    return output + weights + scores + max(sums.underflow, products.underflow) * read_as_zero


def _value_lengths(state: AttentionState) -> Tensor:
    """Return the sum of |v_j| over the keys that any query of the call sees, (B, H, 1)."""
    lengths = state.derived(_key_lengths)[1]
    visible = visible_keys(state.visible, state.weights.shape)
    if visible is not None:
        seen = visible.expand(*visible.shape[:-1], lengths.shape[-1]).any(-2)
        return _select(seen, state.per_query_head(lengths)).sum(-1, keepdim=True)
    return state.per_query_head(lengths).sum(-1, keepdim=True)


def _spread(bounds: AttentionBounds) -> Tensor:
    """Return an upper bound of E that includes any rounding of the bounds: W0((n - 1) / e), T2."""
    return largest_spread(bounds.n)


def _cast(state: AttentionState) -> Storage:
    # A softmax that returns float32 inside a half-precision model is rounded once more before the value product.
    return cast(state.weights.dtype, state.value.dtype)


def _coarsest(dtypes: list[torch.dtype]) -> Storage:
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    stored = [storage(dtype) for dtype in dtypes] + [cast(widest, dtype) for dtype in dtypes]
    return Storage(max(s.roundoff for s in stored), max(s.absolute for s in stored))


def _key_sums(state: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum_j |w_j| m_j, max_j |v_j - k_j| and sum_j |v_j| over the visible keys, float64 (B, H, T).

    m_j is the larger of |k_j| and |v_j|. The distance is 0 by definition where the model has K = V.
    """
    key_length, value_length, difference = state.derived(_key_lengths)
    columns = [torch.maximum(key_length, value_length), value_length]
    if not state.kv_equal:
        columns.append(difference)
    longest, value_length, *distance = (state.per_query_head(column)[:, :, None, :] for column in columns)
    mass, farthest, reach = torch.zeros((3, *state.rows), dtype=torch.float64, device=state.key.device)
    visible, shape = visible_keys(state.visible, state.weights.shape), state.weights.shape
    bits = None if visible is None else selection(visible, torch.float64).expand(shape)
    narrowed = _cast(state).absolute > 0
    for block in row_blocks(state.rows, shape[-1]):
        heads = block[:2]
        seen = None if bits is None else bits[block]
        # A hidden key may be infinite: selected after the product.
        mass[block] = selected(wide(state.weights[block]).abs().mul_(longest[heads]), seen).sum(-1)
        if distance:
            farthest[block] = selected(distance[0][heads].expand(mass[block].shape + shape[-1:]), seen).amax(-1)
        if narrowed:
            reach[block] = selected(value_length[heads].expand(mass[block].shape + shape[-1:]), seen).sum(-1)
    return mass, farthest, reach


def _key_lengths(state: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lengths of keys, of values and of their differences, each (B, H_kv, S) float64."""
    squares = torch.empty((3, *state.key.shape[:-1]), dtype=torch.float64, device=state.key.device)
    for block in row_blocks(tuple(state.key.shape[:-1]), state.key.shape[-1]):
        key, value = wide(state.key[block]), wide(state.value[block])
        for number, vectors in enumerate((key, value, value - key)):
            squares[number][block] = (vectors * vectors).sum(-1)
    keys, values, differences = squares.sqrt_().unbind(0)
    return keys, values, differences


def _select(visible: Tensor | None, values: Tensor) -> Tensor:
    return values if visible is None else torch.where(visible, values, 0.0)
