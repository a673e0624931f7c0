"""Arithmetic on rows of logits in float64: losses, likeliest tokens, divergences, norms.

Every function takes rows (N, V) and gives one number for each. On the CPU the number of a row has the same bits
whichever rows are computed with it, how many and on how many threads, so that effects may be computed on the rows alone
that a fault changed. The arithmetic there is NumPy's: its exp takes half the time of torch's and its argmax a sixth,
and the exp of an element and the sum of a row do not depend on where they stand. On other devices it is torch's, under
the same names.

Public names: ``Array``, ``as_array``, ``as_tensor``, ``joined``, ``quiet``, ``pieces``, ``RowAnswers``,
``answers_of``, ``likeliest_of``, ``chances_of``, ``nearby``, ``is_near``, ``divergences``, ``changed_rows``,
``row_norms``, ``finite_rows``.

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
_BLOCK = 1 << 13  # a dot product of so many is not split among the threads of a BLAS
_START = 64  # columns that tell most changed rows
_PLAIN = 2.0**-24
_NEAR = 1.0


def quiet(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate what computes with rows of faults: NumPy's warnings of overflow and NaN are nothing new there."""
    return np.errstate(all="ignore")(function)


class RowAnswers(NamedTuple):
    """What rows of logits answer, each for itself.

    Attributes:
        largest: (N,) float64, the largest logit; where it is not finite, there is no most likely token.
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
    """Return the same memory for the functions here."""
    return values.detach().numpy() if values.device.type == "cpu" else values


def as_tensor(values: Array) -> Tensor:
    """Return the same memory as a tensor."""
    return values if isinstance(values, Tensor) else torch.from_numpy(values)


def joined(parts: Sequence[Array]) -> Array:
    """Return arrays one after the other."""
    return _names(parts[0]).concatenate(parts)


def pieces(rows: int, width: int) -> Iterator[slice]:
    """Cut ``rows`` rows of ``width`` numbers into pieces that stay in a cache; there is at least one, maybe empty."""
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, max(1, rows), step))


def answers_of(logits: Array, targets: Array, scratch: Array | None = None) -> RowAnswers:
    """Return what rows answer.

    Args:
        logits: (N, V) float64.
        targets: (N,) int64 in ``0 .. V - 1``, or -100 for none.
        scratch: Like the logits, or the logits themselves; overwritten.
    """
    use = _names(logits)
    top, largest = likeliest_of(logits)
    wanted = logits[use.arange(len(logits)), targets.clip(min=0)]
    shifted = use.subtract(logits, largest[:, None], out=scratch)
    log_sum = use.log(use.exp(shifted, out=shifted).sum(axis=-1))
    # not logsumexp minus the target: for logits of 1e20, as faults make them, that difference has no digit left
    losses = use.where(targets == IGNORED, 0.0, (largest - wanted) + log_sum)
    return RowAnswers(largest, top, log_sum, losses)


def likeliest_of(logits: Array) -> tuple[Array, Array]:
    """Return the first of the largest logits of rows (N, V), and that logit: (N,) each."""
    top = logits.argmax(axis=-1)
    return top, logits[_names(logits).arange(len(logits)), top]


def chances_of(logits: Array, answers: RowAnswers, scratch: Array | None = None) -> Array:
    """Return ``softmax(logits)`` of rows (N, V) float64 from what they answer, in ``scratch`` if there is one."""
    use = _names(logits)
    rows = use.subtract(logits, answers.largest[:, None], out=scratch)
    rows -= answers.log_sum[:, None]
    return use.exp(rows, out=rows)


def nearby(change: Array, chances: Array, targets: Array, before: RowAnswers) -> tuple[Array, Array]:
    """Return losses and divergences of rows ``a = b + change`` that are near b, with one exp an element and not two.

    With ``p = softmax(b)``, ``d`` the change, ``m = sum p d`` and ``g = log(1 + sum p expm1(d - m))``, logsumexp grows
    by ``m + g``. So the loss of a target t is that of b, plus ``m + g - d[t]``, and ``KL(softmax(b) || softmax(a))``
    is ``g - sum p (d - m)``: all of them sums of terms as small as the change, which keeps the digits of what they
    differ by (of a divergence about ``2**-52 / d``: 1e-9 for changes in the last bit of a float32).

    Args:
        change: (N, V) float64, ``a - b``, of a norm that ``is_near``; overwritten.
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
    """Return (N,) bool, for which Euclidean norms (N,) of changes ``nearby`` is right: no exp of them can overflow."""
    return norms <= _NEAR


def divergences(change: Array, chances: Array, before: RowAnswers, after: RowAnswers) -> Array:
    """Return ``KL(softmax(b) || softmax(a))`` in nats of rows ``a = b + change``.

    With ``p = softmax(b)``, ``d`` the change and ``m = sum p d``, the divergence is ``log sum p exp(d) - m``. The first
    term is the difference of two logsumexp; the error of that is a few ``2**-52``, which leaves nothing of a divergence
    of 1e-15, as changes of 1e-7 give. So one that comes out below ``2**-24`` is computed again as
    ``log(1 + sum p expm1(d - m)) - sum p (d - m)``, both sums of terms as small as ``d - m``: its relative error is
    about ``2**-52 / d``, 1e-9 for changes in the last bit of a float32.

    Args:
        change: (N, V) float64, ``a - b``; overwritten.
        chances: p, (N, V) float64, or (1, V) if all rows have one b.
        before: The answers of b.
        after: The answers of a.

    Returns:
        (N,) float64; 0 without a change, never negative, NaN or infinite where logits are not finite.
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
    # a divergence is >= 0; what rounding leaves below is 0, and clip keeps a NaN
    return found.clip(min=0.0)


def changed_rows(baseline: Tensor, rows: Tensor, logits: Tensor) -> Tensor:
    """Return which rows are not bitwise those of the baseline (NaN equals the same NaN, 0.0 is not -0.0).

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
    """Return (N,) bool, which rows (N, V) hold no NaN and no infinity; ``norms`` (N,) are not finite where they do."""
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
