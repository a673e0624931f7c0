"""Find every attention core of a model by watching one small forward pass of its own eager code.

>>> import transformers
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model = transformers.GPT2LMHeadModel(config).eval()
>>> model.set_attn_implementation("eager")
>>> [(core.name, core.path) for core in discover_cores(model, {"input_ids": torch.tensor([[3, 1, 4, 1]])})]
[('transformer.h.0.attn', 'A')]

A core is a module in whose forward a batched product, a softmax over it and a second batched product follow each
other. If the softmax happened inside the architecture's eager attention function, the core dispatches through
transformers' attention interface (path A); otherwise its forward has to be wrapped (path R). What looks like
attention but does not fit is refused by name: an architecture is covered wholly or not at all.
"""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fault_injection.attention.call import AttentionCore
from fault_injection.attention.probe import is_batched_softmax, product_operands

EAGER_SUFFIX = "eager_attention_forward"


class UncoveredArchitectureError(ValueError):
    """The model has attention that the probe cannot cover completely."""


class NoAttentionError(ValueError):
    """The model evaluates no softmax attention at all."""


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """Return the architecture's own eager attention function for ``module``, or ``None`` if its forward names none.

    It is read from the globals of the class's unwrapped ``forward``: looking in the modelling file's module instead
    misses variants, and subclasses that another file defines.
    """
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return None
    for name in code.co_names:
        if name.endswith(EAGER_SUFFIX):
            function = forward.__globals__.get(name)
            if callable(function):
                return function
    return None


_STATED_SCALING: dict[str, Callable[[nn.Module], float]] = {
    "GPTNeoSelfAttention": lambda module: 1.0,
    "GPTJAttention": lambda module: 1.0 / float(module.scale_attn),  # type: ignore[arg-type]
    "GPT2Attention": lambda module: float(module.scaling),  # type: ignore[arg-type]
    "BloomAttention": lambda module: float(module.inv_norm_factor),  # type: ignore[arg-type]
    "FalconAttention": lambda module: 1.0 / math.sqrt(module.head_dim),  # type: ignore[arg-type]
    "MptAttention": lambda module: float(module.softmax_scale),  # type: ignore[arg-type]
}
"""The factor between q·k and the logits, which path-A cores pass on and older architectures keep in an attribute."""


def stated_scaling(module: nn.Module) -> float | None:
    """Return the factor alpha of ``logit = alpha q·k + bias`` for a path-R module; ``None`` if it is unknown."""
    stated = _STATED_SCALING.get(type(module).__name__)
    return None if stated is None else stated(module)


@dataclass(frozen=True)
class _Event:
    """One operation that attention is made of: ``product``, ``softmax``, ``einsum`` or ``fused``.

    ``shape`` is the shape of the result, ``left`` the shape of the left factor. ``interface_call`` numbers the calls of
    the architecture's eager function within one forward; ``None`` is outside. ``ordinal`` counts the batched products
    (with those of child modules) since the eager function, or otherwise the forward, began.
    """

    kind: str
    shape: tuple[int, ...]
    left: tuple[int, ...] = ()
    interface_call: int | None = None
    ordinal: int = 0


@dataclass
class _Evaluation:
    """The operations of one forward of one module, in order."""

    name: str
    module: nn.Module
    eager_code: CodeType | None
    events: list[_Event] = field(default_factory=list)
    products: int = 0
    eager_frames: list[tuple[FrameType, int]] = field(default_factory=list)

    def add(self, kind: str, shape: tuple[int, ...], left: tuple[int, ...] = ()) -> None:
        call = self._interface_call()
        start = 0 if call is None else self.eager_frames[call][1]
        self.events.append(_Event(kind, tuple(shape), tuple(left), call, self.products - start))

    def _interface_call(self) -> int | None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not self.eager_code:
            frame = frame.f_back
        if frame is None:
            return None
        if not any(frame is seen for seen, _ in self.eager_frames):
            # A kept frame cannot be recycled, so identity tells the calls apart.
            self.eager_frames.append((frame, self.products))
        return len(self.eager_frames) - 1


FUSED: frozenset[Any] = frozenset(
    {
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
    }
)
"""Functions in which torch evaluates attention as a whole, so that the probe sees no intermediate tensor."""


class _Scout(TorchFunctionMode):
    """Attributes products and softmaxes to the innermost module whose forward is running."""

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self._names = names
        self._stack: list[_Evaluation] = []
        self.evaluations: list[_Evaluation] = []

    def entered(self, module: nn.Module, _inputs: Any) -> None:
        function = eager_function(module)
        code = getattr(inspect.unwrap(function), "__code__", None) if function else None
        self._stack.append(_Evaluation(self._names[module], module, code))

    def left(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        done = self._stack.pop()
        if isinstance(done.module, (nn.Softmax, nn.Dropout)) and self._stack:
            self._stack[-1].events.extend(done.events)
        elif done.events:
            done.eager_frames.clear()
            self.evaluations.append(done)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._stack:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        top = self._stack[-1]
        if (operands := product_operands(func, args, kwargs)) is not None:
            top.add("product", result.shape, operands[0].shape)
            for evaluation in self._stack:
                evaluation.products += 1
        elif is_batched_softmax(func, args, kwargs):
            top.add("softmax", result.shape)
        elif func is torch.einsum and result.dim() >= 3:
            top.add("einsum", result.shape)
        elif func in FUSED:
            top.add("fused", ())


def discover_cores(model: nn.Module, inputs: Mapping[str, Any]) -> list[AttentionCore]:
    """Return the attention cores that one forward of ``model`` on ``inputs`` evaluates, in order of first use.

    Args:
        model: in evaluation mode and set to eager attention.
        inputs: keyword arguments of its forward.

    Raises:
        NoAttentionError: no softmax between two batched products was seen.
        UncoveredArchitectureError: attention of a shape the probe does not cover; the message names the module.
    """
    names = {module: name for name, module in model.named_modules()}
    scout = _Scout(names)
    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(scout.entered))
        handles.append(module.register_forward_hook(scout.left))
    try:
        with torch.no_grad(), scout:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return _cores_of(scout.evaluations, model)


def _cores_of(evaluations: list[_Evaluation], model: nn.Module) -> list[AttentionCore]:
    cores: dict[nn.Module, AttentionCore] = {}
    for evaluation in evaluations:
        for path, products in _attention_in(evaluation):
            module, known = evaluation.module, cores.get(evaluation.module)
            if known is None:
                cores[module] = AttentionCore(len(cores), evaluation.name, path, weakref.ref(module), *products)
            elif (known.path, known.score_product, known.out_product) != (path, *products):
                raise _uncovered(evaluation, "computes attention in two different ways within one forward pass")
    if not cores:
        raise NoAttentionError(
            f"{type(model).__name__}: no attention found (no softmax between two batched products); "
            "this model cannot be instrumented"
        )
    return list(cores.values())


def _attention_in(evaluation: _Evaluation) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield path and products of every attention in one forward of one module.

    Path A may evaluate its eager function several times (one call per image or window); path R attends once.
    """
    calls: dict[int | None, list[_Event]] = {}
    for event in evaluation.events:
        calls.setdefault(event.interface_call, []).append(event)
    for call, events in calls.items():
        products = _products(evaluation, events)
        if products is not None:
            yield ("R" if call is None else "A"), products


def _products(evaluation: _Evaluation, events: list[_Event]) -> tuple[int, int] | None:
    """Return the numbers of the products that give scores and output; ``None`` if these events are no attention."""
    kinds = [event.kind for event in events]
    if "fused" in kinds:
        raise _uncovered(evaluation, "uses a fused attention kernel although eager attention was asked for")
    softmaxes = [i for i, kind in enumerate(kinds) if kind == "softmax"]
    attending = [i for i in softmaxes if _scores_before(events, i) or _outputs_after(events, i)]
    if not attending:
        if softmaxes and ("einsum" in kinds or any(len(events[i].shape) >= 4 for i in softmaxes)):
            raise _uncovered(evaluation, "applies a softmax to scores that no batched product computed")
        return None
    if len(attending) > 1:
        raise _uncovered(evaluation, f"evaluates {len(attending)} attention softmaxes in one call")
    before, after = _scores_before(events, attending[0]), _outputs_after(events, attending[0])
    if len(before) != 1 or len(after) != 1:
        found = f"{len(before)} score products before its softmax and {len(after)} uses of its weights after it"
        raise _uncovered(evaluation, f"has {found}, expected one of each")
    return before[0].ordinal, after[0].ordinal


def _scores_before(events: list[_Event], softmax: int) -> list[_Event]:
    """Return the products before a softmax with a row for each query; relative positions may have other columns."""
    rows = events[softmax].shape[-2]
    return [event for event in events[:softmax] if event.kind == "product" and event.shape[-2] == rows]


def _outputs_after(events: list[_Event], softmax: int) -> list[_Event]:
    rows, columns = events[softmax].shape[-2:]
    return [
        event
        for event in events[softmax + 1 :]
        # A learned sink has a column in the softmax but not in the weights.
        if event.kind == "product" and event.left[-2] == rows and event.left[-1] in (columns, columns - 1)
    ]


def _uncovered(evaluation: _Evaluation, reason: str) -> UncoveredArchitectureError:
    return UncoveredArchitectureError(
        f"{evaluation.name} ({type(evaluation.module).__name__}) {reason}; this architecture is not covered"
    )
