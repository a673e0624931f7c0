"""Patch a model for fault injection, and undo it without a trace.

>>> import torch, transformers
>>> from fault_injection import attention_cores
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 1, 4, 1]])
>>> before = model(tokens).logits
>>> monkey_patch_model(model) is model             # in place; tapped and injected work on it now
True
>>> [core.name for core in attention_cores(model)]
['transformer.h.0.attn']
>>> _ = unpatch_model(model)                       # config, parameters, hooks and logits as before
>>> torch.equal(model(tokens).logits, before)
True
>>> with patched(model):                           # the same as a context manager, also after an exception
...     is_patched(model)
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from fault_injection.attention.example_inputs import example_inputs as make_example_inputs
from fault_injection.attention.instrument import Instrumentation, forget, instrumentation_of, is_patched
from fault_injection.operands.kv_consistency import force_kv_consistent

Model = TypeVar("Model", bound=nn.Module)

_forced: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def monkey_patch_model(
    model: Model,
    model_type: str | None = None,
    injection_layers: Sequence[int] | None = None,
    force_kv_equal: bool = False,
    *,
    example_inputs: Mapping[str, Any] | None = None,
) -> Model:
    """Instrument the attention of ``model`` in place and return it.

    Args:
        model: a Hugging Face model with any attention implementation; while patched it computes its own *eager*
            attention, bit for bit.
        model_type: checked against ``model.config.model_type`` if given; the architecture is recognised without it.
        injection_layers: the layers that runners may choose from (default: all); cores are numbered in the order of
            their first evaluation in a forward pass.
        force_kv_equal: make V's projection equal to K's until the model is unpatched (``force_kv_consistent``).
        example_inputs: keyword arguments of one small forward pass, for models whose input cannot be guessed, or to
            reach a vision tower that text alone does not reach.

    Raises:
        ValueError: the model is already patched or has another type, or a layer does not exist.
        NoAttentionError, UncoveredArchitectureError: the model cannot be covered completely. It stays unchanged.
    """
    if is_patched(model):
        raise ValueError(f"{type(model).__name__} is already patched; call unpatch_model(model) first")
    own_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is not None and model_type != own_type:
        raise ValueError(f"model_type: got {model_type!r}, but the model's configuration says {own_type!r}")
    instrumentation = Instrumentation(model, example_inputs or make_example_inputs(model))
    try:
        instrumentation.injection_layers = _checked_layers(injection_layers, len(instrumentation.cores))
        if force_kv_equal:
            forcing = force_kv_consistent(model, example_inputs=example_inputs)
            forcing.__enter__()
            _forced[model] = forcing
    except BaseException:
        forget(model)
        raise
    return model


def _checked_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    for layer in layers or ():
        if not 0 <= layer < count:
            raise ValueError(f"injection_layers: got {layer}, allowed 0..{count - 1}")
    return None if layers is None else tuple(layers)


def unpatch_model(model: Model) -> Model:
    """Undo ``monkey_patch_model``; raise ``ValueError`` if the model is not patched."""
    instrumentation_of(model)
    forcing = _forced.pop(model, None)
    if forcing is not None:
        forcing.__exit__(None, None, None)
    forget(model)
    return model


@contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """Instrument ``model`` until the block ends; ``options`` are those of ``monkey_patch_model``."""
    monkey_patch_model(model, **options)
    try:
        yield model
    finally:
        unpatch_model(model)
