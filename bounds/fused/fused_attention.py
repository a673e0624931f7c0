"""Attention by a fused kernel, which shows neither scores nor weights, and the tensors that detectors can still read.

    state = fused_attention(query, key, value, causal=True)       # PyTorch's own flash kernel
    get_detector("fused_sum").check(state)

The kernel runs on values with a few columns more: their sum over the channels and a column of ones. Whatever the
weights are, the outputs of these columns are the sum of the other outputs, and 1 (docs/theory.md, T13).

>>> generator = torch.Generator().manual_seed(0)
>>> query, key, value = torch.randn(3, 1, 2, 5, 4, generator=generator)
>>> state = fused_attention(query, key, value, causal=True)
>>> expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
>>> torch.allclose(state.out, expected, atol=1e-6), tuple(state.lse.shape), tuple(state.appended.shape)
(True, (1, 2, 5), (1, 2, 5, 2))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor
from torch.nn import functional

from bounds.numerics.rounding import storage

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class FusedState:
    """The visible tensors of one call of a fused attention kernel. Like ``AttentionState``, it copies no tensor.

    Attributes:
        query: (B, H, T, D).
        key: (B, H_kv, S, D), not repeated: query head h reads head h // (H / H_kv).
        value: (B, H_kv, S, D_v).
        out: (B, H, T, D_v).
        lse: (B, H, T), the logarithm of the sum of exponentials of each row, in the arithmetic of the kernel.
        scaling: alpha, the factor between query.key and the logits.
        causal: query i sees the keys 0..i, as ``torch.nn.functional.scaled_dot_product_attention`` counts.
        visible: bool, broadcastable to (B, H, T, S), True where a query sees a key; None without such a mask.
        kv_equal: whether the *model* guarantees that ``key`` and ``value`` are equal; never read off the data.
        appended: (B, H, T, C), outputs of the columns that were appended to the values (``sum_columns``, then 1), in
            the format of ``out``; None where the kernel ran without them.
        layer: index of the layer, where it has one.
        name: qualified module name.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor
    scaling: float
    causal: bool
    visible: Tensor | None = None
    kv_equal: bool = False
    appended: Tensor | None = None
    layer: int | None = None
    name: str = ""
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Shape (B, H, T) of the query rows."""
        batch, heads, rows = self.query.shape[:3]
        return batch, heads, rows

    def per_query_head(self, tensor: Tensor) -> Tensor:
        """Repeat a (B, H_kv, ...) tensor to (B, H, ...), the way grouped-query attention reads it."""
        return tensor.repeat_interleave(self.query.shape[1] // tensor.shape[1], dim=1)

    def derived(self, factory: Callable[[FusedState], Derived]) -> Derived:
        """Return ``factory(self)``, computed at most once."""
        if factory not in self._derived:
            self._derived[factory] = factory(self)
        return cast(Derived, self._derived[factory])


class CallFacts(TypedDict, total=False):
    """What the caller knows of a call, and no kernel; the attributes of the same names in ``FusedState``."""

    kv_equal: bool
    layer: int | None
    name: str


@torch.no_grad()
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scaling: float | None = None,
    augment: bool = True,
    visible: Tensor | None = None,
    **facts: Unpack[CallFacts],
) -> FusedState:
    """Run PyTorch's fused attention kernel and return what it shows.

    On a CPU this is the flash kernel, on CUDA the flash kernel for half formats without any mask and the
    memory-efficient one otherwise. The CUDA paths were written from PyTorch's schemas and have not been run.

    Args:
        query: (B, H, T, D), float64 (CPU only), float32, bfloat16 or float16.
        key: (B, H_kv, S, D), H_kv a divisor of H.
        value: (B, H_kv, S, D_v).
        causal: query i sees the keys 0..i.
        scaling: alpha; None for 1 / sqrt(D).
        augment: whether to append the columns that ``fused_sum`` reads.
        visible: bool, broadcastable to (B, H, T, S), instead of ``causal``.
        **facts: kept in the state, see ``CallFacts``.

    Raises:
        ValueError: for tensors that do not belong together, two masks, an unsupported dtype or device.
    """
    _check_operands(query, key, value, causal, visible)
    alpha = 1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling)
    columns = torch.cat([value, sum_columns(value), torch.ones_like(value[..., :1])], -1) if augment else value
    # The kernels want equal head sizes: channels of zeros add nothing to a score, and nothing to the others.
    width = max(query.shape[-1], columns.shape[-1])
    bias = None if visible is None else _additive(visible, (*query.shape[:3], key.shape[2]), query)
    out, lse = _kernel(_padded(query, width), _padded(key, width), _padded(columns, width), causal, alpha, bias)
    channels = value.shape[-1]
    return FusedState(
        query=query,
        key=key,
        value=value,
        out=out[..., :channels],
        lse=lse,
        scaling=alpha,
        causal=causal,
        visible=visible,
        appended=out[..., channels : columns.shape[-1]] if augment else None,
        **facts,
    )


def sum_columns(value: Tensor) -> Tensor:
    """Return (..., S, C): columns whose sum is the mean-like ``2^-k sum_c v_c``, 2^k the power of two from D_v upwards.

    The factor keeps the sum of D_v channels representable. One column in float32 and float64; in a half format three,
    high, middle and low part, which together are as exact as float32.
    """
    rest = value.double().sum(-1) * 2.0 ** -_halvings(value)
    parts = []
    for _ in range(1 if storage(value.dtype).roundoff == 0 else 3):
        parts.append(rest.to(value.dtype))
        rest = rest - parts[-1].double()
    return torch.stack(parts, -1)


def sum_of_columns(columns: Tensor, value: Tensor) -> Tensor:
    """Return (...,) float64, the channel sum that the sum columns of ``value`` or their outputs (..., C) stand for."""
    return columns.double().sum(-1) * 2.0 ** _halvings(value)


def _halvings(value: Tensor) -> int:
    return (max(value.shape[-1], 1) - 1).bit_length()


def _padded(operand: Tensor, width: int) -> Tensor:
    return functional.pad(operand, (0, width - operand.shape[-1]))


def _additive(visible: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -math.inf)
    return bias.expand(shape)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, alpha: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return out (B, H, T, D) and logsumexp (B, H, T) of operands that have one head size."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=alpha
        )
    elif bias is None and query.dtype in (torch.bfloat16, torch.float16) and not causal:
        width = query.shape[-1] + -query.shape[-1] % 8
        operands = [_padded(operand, width) for operand in (query, key, value)]
        out, lse = aten._scaled_dot_product_flash_attention(*operands, 0.0, causal, scale=alpha)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, causal, scale=alpha
        )[:2]
    # CUDA kernels pad channels and rows.
    return out[..., : value.shape[-1]], lse[..., : query.shape[2]]


def _check_operands(query: Tensor, key: Tensor, value: Tensor, causal: bool, visible: Tensor | None) -> None:
    storage(query.dtype)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, allowed {query.dtype} on {query.device}")
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"query: got device {query.device.type}, allowed cpu, cuda")
    shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
    if not all(len(shape) == 4 and min(shape) > 0 for shape in shapes):
        raise ValueError(f"query, key, value: got shapes {shapes}, allowed four axes each, none empty")
    if key.shape[-1] != query.shape[-1] or key.shape[0] != query.shape[0] or query.shape[1] % key.shape[1]:
        raise ValueError(f"key: got shape {shapes[1]}, which does not fit queries of shape {shapes[0]}")
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"value: got shape {shapes[2]}, allowed {(*key.shape[:3], '...')}")
    if visible is not None and causal:
        raise ValueError("visible: got a mask together with causal=True, allowed one of them")
    if visible is not None and visible.dtype != torch.bool:
        raise ValueError(f"visible: got dtype {visible.dtype}, allowed bool (True = visible)")
