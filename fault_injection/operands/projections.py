"""Find the key and the value projection of every attention core, however the architecture lays them out.

Layouts are measured, not looked up. Every linear module of the model is made to put out a code instead of its
result, and the codes are read back where keys and values enter the attention, at position 0, where rotary embeddings
are the identity. What arrives unchanged tells which output features of which module are the keys and the values:
separate modules, contiguous blocks, interleaved heads and grouped queries alike. Where a normalisation lies in
between, separate modules are recognised by their names; anything else is left unrecognised, with the reason.

>>> import transformers
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> projections = discover_projections(transformers.GPT2LMHeadModel(config))     # by core; or why there are none
>>> pair = projections["transformer.h.0.attn"]
>>> pair.key.weight().shape                         # (features, inputs), in the order (head, channel)
torch.Size([16, 16])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fault_injection.attention.call import AttentionCore
from fault_injection.attention.example_inputs import example_inputs as make_example_inputs
from fault_injection.attention.instrument import attention_cores, evaluation_mode, tapped
from fault_injection.operands.sparse_code import CodeReader, instrumented, unscaled_rotations
from fault_injection.operands.sparse_code import Projection as Projection
from fault_injection.operands.sparse_code import SparseCode as _SparseCode

_SEPARATE_NAMES = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"))


@dataclass(frozen=True, eq=False)
class KeyValueProjections:
    """The two projections of one core; their rows correspond, head by head and channel by channel."""

    key: Projection
    value: Projection


def discover_projections(
    model: nn.Module, example_inputs: Mapping[str, Any] | None = None
) -> dict[str, KeyValueProjections | str]:
    """Return the key and value projections of every attention core, by the core's qualified name.

    A core without a comparable pair maps to the reason, a sentence fragment. The model may be patched or not, and is
    left as it was. A few small forward passes are run, through every tap of an open session: call it outside of them.

    Args:
        model: a Hugging Face model.
        example_inputs: keyword arguments of a small forward pass, as for ``monkey_patch_model``.

    Raises:
        NoAttentionError, UncoveredArchitectureError: as for ``monkey_patch_model``.
    """
    inputs = make_example_inputs(model) if example_inputs is None else example_inputs
    modules = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    code = _SparseCode(modules)
    reader = CodeReader(code)
    with instrumented(model, inputs), evaluation_mode(model), unscaled_rotations(model):
        cores = attention_cores(model)
        for digit in range(code.digits):
            with reader.hooked(digit), tapped(model, reader):
                model(**inputs)
    return {core.name: _projections(core, cores, reader) for core in cores}


def _projections(core: AttentionCore, cores: Sequence[AttentionCore], reader: CodeReader) -> KeyValueProjections | str:
    keys, values = reader.numbers.get((core.index, "k")), reader.numbers.get((core.index, "v"))
    if keys is None or values is None:
        return "the example inputs do not reach it; pass example_inputs= that do"
    if keys.shape[-1] != values.shape[-1]:
        return f"D_k != D_v ({keys.shape[-1]} and {values.shape[-1]} channels)"
    origin = reader.keys_of[core.index]
    if origin != core.index:
        return f"it has no keys and values of its own but reuses those of {cores[origin].name}"
    pair = _from_code(keys, values, reader.code) or _from_names(core.module, reader)
    if pair is None:
        names = [name for name, module in core.module.named_modules() if module in reader.sources]
        return f"its key and value projections were not recognised among its linear modules {names}"
    if not torch.equal(reader.sources[pair.key.module], reader.sources[pair.value.module]):
        return "its keys and values are projected from different inputs"
    dtypes = {cast(Tensor, projection.module.weight).dtype for projection in (pair.key, pair.value)}
    if not all(dtype.is_floating_point for dtype in dtypes):
        return f"its projections are quantised ({', '.join(sorted(map(str, dtypes)))})"
    return pair


def _from_code(keys: Tensor, values: Tensor, code: _SparseCode) -> KeyValueProjections | None:
    """Return the projections if every code arrived; heads repeated for grouped queries count once."""
    if keys.shape != values.shape:
        return None
    # A dictionary keeps the order in which its keys were first seen.
    pairs = dict.fromkeys(zip(keys.flatten().tolist(), values.flatten().tolist(), strict=True))
    key, value = (code.projection(column) for column in zip(*pairs, strict=True))
    return KeyValueProjections(key, value) if key is not None and value is not None else None


def _from_names(module: nn.Module, reader: CodeReader) -> KeyValueProjections | None:
    for key_name, value_name in _SEPARATE_NAMES:
        key, value = getattr(module, key_name, None), getattr(module, value_name, None)
        if value is None and getattr(module, "use_alternative_attention", False):
            value = key  # gemma4's `attention_k_eq_v`: one module projects both
        if not isinstance(key, nn.Module) or not isinstance(value, nn.Module):
            continue
        if key in reader.sources and value in reader.sources:
            rows = torch.arange(reader.code.features(key))
            if len(rows) == reader.code.features(value):
                return KeyValueProjections(Projection(key, rows), Projection(value, rows))
    return None
