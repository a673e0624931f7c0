"""Is K = V in a model's attention, and make it so.

K = V is a statement about projections: the rows of weight and bias that make the keys equal those that make the
values. At the attention itself rotary embeddings, normalisation of keys and scaling break the equality.

>>> from transformers import GPT2Config, GPT2LMHeadModel
>>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, bos_token_id=0, eos_token_id=1)
>>> model = GPT2LMHeadModel(config)
>>> check_kv_consistency(model)["transformer.h.0.attn"].kv_equal
False
>>> with force_kv_consistent(model, "V<-K"):
...     check_kv_consistency(model)["transformer.h.0.attn"].kv_equal
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fault_injection.names import nearest
from fault_injection.operands.projections import KeyValueProjections, Projection, discover_projections

MODES = ("V<-K", "K<-V")
"""Which projection is overwritten by which."""


@dataclass(frozen=True)
class KVConsistency:
    """How the key and value projections of one layer compare.

    Attributes:
        kv_equal: whether all weights and biases are equal, as numbers (a NaN equals a NaN, a bias that is missing
            equals zero); ``None`` where K = V is undefined or the projections were not recognised.
        k_shape, v_shape: of the projection's weight, (features, inputs).
        relative_difference: ||K - V|| / ||K||, Frobenius norms of the weights, in float64; ``inf`` if only K is zero.
        bias_equal: whether the biases are equal; ``None`` if there is none on either side.
        bias_difference: Euclidean norm of the difference of the biases, in float64; ``None`` as before.
        reason: why ``kv_equal`` is ``None``; the other fields are ``None`` too, then.
    """

    kv_equal: bool | None
    k_shape: tuple[int, int] | None = None
    v_shape: tuple[int, int] | None = None
    relative_difference: float | None = None
    bias_equal: bool | None = None
    bias_difference: float | None = None
    reason: str | None = None


def check_kv_consistency(
    model: nn.Module, *, example_inputs: Mapping[str, Any] | None = None
) -> dict[str, KVConsistency]:
    """Compare the key and value projections of every attention core, by the core's qualified name.

    Works on patched and unpatched models and leaves them as they were. A few small forward passes find the
    projections (``fault_injection.operands.projections``); call it outside of ``tapped`` blocks.

    Args:
        model: a Hugging Face model.
        example_inputs: keyword arguments of one small forward pass, to reach what the guessed ones do not.

    Raises:
        NoAttentionError, UncoveredArchitectureError: as for ``monkey_patch_model``.
    """
    return {
        name: KVConsistency(None, reason=pair) if isinstance(pair, str) else _compared(pair)
        for name, pair in discover_projections(model, example_inputs).items()
    }


def _compared(pair: KeyValueProjections) -> KVConsistency:
    key, value = pair.key.weight().double(), pair.value.weight().double()
    difference, size = float(torch.linalg.norm(key - value)), float(torch.linalg.norm(key))
    key_bias, value_bias = _bias_or_zero(pair.key), _bias_or_zero(pair.value)
    has_bias = pair.key.bias() is not None or pair.value.bias() is not None
    same_bias = _equal(key_bias, value_bias)
    return KVConsistency(
        kv_equal=_equal(key, value) and same_bias,
        k_shape=(key.shape[0], key.shape[1]),
        v_shape=(value.shape[0], value.shape[1]),
        relative_difference=difference / size if size else (0.0 if difference == 0 else float("inf")),
        bias_equal=same_bias if has_bias else None,
        bias_difference=float(torch.linalg.norm(key_bias - value_bias)) if has_bias else None,
    )


def _equal(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _bias_or_zero(projection: Projection) -> Tensor:
    bias = projection.bias()
    return projection.weight().new_zeros(len(projection.rows)).double() if bias is None else bias.double()


@contextmanager
def force_kv_consistent(
    model: nn.Module, mode: str = "V<-K", *, example_inputs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Make K = V in every attention core of ``model`` for the duration of the block.

    Weights and biases are copied in place, and the overwritten ones are put back bit for bit, also after an
    exception. What the block itself does to the overwritten rows is lost.

    Args:
        model: a Hugging Face model, patched or not.
        mode: ``"V<-K"`` overwrites the values' projection, ``"K<-V"`` the keys'.
        example_inputs: as for ``check_kv_consistency``.

    Raises:
        ValueError: another mode; K = V is undefined for a layer, or cannot be had because a bias is missing or
            parameters are tied; the message names the layer, and the model is as it was.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, allowed {', '.join(map(repr, MODES))}{nearest(mode, MODES)}")
    pairs = _comparable(discover_projections(model, example_inputs))
    copies = {
        name: (pair.key, pair.value) if mode == "V<-K" else (pair.value, pair.key) for name, pair in pairs.items()
    }
    for name, (source, target) in copies.items():
        bias = source.bias()
        if bias is not None and target.bias() is None and bool((bias != 0).any()):
            raise ValueError(f"{name}: mode {mode!r} has a bias to copy, but the overwritten projection has none")
    overwritten: list[tuple[Projection, Tensor, Tensor | None]] = []
    try:
        for source, target in copies.values():
            overwritten.append((target, target.weight(), target.bias()))
            target.write(source.weight(), source.bias())
        for name, pair in pairs.items():
            if not _compared(pair).kv_equal:
                raise ValueError(f"{name}: copying did not make K = V; its parameters are tied or computed from others")
        yield
    finally:
        # Backwards, so that a parameter shared by several layers ends with what it had first.
        for target, weight, bias in reversed(overwritten):
            target.write(weight, bias)


def _comparable(found: Mapping[str, KeyValueProjections | str]) -> dict[str, KeyValueProjections]:
    reasons = [f"{name}: {pair}" for name, pair in found.items() if isinstance(pair, str)]
    if reasons:
        more = f" (and {len(reasons) - 1} more layers)" if len(reasons) > 1 else ""
        raise ValueError(f"K = V cannot be forced on {reasons[0]}{more}")
    return {name: pair for name, pair in found.items() if not isinstance(pair, str)}
