"""Attention calls for tests of detectors, computed as eager models compute them, with every tensor in the state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bounds import AttentionState

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mask_of(kind: str, rows: int, keys: int) -> torch.Tensor | None:
    query, key = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None, :]
    padding = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    padding[1, ..., : keys // 3] = False
    return {
        "all": None,
        "causal": key <= query,
        "window": (key <= query) & (key > query - 4),
        "padded": padding & (key <= query),
    }[kind]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None = None,
    *,
    kv_equal: bool = False,
    softmax_dtype: torch.dtype | None = None,
    weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> AttentionState:
    """Eager attention in the tensors' own dtype: product, scaling, cap, bias, mask, sink, softmax, cast, product.

    ``sinks``: one logit per head, the column after the keys; its weight is dropped before the value product.
    """
    scaling = query.shape[-1] ** -0.5
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT
    logits = scores * scaling
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if bias is not None:
        logits = logits + bias
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    keys = logits.shape[-1]
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], -1)
        if visible is not None:
            visible = torch.cat([visible, torch.ones(*visible.shape[:-1], 1, dtype=torch.bool)], -1)
    if weights is None:
        weights = torch.softmax(logits, -1, dtype=softmax_dtype)
    mass = weights[..., :keys].to(value.dtype) if sinks is not None else weights.to(value.dtype)
    out = mass @ value.repeat_interleave(group, 1)
    return AttentionState(
        query=query,
        key=key,
        value=value,
        scores=scores,
        logits=logits,
        weights=weights,
        mass=mass,
        out=out,
        scaling=scaling,
        visible=visible,
        kv_equal=kv_equal,
        has_bias_or_cap=bias is not None or cap is not None,
    )


def random_state(seed: int = 0, **options: Any) -> AttentionState:
    """Random attention of a batch of 2.

    Options: dtype, rows, keys, heads, kv_heads, channels, gain, mask, and those of ``attend``.
    """
    get = {"dtype": torch.float32, "rows": 12, "keys": 12, "heads": 4, "kv_heads": 4, "channels": 16, "gain": 1.0}
    get |= options
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query = (draw(2, get["heads"], get["rows"], get["channels"]) * get["gain"]).to(get["dtype"])
    key = draw(2, get["kv_heads"], get["keys"], get["channels"]).to(get["dtype"])
    value = key if get.get("kv_equal") else draw(2, get["kv_heads"], get["keys"], get["channels"]).to(get["dtype"])
    visible = mask_of(get.get("mask", "causal"), get["rows"], get["keys"])
    kept = {name: get[name] for name in ("kv_equal", "softmax_dtype", "bias", "cap", "sinks") if name in get}
    return attend(query, key, value, visible, **kept)


def replaced(state: AttentionState, **changes: Any) -> AttentionState:
    """Return a state with other tensors and without the statistics of the first."""
    return dataclasses.replace(state, **changes)


def poked(tensor: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    """Return a copy with one element replaced."""
    changed = tensor.clone()
    changed[index] = value
    return changed


def flipped(tensor: torch.Tensor, index: tuple[int, ...], bit: int) -> torch.Tensor:
    """Return a copy with one bit of one element flipped."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    changed = tensor.clone()
    pattern = changed.view(integers)
    width = tensor.element_size() * 8
    toggle = 1 << bit if bit < width - 1 else -(1 << (width - 1))
    pattern[index] = pattern[index] ^ toggle
    return changed
