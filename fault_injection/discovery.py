"""Find every attention core of a model by watching one small forward pass of its own eager code.

    cores = discover_cores(model, inputs)      # the model must be set to eager attention

A core is a module in whose forward a batched product, a softmax over it and a second batched product follow each
other. If the softmax happened inside the architecture's eager attention function, the core dispatches through
transformers' attention interface (path A); otherwise its forward has to be wrapped (path R). What looks like
attention but does not fit is refused by name: an architecture is covered wholly or not at all.

Public names: ``discover_cores``, ``eager_function``, ``UncoveredArchitectureError``, ``NoAttentionError``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fault_injection.attention_call import AttentionCore
from fault_injection.probe import SOFTMAXES, product_operands

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


@dataclass(frozen=True)
class _Event:
    """One operation that attention is made of: ``product``, ``softmax`` or ``fused``; shapes of result and left factor.

    ``interface_call`` numbers the calls of the architecture's eager function within one forward; ``None`` is outside.
    """

    kind: str
    shape: tuple[int, ...]
    left: tuple[int, ...] = ()
    interface_call: int | None = None


@dataclass
class _Evaluation:
    """What one forward of one module did, in order."""

    name: str
    module: nn.Module
    eager_code: CodeType | None
    events: list[_Event] = field(default_factory=list)
    eager_frames: list[FrameType] = field(default_factory=list)

    def add(self, kind: str, shape: torch.Size, left: tuple[int, ...] = ()) -> None:
        self.events.append(_Event(kind, tuple(shape), tuple(left), self._interface_call()))

    def _interface_call(self) -> int | None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not self.eager_code:
            frame = frame.f_back
        if frame is None:
            return None
        if not any(frame is seen for seen in self.eager_frames):
            # A kept frame cannot be recycled, so identity tells the calls apart.
            self.eager_frames.append(frame)
        return len(self.eager_frames) - 1


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
            if (operands := product_operands(func, args, kwargs)) is not None:
                self._stack[-1].add("product", result.shape, operands[0].shape)
            elif func in SOFTMAXES and result.dim() >= 3:
                self._stack[-1].add("softmax", result.shape)
            elif func is F.scaled_dot_product_attention:
                self._stack[-1].add("fused", result.shape)
        return result


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
        for path, position in _attention_in(evaluation):
            module, known = evaluation.module, cores.get(evaluation.module)
            if known is None:
                cores[module] = AttentionCore(len(cores), evaluation.name, path, module, position)
            elif (known.path, known.score_product) != (path, position):
                raise _uncovered(evaluation, "computes attention in two different ways within one forward pass")
    if not cores:
        raise NoAttentionError(
            f"{type(model).__name__}: no attention found (no softmax between two batched products); "
            "this model cannot be instrumented"
        )
    return list(cores.values())


def _attention_in(evaluation: _Evaluation) -> Iterator[tuple[str, int]]:
    """Yield ``(path, score product)`` of every attention in one forward of one module.

    Path A may evaluate its eager function several times (one call per image or window); path R attends once.
    """
    calls: dict[int | None, list[_Event]] = {}
    for event in evaluation.events:
        calls.setdefault(event.interface_call, []).append(event)
    for call, events in calls.items():
        position = _score_product(evaluation, events)
        if position is not None:
            yield ("R" if call is None else "A"), position


def _score_product(evaluation: _Evaluation, events: list[_Event]) -> int | None:
    """Return which product gives the scores, ``None`` if these events are no attention."""
    if any(event.kind == "fused" for event in events):
        raise _uncovered(evaluation, "uses a fused attention kernel although eager attention was asked for")
    softmaxes = [i for i, event in enumerate(events) if event.kind == "softmax"]
    attending = [i for i in softmaxes if _scores_before(events, i) or _product_after(events, i)]
    if not attending:
        if any(len(events[i].shape) >= 4 for i in softmaxes):
            raise _uncovered(evaluation, "applies a softmax to 4-D scores that no batched product computed")
        return None
    if len(attending) > 1:
        raise _uncovered(evaluation, f"evaluates {len(attending)} attention softmaxes in one call")
    before = _scores_before(events, attending[0])
    if len(before) != 1 or not _product_after(events, attending[0]):
        used = "uses" if _product_after(events, attending[0]) else "does not use"
        raise _uncovered(evaluation, f"has {len(before)} score products before its softmax and {used} its weights")
    products = [i for i, event in enumerate(events) if event.kind == "product"]
    return products.index(before[0])


def _scores_before(events: list[_Event], softmax: int) -> list[int]:
    rows, columns = events[softmax].shape[-2:]
    return [
        i
        for i, event in enumerate(events[:softmax])
        # A learned sink adds one column between the product and the softmax.
        if event.kind == "product" and event.shape[-2] == rows and event.shape[-1] in (columns, columns - 1)
    ]


def _product_after(events: list[_Event], softmax: int) -> bool:
    rows, columns = events[softmax].shape[-2:]
    return any(
        event.kind == "product" and event.left[-2] == rows and event.left[-1] in (columns, columns - 1)
        for event in events[softmax + 1 :]
    )


def _uncovered(evaluation: _Evaluation, reason: str) -> UncoveredArchitectureError:
    return UncoveredArchitectureError(
        f"{evaluation.name} ({type(evaluation.module).__name__}) {reason}; this architecture is not covered"
    )
