"""Floating-point operations by formula: attention, the epsilon chain, a whole forward pass.

A multiply-add is two operations, as everywhere in the field; every other scalar operation (add, compare,
divide, exponential) is one. Biases, activations, normalisations and the softmax are not counted, which is
also the convention of ``torch.utils.flop_counter.FlopCounterMode``, against which the formulas are tested.
Masked positions are counted: eager attention computes the whole rectangle of queries times keys and masks
it afterwards, for sliding windows too.

>>> lengths = dict(queries=8, keys=8, head_dim=16, value_dim=16, hidden=64)
>>> shape = AttentionShape(layers=1, batch=2, heads=4, kv_heads=2, **lengths)
>>> attention_flops(shape) == 2 * (2 * 2 * 4 * 8 * 8 * 16)
True
>>> epsilon_chain_flops(rows=1, keys=100)
514
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

EPSILON_CHAIN_PER_KEY = 5
EPSILON_CHAIN_PER_ROW = 14

_TOKEN_KEYS = ("input_ids", "inputs_embeds", "decoder_input_ids")


@dataclass(frozen=True)
class AttentionShape:
    """The sizes that determine the work of the self-attention layers of one forward pass.

    ``layers`` equal layers, each with query (B, H, T, D), key (B, H_kv, S, D) and value (B, H_kv, S, D_v);
    ``hidden`` is the width of the residual stream. For one layer, or for the layers that a detector checks,
    use ``dataclasses.replace(shape, layers=1)``.
    """

    layers: int
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    hidden: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "layers" else 1  # a detector may check no layer at all
            if type(value) is not int or value < least:
                raise ValueError(f"AttentionShape.{field.name}: got {value!r}, allowed: an integer >= {least}")
        if self.heads % self.kv_heads:
            raise ValueError(f"AttentionShape.kv_heads: got {self.kv_heads}, allowed: a divisor of heads={self.heads}")


def attention_flops(shape: AttentionShape) -> int:
    """Return the operations of both attention products of all layers.

    Each of the B*H*T*S scores is an inner product of length D: 2*B*H*T*S*D. Each of the B*H*T*D_v outputs
    is an inner product of length S: 2*B*H*T*S*D_v. Grouped key heads save memory, not arithmetic, so H
    counts, not H_kv.
    """
    rectangle = shape.batch * shape.heads * shape.queries * shape.keys
    return shape.layers * 2 * rectangle * (shape.head_dim + shape.value_dim)


def projection_flops(shape: AttentionShape) -> int:
    """Return the operations of the plain q, k, v and output projections of all layers.

    A projection of B*T rows from width m to width p costs 2*B*T*m*p; q has p = H*D, k has H_kv*D, v has
    H_kv*D_v, and the output projection goes from H*D_v back to the hidden width. Keys and values of cached
    positions cost nothing.
    """
    query_key = (shape.heads + shape.kv_heads) * shape.head_dim
    value_out = (shape.kv_heads + shape.heads) * shape.value_dim
    return shape.layers * 2 * shape.batch * shape.queries * shape.hidden * (query_key + value_out)


def epsilon_chain_flops(rows: int, keys: int) -> int:
    """Return the operations of the epsilon chain (docs/theory.md, T2) on ``rows`` rows of ``keys`` keys.

    Per row of n keys: n-1 comparisons for the maximum, n-2 for the second largest, n for the mean (n-1
    additions and a division), 2n-1 for sum_j w_j a_j: 5n-4. Per row besides: E = a* - sum (1), the gap (1),
    lower bound g/(1+e^g) (3), middle g(1-w*) (2), first upper bound a* - mean (1), second upper bound with
    its branch (6; the Lambert value depends on n alone and is a table), four comparisons with E: 18.
    Together 5n+14. A row with one key has all bounds zero by definition and is charged the same. One
    operation is one addition, multiplication, division, comparison or exponential.
    """
    if rows < 0 or keys < 1:
        raise ValueError(f"epsilon_chain_flops: got rows={rows}, keys={keys}, allowed: rows >= 0 and keys >= 1")
    return rows * (EPSILON_CHAIN_PER_KEY * keys + EPSILON_CHAIN_PER_ROW)


def bounds_flops(shape: AttentionShape) -> int:
    """Return the operations of the epsilon chain on every query row of all layers of ``shape``.

    Rows are charged the full S keys: an implementation on whole tensors masks entries, it does not skip them.
    """
    rows = shape.layers * shape.batch * shape.heads * shape.queries
    return epsilon_chain_flops(rows, shape.keys)


def linear_flops(model: nn.Module, tokens: int, sequences: int | None = None) -> int:
    """Return the operations of every ``nn.Linear`` and ``Conv1D`` of ``model``, each on ``tokens`` rows.

    A layer with an (m, p) weight costs 2*m*p a row. Modules called ``pooler`` read one row a sequence and
    are charged ``sequences`` rows (``tokens`` when not given). A layer the pass does not call is counted
    all the same.
    """
    total = 0
    linear = _linear_types()
    for name, module in model.named_modules():
        if isinstance(module, linear):
            rows = tokens if sequences is None or "pooler" not in name.split(".") else sequences
            total += 2 * cast(Tensor, module.weight).numel() * rows
    return total


def forward_flops(model: nn.Module, batch: Tensor | Mapping[str, Any], keys: int | None = None) -> int:
    """Return the operations of one forward pass: projections, MLP and head by weight shape, plus attention.

    Args:
        model: a Hugging Face model with a ``config``; decoder-only or encoder-only.
        batch: token ids (B, T), or a mapping with ``input_ids`` (B, T) or ``inputs_embeds`` (B, T, hidden).
        keys: number of keys S when a cache adds to the T of the batch; T by default.

    Raises:
        ValueError: the formula does not hold for this architecture; the message names the reason.
    """
    if (gap := forward_formula_gap(model)) is not None:
        raise ValueError(f"forward_flops: {gap}; allowed: models of Linear, Conv1D and Embedding layers")
    shape = attention_shape(model, batch, keys)
    return linear_flops(model, shape.batch * shape.queries, shape.batch) + attention_flops(shape)


def counted_forward_flops(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> int:
    """Run one forward pass without gradients under ``FlopCounterMode`` and return what it counted.

    Refuses fused attention, whose products the counter does not see on a CPU (it would report them as
    zero). Grouped products of mixture-of-experts layers are not seen either.
    """
    implementation = str(getattr(text_config(model), "_attn_implementation", "eager"))
    if any(word in implementation for word in ("sdpa", "flash", "flex")):
        raise ValueError(
            f"counted_forward_flops: got attention implementation {implementation!r}, whose products the "
            "counter misses; allowed: 'eager' or an implementation that calls eager code"
        )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch) if isinstance(batch, Tensor) else model(**batch)
    return int(counter.get_total_flops())


def batch_shape(batch: Tensor | Mapping[str, Any]) -> tuple[int, int]:
    """Return (batch size, sequence length) of token ids (B, T) or of a mapping that holds them."""
    if isinstance(batch, Mapping):
        held = next((batch[key] for key in _TOKEN_KEYS if batch.get(key) is not None), None)
    else:
        held = batch
    if not isinstance(held, Tensor) or held.ndim < 2:
        got = sorted(batch) if isinstance(batch, Mapping) else getattr(batch, "shape", type(batch).__name__)
        raise ValueError(
            f"batch: got {got}, allowed: a tensor (batch, sequence) or a mapping with "
            f"{' or '.join(map(repr, _TOKEN_KEYS))}"
        )
    return int(held.shape[0]), int(held.shape[1])


def attention_shape(model: nn.Module, batch: Tensor | Mapping[str, Any], keys: int | None = None) -> AttentionShape:
    """Read the sizes of the self-attention of ``model`` from its config, and of the pass from ``batch``.

    Raises:
        ValueError: the layers are not alike, or the model has two stacks; the message says which.
    """
    if (gap := attention_formula_gap(model)) is not None:
        raise ValueError(f"attention_shape: {gap}; allowed: one stack of equal attention layers")
    config = text_config(model)
    batch_size, length = batch_shape(batch)
    heads = int(config.num_attention_heads)
    head_dim = head_dimension(model)
    return AttentionShape(
        layers=int(config.num_hidden_layers),
        batch=batch_size,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        queries=length,
        keys=length if keys is None else keys,
        head_dim=head_dim,
        value_dim=int(getattr(config, "v_head_dim", None) or head_dim),
        hidden=int(config.hidden_size),
    )


def head_dimension(model: nn.Module) -> int:
    """Return D, the length of one head's query vector, from the config."""
    config = text_config(model)
    if getattr(config, "qk_nope_head_dim", None):  # latent attention: a part with and a part without rotation
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    stated = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


def attention_formula_gap(model: nn.Module) -> str | None:
    """Say why the attention formula does not hold for ``model``, or return None when it does."""
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder has self and cross attention of different lengths"
    if config is not getattr(model, "config", None):
        return "the model has other parts besides its text model"
    if getattr(config, "is_heterogeneous", False) or getattr(config, "global_head_dim", None):
        return "the sizes of a head vary by layer"
    kinds = set(getattr(config, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"})
    if other:
        return f"layers of type {', '.join(map(repr, other))} are not plain attention"
    return None


def forward_formula_gap(model: nn.Module) -> str | None:
    """Say why the sum over Linear and Conv1D weights is not the work of a pass, or return None when it is.

    Weights held anywhere else (fused experts, convolutions) would be left out, and a layer that the model
    runs several times would be counted once: a wrong number without a sign of it.
    """
    if (gap := attention_formula_gap(model)) is not None:
        return gap
    config = text_config(model)
    if getattr(config, "num_hidden_groups", None) not in (None, config.num_hidden_layers):
        return f"{config.num_hidden_layers} layers share the weights of {config.num_hidden_groups}"
    counted = (*_linear_types(), nn.Embedding)
    for name, module in model.named_modules():
        if isinstance(module, counted):
            continue
        for weight, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                return f"{name}.{weight} is a weight of {type(module).__name__}"
    return None


def text_config(model: nn.Module) -> Any:
    """Return the text part of the model's config."""
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"model: got {type(model).__name__} without a .config, allowed: a Hugging Face model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _linear_types() -> tuple[type[nn.Module], ...]:
    """Return the module types whose only work is one product with their weight."""
    from transformers.pytorch_utils import Conv1D  # here, as it costs a second that a model's owner has paid

    return (nn.Linear, Conv1D)
