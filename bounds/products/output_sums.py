"""The value product ``O = W V``, checked by the sums of its rows, its columns and groups of its channels.

    check = row_sums(mass, value, out)          # sum_c o_ic = sum_j w_ij (sum_c v_jc)
    check = column_sums(mass, value, out)       # sum_i o_ic = sum_j (sum_i w_ij) v_jc

W is the *mass*: the factor that really multiplied the values, after cast, dropout and removal of a sink's column. The
checks assume nothing about it: they check only the product. Statements and proofs: docs/theory.md, T7, F5 and F8.

Shapes everywhere: mass (B, H, T, S), value (B, H_kv, S, D_v) not repeated, out (B, H, T, D_v). float64, float32,
bfloat16 or float16; what is returned is float64. ``keys``, broadcastable to (B, H, T), is the number of keys a row
gives any mass to, or an upper bound of it: a row that sees few keys has a smaller tolerance. None: all of them.

>>> mass, value = torch.full((1, 1, 2, 3), 1 / 4), torch.ones(1, 1, 3, 4)
>>> out = mass @ value
>>> out[0, 0, 1, 2] += 0.5                                                       # a fault
>>> row_sums(mass, value, out).residual.tolist(), column_sums(mass, value, out).residual.tolist()
([[[0.0, 0.5]]], [[[0.0, 0.0, 0.5, 0.0]]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from bounds.core.row_check import RowCheck
from bounds.products.product_sums import Transposed, tile_check


@torch.no_grad()
def row_sums(mass: Tensor, value: Tensor, out: Tensor, keys: Tensor | None = None) -> RowCheck:
    """Return how far the sum of every row of the output is from the value that the operands give, (B, H, T) (F8)."""
    check = group_sums(mass, value, out, keys, width=out.shape[-1])
    return RowCheck(check.residual[..., 0], check.tolerance[..., 0])


@torch.no_grad()
def group_sums(mass: Tensor, value: Tensor, out: Tensor, keys: Tensor | None = None, *, width: int = 4) -> RowCheck:
    """Return the same for every group of ``width`` neighbouring channels, (B, H, T, ceil(D_v / width)) (F8)."""
    return tile_check(mass, Transposed(value), out, width=width, terms=keys)


@torch.no_grad()
def column_sums(mass: Tensor, value: Tensor, out: Tensor) -> RowCheck:
    """Return how far the sum of every column of the output is from what the operands give, (B, H, D_v) (F8)."""
    check = tile_check(Transposed(value), mass, Transposed(out))
    return RowCheck(check.residual[..., 0], check.tolerance[..., 0])
