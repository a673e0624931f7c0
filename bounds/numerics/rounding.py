"""Rounding errors of attention: how far a correct computation may be from the result in real numbers.

Every tolerance of this package is a theorem about floating-point arithmetic, never a number that was tuned. The
assumptions (docs/theory.md, "Arithmetic"): round to nearest; float64 kernels compute in float64, all others in
float32 and round once when they store; sums in any order; exp within two units in the last place.

>>> storage(torch.bfloat16).roundoff == 2.0**-8, storage(torch.float32).roundoff
(True, 0.0)
>>> gamma(3, 2.0**-24) > 3 * 2.0**-24
True
>>> error = softmax_error(torch.tensor([2, 4096]), torch.tensor([0.3, 5.8]), torch.float32)
>>> [f"{value:.1e}" for value in error.relative.tolist()]       # grows with the number of keys summed
['8.3e-07', '2.5e-04']
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fault_injection.numbers.formats import FORMATS, NumberFormat, model_dtypes

MAX_KEYS = 2**20
"""Most keys a row may have: with more, the float32 sum of the weights has no useful error bound (n * u > 1/16)."""

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class Storage:
    """What storing a computed number in a format costs: ``|stored - y| <= roundoff * |stored| + absolute``.

    Attributes:
        roundoff: relative part; 0 where the format is the one that was computed in (no further rounding).
        absolute: half the spacing of the format's subnormal numbers.
    """

    roundoff: float
    absolute: float


@dataclass(frozen=True)
class Accumulation:
    """The arithmetic that a kernel computes in.

    Attributes:
        roundoff: unit roundoff u; one operation is exact up to a factor 1 + delta, |delta| <= u.
        exp_error: relative error of one exp or exp2 (two units in the last place, 4u).
        underflow: absolute error of one operation whose result is subnormal or flushed to zero.
        exp_reach: the delta beyond which e^-delta is below every positive number of the format.
    """

    roundoff: float
    exp_error: float
    underflow: float
    exp_reach: float


def _storage_of(layout: NumberFormat) -> Storage:
    """Return half a unit of the last place, and half the spacing of the subnormal numbers."""
    if layout.accumulates:
        return Storage(0.0, 0.0)
    return Storage(2.0 ** -(layout.mantissa + 1), 2.0 ** (1 - layout.bias - layout.mantissa - 1))


_SINGLE = Accumulation(roundoff=2.0**-24, exp_error=2.0**-22, underflow=2.0**-126, exp_reach=104.0)
_DOUBLE = Accumulation(roundoff=2.0**-53, exp_error=2.0**-51, underflow=2.0**-1022, exp_reach=746.0)


@functools.cache
def storage(dtype: torch.dtype) -> Storage:
    """Return the storage error of ``dtype``. Raises ValueError for a dtype without an error model."""
    name = str(dtype).removeprefix("torch.")
    if name not in model_dtypes():
        raise ValueError(f"dtype: got {name}, allowed {', '.join(model_dtypes())}")
    return _storage_of(FORMATS[name])


def accumulation(dtype: torch.dtype) -> Accumulation:
    """Return the arithmetic of a kernel with results of ``dtype``: float64 in itself, others in float32."""
    storage(dtype)
    return _DOUBLE if dtype == torch.float64 else _SINGLE


def cast(source: torch.dtype, target: torch.dtype) -> Storage:
    """Return what converting numbers of ``source`` to ``target`` costs; nothing where ``target`` holds them all."""
    storage(source)
    stored = storage(target)
    if target.itemsize >= source.itemsize and (target.itemsize > source.itemsize or target == source):
        return Storage(0.0, 0.0)
    return Storage(2.0**-24, 2.0**-150) if target == torch.float32 else stored


def gamma(count: Number, roundoff: float) -> Number:
    """Return ``k u / (1 - k u)``, the bound on the product of k factors (1 + delta) (Higham 2002, Lemma 3.1).

    Args:
        count: number k of roundings, a number or a tensor.
        roundoff: unit roundoff u; k u must be below 1.
    """
    return count * roundoff / (1 - count * roundoff)


@dataclass(frozen=True)
class SoftmaxError:
    """Proved distance of a stored softmax weight from the exact one of the same stored logits (docs/theory.md, F1).

    For every visible key j, with delta = largest logit - logit of j:
    ``|stored - exact| <= stored * (relative + slope * min(delta, reach)) + absolute``.

    Attributes:
        relative: (...,) float64, one number a row.
        slope: (...,) float64, growth with delta (the rounding of the argument of exp).
        reach: cap on delta; beyond it the exact weight is below the smallest number and ``absolute`` covers it.
        absolute: (...,) float64.
    """

    relative: Tensor
    slope: Tensor
    reach: float
    absolute: Tensor

    def row_sum(self, spread: Tensor, n: Tensor) -> Tensor:
        """Return a bound on ``|sum of the stored weights - 1|``, given an upper bound ``spread`` of sum w delta."""
        # In terms of the exact weights, which sum to 1, the same derivation gives the same expression.
        return self.relative + self.slope * spread + n * self.absolute


def softmax_error(n: Tensor, spread: Tensor, dtype: torch.dtype) -> SoftmaxError:
    """Return the error bound of softmax weights stored in ``dtype``.

    Args:
        n: (...,) number of visible keys of each row, at most MAX_KEYS.
        spread: (...,) float64, an upper bound of ``E = sum_j w_j delta_j`` (any upper bound of the chain T2).
        dtype: format of the stored weights; it decides the arithmetic and the storage rounding.

    Proof: docs/theory.md, F1.
    """
    arithmetic, stored = accumulation(dtype), storage(dtype)
    n = n.double()
    u = arithmetic.roundoff
    argument = gamma(3, u)
    # n - 1 additions and at most two roundings of the division, two more for flushed summands; exp enters twice,
    # in the numerator and in the sum.
    common = argument * spread + ((n + 3) * u + 2 * arithmetic.exp_error + stored.roundoff)
    margin = 1 / (1 - 2 * (common + argument * arithmetic.exp_reach))
    return SoftmaxError(
        relative=common * margin,
        slope=argument * margin,
        reach=arithmetic.exp_reach,
        absolute=(8 * arithmetic.underflow + stored.absolute) * margin,
    )


def reduced_precision(tensor: Tensor) -> str | None:
    """Return which setting makes matrix products of ``tensor``'s kind less exact than the theory assumes, or None.

    The theory needs operands that are not rounded before the product and float32 partial sums: no TF32, no
    bfloat16 decomposition of float32, no half-precision reductions, no autocast.
    """
    if torch.is_autocast_enabled(tensor.device.type):
        return "autocast is on: products may convert their operands"
    if tensor.dtype == torch.float64:
        return None
    backend = torch.backends.cuda if tensor.device.type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    if tensor.dtype == torch.float32:
        precision = getattr(matmul, "fp32_precision", "none")
        if precision not in ("none", "ieee") or torch.get_float32_matmul_precision() != "highest":
            return f"float32 matrix products run in reduced precision (fp32_precision = {precision!r})"
        return None
    half = "bf16" if tensor.dtype == torch.bfloat16 else "fp16"
    for setting in (f"allow_{half}_reduced_precision_reduction", f"allow_{half}_accumulation"):
        if getattr(matmul, setting, False):
            return f"torch.backends.cuda.matmul.{setting} is on"
    return None
