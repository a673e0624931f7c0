"""The invariants of a fused attention kernel, evaluated on its visible tensors, with their tolerances.

    state.derived(lse_bounds)             # RowCheck of T10, and so on: functions of a FusedState

The kernel is modelled as any order of any blocks of at least ``BLOCK_KEYS`` keys, rescaled when the running maximum
rises, with an exponential that may be a fast one (docs/theory.md, F17).

>>> from bounds.fused.fused_attention import fused_attention
>>> query, key, value = torch.ones(3, 1, 1, 2, 4)
>>> check = lse_bounds(fused_attention(query, key, value, causal=True))
>>> bool((check.residual <= check.tolerance).all())
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.fused.fused_attention import FusedState, sum_columns, sum_of_columns
from bounds.numerics.rounding import accumulation, gamma, storage

BLOCK_KEYS = 16
"""The smallest number of keys in a block of a fused kernel, except the last block: real kernels take 32 to 512."""

_EXP_ERROR = {torch.float64: 2.0**-50, torch.float32: 2.0**-18, torch.bfloat16: 2.0**-12, torch.float16: 2.0**-12}
"""Relative error of a fused kernel's exponential. PyTorch's CPU kernels use one of 20 units in the last place in
float32, and in half formats a cubic approximation that is correct to 2^-13.2; CUDA's ex2.approx is correct to 2^-22."""


@dataclass(frozen=True, eq=False)
class _Kernel:
    """Rounding errors of the kernel, one number a row, float64, broadcastable to (B, H, T) (docs/theory.md, F17)."""

    n: Tensor  # visible keys
    reach: Tensor  # largest alpha |q| |k_j| over them
    score: Tensor  # error of a logit
    total: Tensor  # relative error of the sum of exponentials
    product: Tensor  # relative error of an accumulation over the keys
    mass: Tensor  # |sum of the weights the values are multiplied by - 1|
    underflow: Tensor  # absolute error of an accumulation over the keys


def visible_counts(state: FusedState) -> Tensor:
    """Return the number of visible keys, int64, broadcastable to (B, H, T)."""
    keys, device = state.key.shape[2], state.key.device
    if state.visible is not None:
        return state.visible.expand(*state.visible.shape[:-1], keys).sum(-1)
    if state.causal:
        return torch.arange(1, state.rows[2] + 1, device=device).clamp(max=keys).view(1, 1, -1)
    return torch.full((1, 1, 1), keys, dtype=torch.int64, device=device)


def kernel(state: FusedState) -> _Kernel:
    """Return the rounding errors of the call's kernel."""
    arithmetic, stored = accumulation(state.query.dtype), storage(state.query.dtype)
    u, omega, exp = arithmetic.roundoff, arithmetic.underflow, _EXP_ERROR[state.query.dtype]
    n = state.derived(visible_counts)
    size = n.double().clamp(min=1)
    # Every block that raises the maximum costs a rescaling: exponential, product, addition. Behind a mask the visible
    # keys may lie in as many blocks as there are.
    every = torch.full_like(size, state.key.shape[2]) if state.visible is not None else size
    roundings = size + 7 * torch.minimum(size, torch.ceil(every / BLOCK_KEYS)) + 9
    channels = state.query.shape[-1]
    query, longest = state.query.double(), _largest(state, state.key.double().norm(dim=-1))
    reach = state.scaling * query.norm(dim=-1) * longest
    read_as_zero = state.scaling * omega * (query.abs().sum(-1) + channels**0.5 * longest)
    argument = gamma(3, u)
    rates = argument * torch.log(size) + exp + roundings * u
    total = rates / (1 - 2 * (rates + argument * arithmetic.exp_reach + exp)) + 2 * size * omega
    product = gamma(roundings, u)
    return _Kernel(
        n=n,
        reach=reach,
        score=gamma(channels + 3, u) * reach + (1 + state.scaling) * (channels + 3) * omega + read_as_zero,
        total=total,
        product=product,
        # The weights are cast for the product, their sum is not; the errors of exp are in both.
        mass=2 * product + stored.roundoff * (1 + 2 * product) + 2 * size * (stored.absolute + omega),
        underflow=2 * roundings * omega,
    )


def lse_bounds(state: FusedState) -> RowCheck:
    """Return how far lse lies outside ``[alpha q.mean(k) + ln n, alpha |q| max|k| + ln n]`` (T10, F18)."""
    errors = state.derived(kernel)
    size = errors.n.double().clamp(min=1)
    logarithm = torch.log(size)
    query, lse = state.query.double(), state.lse.double()
    lower = state.scaling * (query * _key_sums(state)).sum(-1) / size + logarithm
    residual = torch.maximum(lower - lse, lse - (errors.reach + logarithm))
    return RowCheck(residual, _lse_error(state, errors, errors.score) + _checker(state, errors), errors.n > 0)


def lse_key(state: FusedState) -> RowCheck:
    """Return ``alpha q.k_j - lse`` for one key j of each row: j = i, or the last that a mask shows (T11, F18)."""
    errors = state.derived(kernel)
    keys = state.key.shape[2]
    if state.visible is None:
        chosen = torch.arange(state.rows[2], device=state.key.device).clamp(max=keys - 1).view(1, 1, -1)
    else:
        numbers = torch.arange(keys, device=state.key.device)
        chosen = torch.where(state.visible, numbers, 0).amax(-1)
    key = state.per_query_head(state.key.double())
    index = chosen.expand(state.rows).unsqueeze(-1).expand(*state.rows, key.shape[-1])
    logit = state.scaling * (state.query.double() * key.gather(2, index)).sum(-1)
    tolerance = _lse_error(state, errors, errors.score) + _checker(state, errors)
    return RowCheck(logit - state.lse.double(), tolerance, errors.n > 0)


def output_norm(state: FusedState) -> RowCheck:
    """Return ``|o| - max_j |v_j|`` of each row (T12, F19)."""
    errors = state.derived(kernel)
    longest = _largest(state, state.value.double().norm(dim=-1))
    length = state.out.double().norm(dim=-1)
    absolute = state.value.shape[-1] ** 0.5 * (storage(state.out.dtype).absolute + errors.underflow)
    return RowCheck(length - longest, _spread(errors) * longest + _stored(state) * length + absolute, errors.n > 0)


def output_hull(state: FusedState) -> RowCheck:
    """Return how far a channel leaves ``[min_j v_jc, max_j v_jc]``, the largest in units of what it may (T12, F19)."""
    errors = state.derived(kernel)
    value, out = state.value.double(), state.out.double()
    largest, smallest = _running(state, value), -_running(state, -value)
    size = torch.maximum(largest.abs(), smallest.abs())
    absolute = storage(state.out.dtype).absolute + errors.underflow.unsqueeze(-1)
    tolerance = _spread(errors).unsqueeze(-1) * size + _stored(state) * out.abs() + absolute
    residual = torch.maximum(out - largest, smallest - out) / tolerance
    return RowCheck(residual.amax(-1), torch.ones_like(tolerance[..., 0]), errors.n > 0)


def output_sum(state: FusedState) -> RowCheck:
    """Return the errors of the appended columns in units of what they may be: the larger of both ratios (T13, F20)."""
    if state.appended is None:
        raise ValueError("appended: got None, allowed the outputs of the appended columns (augment=True)")
    errors, stored = state.derived(kernel), storage(state.out.dtype)
    pieces = sum_columns(state.value)
    out, sums, ones = state.out.double(), state.appended[..., :-1], state.appended[..., -1].double()
    values = state.value.double()
    magnitude = values.abs().sum(-1) + sum_of_columns(pieces.abs(), state.value)
    missing = (values.sum(-1) - sum_of_columns(pieces, state.value)).abs()
    shown = out.abs().sum(-1) + sum_of_columns(sums.abs(), state.value)
    count = sum_of_columns(torch.ones_like(sums[0, 0, 0]), state.value) + out.shape[-1]
    tolerance = (
        (1 + errors.mass) * (errors.product * _largest(state, magnitude) + _largest(state, missing))
        + _stored(state) * shown
        + count * (stored.absolute + errors.underflow)
        + 2.0**-52 * (out.shape[-1] + 8) * (shown + _largest(state, magnitude))
    )
    of_sum = (out.sum(-1) - sum_of_columns(sums, state.value)).abs() / tolerance
    of_ones = (ones - 1).abs() / (_spread(errors) + _stored(state) * ones.abs() + stored.absolute + errors.underflow)
    return RowCheck(torch.maximum(of_sum, of_ones), torch.ones_like(of_sum), errors.n > 0)


def key_value(state: FusedState) -> RowCheck:
    """Return how far ``alpha q.o`` lies outside ``[lse - ln n, lse]``, for K = V (T14, F21)."""
    errors = state.derived(kernel)
    stored = storage(state.out.dtype)
    query, out, lse = state.query.double(), state.out.double(), state.lse.double()
    size = errors.n.double().clamp(min=1)
    product = state.scaling * (query * out).sum(-1)
    residual = torch.maximum(product - lse, lse - torch.log(size) - product)
    # Weights of wrong logits, wrong exponentials and casts; no two distributions are further apart than 2.
    weights = torch.expm1((2 * errors.score).clamp(max=2)) + 4 * errors.total + errors.mass
    rounding = state.scaling * (query * out).abs().sum(-1) * _stored(state)
    absolute = state.scaling * query.abs().sum(-1) * (stored.absolute + errors.underflow)
    tolerance = errors.reach * (torch.clamp(weights, max=2) + _spread(errors)) + rounding + absolute
    checked = _lse_error(state, errors, errors.score) + _checker(state, errors)
    return RowCheck(residual, tolerance + checked, errors.n > 0)


def _lse_error(state: FusedState, errors: _Kernel, score: Tensor) -> Tensor:
    """Return how far the stored lse may be from that of exact logits: scores, sum, logarithm, addition."""
    u = accumulation(state.query.dtype).roundoff
    size = errors.n.double().clamp(min=1)
    return score + errors.total + 4 * u * (1 + torch.log(size)) + 2 * u * state.lse.double().abs()


def _checker(state: FusedState, errors: _Kernel) -> Tensor:
    size = errors.n + state.query.shape[-1] + 16
    return 2.0**-52 * size * (errors.reach + torch.log(errors.n.double().clamp(min=1)) + 1)


def _stored(state: FusedState) -> float:
    return storage(state.out.dtype).roundoff


def _spread(errors: _Kernel) -> Tensor:
    """Return the relative error of a weighted mean: its weights need not sum to one, and are accumulated."""
    return errors.mass + errors.product * (1 + errors.mass)


def _largest(state: FusedState, numbers: Tensor) -> Tensor:
    """Return the largest of the visible keys' ``numbers`` (B, H_kv, S), broadcastable to (B, H, T)."""
    numbers = state.per_query_head(numbers)
    if state.visible is None:
        return _running_maximum(state, numbers.unsqueeze(-1))[..., 0]
    seen = state.visible.reshape((1,) * (4 - state.visible.ndim) + tuple(state.visible.shape))
    return torch.where(seen, numbers.unsqueeze(-2), 0.0).amax(-1)


def _running(state: FusedState, vectors: Tensor) -> Tensor:
    """Return the largest of ``vectors`` (B, H_kv, S, c) in every channel over the keys that may be visible."""
    if state.visible is not None:
        # Over the keys that any row sees: a larger hull, but no work of T times S times c.
        seen = state.visible.reshape((1,) * (4 - state.visible.ndim) + tuple(state.visible.shape)).any(-2)
        vectors = state.per_query_head(vectors)
        return torch.where(seen.unsqueeze(-1), vectors, -torch.inf).amax(-2, keepdim=True)
    return state.per_query_head(_running_maximum(state, vectors))


def _running_maximum(state: FusedState, vectors: Tensor) -> Tensor:
    if not state.causal:
        return vectors.amax(-2, keepdim=True)
    return _rows_of(state, vectors.cummax(-2).values)


def _rows_of(state: FusedState, prefixes: Tensor) -> Tensor:
    """Return, for every query, the prefix that ends at its last key: (B, H_kv, S, c) to (B, H_kv, T, c)."""
    keys, rows = prefixes.shape[-2], state.rows[2]
    if rows <= keys:
        return prefixes[..., :rows, :]
    return torch.cat([prefixes, prefixes[..., -1:, :].expand(*prefixes.shape[:-2], rows - keys, -1)], -2)


def _key_sums(state: FusedState) -> Tensor:
    """Return the sum of the visible keys, broadcastable to (B, H, T, D), float64."""
    key = state.key.double()
    if state.visible is not None:
        seen = state.visible.reshape((1,) * (4 - state.visible.ndim) + tuple(state.visible.shape))
        return seen.expand(*seen.shape[:-1], key.shape[2]).double() @ state.per_query_head(key)
    if not state.causal:
        return state.per_query_head(key.sum(-2, keepdim=True))
    return state.per_query_head(_rows_of(state, key.cumsum(-2)))
