"""Arithmetic on rows of logits in float64: losses, likeliest tokens, divergences, norms.

Every function takes rows (N, V) and returns one number for each. On the CPU the bits of a row's number do not depend on
the other rows, their count or the number of threads. So effects may be computed on only the rows that a fault changed.
On the CPU the arithmetic is NumPy's: its exp takes half the time of torch's and its argmax a sixth, and the exp of an
element and the sum of a row do not depend on their position. On other devices the arithmetic is torch's, under the same
names.

>>> before, after = np.zeros((1, 2)), np.array([[0.0, 1e-6]])
>>> answers = answers_of(before, np.array([1])), answers_of(after, np.array([1]))
>>> round(float(answers[0].losses[0]), 6)
0.693147
>>> f"{divergences(after - before, chances_of(before, answers[0]), *answers)[0]:.6e}"    # 1e-12 / 8
'1.250000e-13'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from experiments.inputs.batches import IGNORED
from fault_injection.numbers.bits import float_format

_P = ParamSpec("_P")
_R = TypeVar("_R")

Array = Any
"""``np.ndarray`` for tensors on the CPU, ``Tensor`` for those elsewhere."""

_CHUNK_ELEMENTS = 1 << 17  # 1 MiB of float64, so that the few copies of a piece stay in a cache
_BLOCK = 1 << 13  # a BLAS does not split a dot product of this length among its threads
_START = 64  # the first columns are enough to recognise most changed rows
_PLAIN = 2.0**-24
_NEAR = 1.0


def quiet(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return the function without NumPy's warnings of overflow and NaN: faults cause both all the time."""
    return np.errstate(all="ignore")(function)


class RowAnswers(NamedTuple):
    """The answers of rows of logits.

    Attributes:
        largest: (N,) float64, the largest logit; if it is not finite, the row has no most likely token.
        top: (N,) int64, the first of the largest logits.
        log_sum: (N,) float64, ``log sum exp(logits - largest)``.
        losses: (N,) float64, ``-log softmax(logits)[target]`` in nats; 0 without a target.
    """

    largest: Array
    top: Array
    log_sum: Array
    losses: Array

    def chosen(self, rows: Array) -> RowAnswers:
        """Return the answers of some rows, (M,) int64."""
        return RowAnswers(*(fact[rows] for fact in self))


def as_array(values: Tensor) -> Array:
    """Return the tensor as an array for the functions here, in the same memory."""
    return values.detach().numpy() if values.device.type == "cpu" else values


def as_tensor(values: Array) -> Tensor:
    """Return the same memory as a tensor."""
    return values if isinstance(values, Tensor) else torch.from_numpy(values)


def joined(parts: Sequence[Array]) -> Array:
    """Return the concatenated arrays."""
    return _names(parts[0]).concatenate(parts)


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Yield pieces of ``rows`` rows of ``width`` numbers that fit a cache; at least one piece, which may be empty."""
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, max(1, rows), step))


def answers_of(logits: Array, targets: Array, scratch: Array | None = None) -> RowAnswers:
    """Return the answers of rows.

    Args:
        logits: (N, V) float64.
        targets: (N,) int64 in ``0 .. V - 1``, or -100 for none.
        scratch: An array like the logits, or the logits themselves; overwritten.
    """
    use = _names(logits)
    top, largest = likeliest_of(logits)
    wanted = logits[use.arange(len(logits)), targets.clip(min=0)]
    shifted = use.subtract(logits, largest[:, None], out=scratch)
    log_sum = use.log(use.exp(shifted, out=shifted).sum(axis=-1))
    # not logsumexp minus the target: for logits of 1e20, which faults can cause, that difference would lose every digit
    losses = use.where(targets == IGNORED, 0.0, (largest - wanted) + log_sum)
    return RowAnswers(largest, top, log_sum, losses)


def likeliest_of(logits: Array) -> tuple[Array, Array]:
    """Return the position of the (first) largest logit of each row (N, V), and that logit: (N,) each."""
    top = logits.argmax(axis=-1)
    return top, logits[_names(logits).arange(len(logits)), top]


def chances_of(logits: Array, answers: RowAnswers, scratch: Array | None = None) -> Array:
    """Return ``softmax(logits)`` of rows (N, V) float64 from their answers; it is written to ``scratch`` if given."""
    use = _names(logits)
    rows = use.subtract(logits, answers.largest[:, None], out=scratch)
    rows -= answers.log_sum[:, None]
    return use.exp(rows, out=rows)


def nearby(change: Array, chances: Array, targets: Array, before: RowAnswers) -> tuple[Array, Array]:
    """Return losses and divergences of rows ``a = b + change`` near b, with one exp per element instead of two.

    With ``p = softmax(b)``, ``d`` the change, ``m = sum p d`` and ``g = log(1 + sum p expm1(d - m))``, logsumexp grows
    by ``m + g``. So the loss of a target t is that of b, plus ``m + g - d[t]``, and ``KL(softmax(b) || softmax(a))``
    is ``g - sum p (d - m)``. All of these are sums of terms as small as the change, so the differences keep their
    digits (the relative error of a divergence is about ``2**-52 / d``: 1e-9 for changes in the last bit of a float32).

    Args:
        change: (N, V) float64, ``a - b``, with a norm for which ``is_near`` is true; overwritten.
        chances: p, (N, V) float64, or (1, V) if all rows have one b.
        targets: (N,) int64 in ``0 .. V - 1``, or -100 for none.
        before: The answers of b.

    Returns:
        Losses in nats, 0 without a target, and divergences in nats, never negative: (N,) float64 each.
    """
    use = _names(change)
    wanted = change[use.arange(len(change)), targets.clip(min=0)]
    mean = _dots(chances, change)
    change -= mean[:, None]
    rest = _dots(chances, change)
    growth = use.log1p(_dots(chances, use.expm1(change, out=change)))
    losses = use.where(targets == IGNORED, 0.0, before.losses + (mean + growth - wanted))
    # a divergence is >= 0; what rounding leaves below is 0
    return losses, (growth - rest).clip(min=0.0)


def is_near(norms: Array) -> Array:
    """Return (N,) bool: for which norms (N,) of changes ``nearby`` is valid, because no exp of them can overflow."""
    return norms <= _NEAR


def divergences(change: Array, chances: Array, before: RowAnswers, after: RowAnswers) -> Array:
    """Return ``KL(softmax(b) || softmax(a))`` in nats of rows ``a = b + change``.

    With ``p = softmax(b)``, ``d`` the change and ``m = sum p d``, the divergence is ``log sum p exp(d) - m``. The first
    term is the difference of two logsumexp. Its error is a few ``2**-52``, which would hide a divergence of 1e-15, as
    changes of 1e-7 cause. So a divergence below ``2**-24`` is computed again as
    ``log(1 + sum p expm1(d - m)) - sum p (d - m)``. Both are sums of terms as small as ``d - m``, and the relative
    error is about ``2**-52 / d``: 1e-9 for changes in the last bit of a float32.

    Args:
        change: (N, V) float64, ``a - b``; overwritten.
        chances: p, (N, V) float64, or (1, V) if all rows have one b.
        before: The answers of b.
        after: The answers of a.

    Returns:
        (N,) float64; 0 without a change, never negative, and NaN or infinite if logits are not finite.
    """
    use, mean = _names(change), _dots(chances, change)
    found = (after.largest - before.largest) + (after.log_sum - before.log_sum) - mean
    small = use.where(found < _PLAIN)[0]
    if len(small):
        if len(small) < len(change):
            change, mean = change[small], mean[small]
            chances = chances[small] if len(chances) > 1 else chances
        change -= mean[:, None]
        rest = _dots(chances, change)
        again = use.log1p(_dots(chances, use.expm1(change, out=change))) - rest
        # expm1 overflows where an unlikely token becomes likely
        found[small] = use.where(use.isfinite(again), again, found[small])
    # a divergence is >= 0; rounding can make it negative, and clip keeps a NaN
    return found.clip(min=0.0)


def changed_rows(baseline: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    """Return which rows differ bitwise from the baseline (NaN equals the same NaN, 0.0 is not -0.0).

    Args:
        baseline: (M, V), any floating dtype.
        rows: (N,) int64 in ``0 .. M - 1``.
        logits: (N, V) of the same dtype; row n is compared with row ``rows[n]`` of the baseline.

    Returns:
        (N,) bool.
    """
    integer = float_format(baseline.dtype).integer
    left, right = baseline.view(integer), logits.view(integer)
    changed = (left[:, :_START].index_select(0, rows) != right[:, :_START]).any(dim=-1)
    undecided = (~changed).nonzero().flatten()
    for piece in pieces(len(undecided), baseline.shape[1]):
        chosen = undecided[piece]
        difference = left.index_select(0, rows[chosen]).bitwise_xor_(right.index_select(0, chosen))
        # several times as fast as the any() of a comparison
        changed[chosen] = (difference.amax(dim=-1) != 0) | (difference.amin(dim=-1) != 0)
    return changed


def row_norms(rows: Array) -> Array:
    """Return the Euclidean norms of float64 rows (N, V) as (N,); NaN or infinite where the rows are."""
    use = _names(rows)
    norms = use.sqrt(_dots(rows, rows))
    # squares of values beyond 1e154 overflow even in float64, those below 1e-162 vanish
    usual = (norms > 1e-140) & (norms < 1e140)
    if not usual.all():
        unusual = use.where(~usual)[0]
        sizes = abs(rows[unusual])
        largest = use.amax(sizes, axis=-1)
        sizes /= largest[:, None]
        scaled = largest * use.sqrt(_dots(sizes, sizes))
        norms[unusual] = use.where((largest > 0.0) & use.isfinite(largest), scaled, largest)
    return norms


def finite_rows(values: Tensor, norms: Array) -> Array:
    """Return (N,) bool: which rows (N, V) have no NaN and no infinity; ``norms`` (N,) of all others are not finite."""
    finite = _names(norms).isfinite(norms)
    if not finite.all():
        doubtful = as_tensor(~finite).nonzero().flatten()
        finite[~finite] = as_array(values.index_select(0, doubtful).isfinite().all(dim=-1))
    return finite


def _names(values: Array) -> Any:
    return torch if isinstance(values, Tensor) else np


def _dots(left: Array, right: Array) -> Array:
    """Return the dot products of rows (N, V) or (1, V) with (N, V), as (N,)."""
    width = left.shape[1]
    whole = width - width % _BLOCK
    rest = (left[:, None, whole:] @ right[:, whole:, None])[:, 0, 0]
    if not whole:
        return rest
    blocks = whole // _BLOCK
    rows, columns = left[:, :whole].reshape(-1, blocks, 1, _BLOCK), right[:, :whole].reshape(-1, blocks, _BLOCK, 1)
    return (rows @ columns).sum(axis=(1, 2, 3)) + rest
