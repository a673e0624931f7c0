"""The instrumented attention of one model: the cores, the taps, and the two entries to the probe.

Path A: cores that dispatch through transformers' attention interface get a registered function that runs the
architecture's own eager function under the probe. Path R: the forward of every other core is wrapped by the probe.

    instrumentation = Instrumentation(model, inputs)   # patches; use fault_injection.monkey_patch_model instead
    with tapped(model, tap):                           # taps see and change q, k, v, scores, weights, out
        model(**batch)

Public names: ``Instrumentation``, ``instrumentation_of``, ``tapped``, ``suspended``, ``attention_cores``,
``is_patched``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fault_injection.attention_call import AttentionCall, AttentionCore, Tap
from fault_injection.attention_interface import (
    IMPLEMENTATION,
    SelectedImplementation,
    configurations,
    register,
)
from fault_injection.discovery import UncoveredArchitectureError, discover_cores, eager_function
from fault_injection.model_outputs import bitwise_equal_outputs
from fault_injection.probe import AttentionProbe
from fault_injection.scaling import stated_scaling

_instrumented: WeakKeyDictionary[nn.Module, Instrumentation] = WeakKeyDictionary()
_owners: WeakKeyDictionary[nn.Module, tuple[Instrumentation, AttentionCore]] = WeakKeyDictionary()


def is_patched(model: nn.Module) -> bool:
    """Whether ``model`` is instrumented now."""
    return model in _instrumented


def instrumentation_of(model: nn.Module) -> Instrumentation:
    """Return the instrumentation of a patched model; ``ValueError`` if it is not patched."""
    try:
        return _instrumented[model]
    except KeyError:
        raise ValueError(f"{type(model).__name__} is not patched; call monkey_patch_model(model) first") from None


def attention_cores(model: nn.Module) -> list[AttentionCore]:
    """Return the attention cores of a patched model; their position is the layer number of a fault."""
    return list(instrumentation_of(model).cores)


@contextmanager
def tapped(model: nn.Module, *taps: Tap) -> Iterator[None]:
    """Let ``taps`` see the attention of ``model``, in the order given: put injectors before observers.

    Sessions nest: the taps of an outer session see the tensors first. Call numbers start at zero in every session.
    """
    with instrumentation_of(model).session(taps):
        yield


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Let a patched model run its own eager attention for the duration of the block, as if it were not patched."""
    with instrumentation_of(model).suspended():
        yield


class Instrumentation:
    """The patch of one model, for as long as it lasts.

    Args:
        model: a Hugging Face model.
        inputs: keyword arguments of one small forward pass, for discovery and for the check that ends patching.

    Raises:
        NoAttentionError, UncoveredArchitectureError: the model cannot be covered wholly; it is left as it was.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self._taps: tuple[Tap, ...] = ()
        self._calls: Counter[int] = Counter()
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self._selected = SelectedImplementation(configurations(model.modules()))
        self.injection_layers: tuple[int, ...] | None = None
        self.cores: list[AttentionCore] = []
        with evaluation_mode(model):
            try:
                self._selected.select("eager")
                self.cores = discover_cores(model, inputs)
                expected = model(**inputs)
                self._install()
                self._check(model, inputs, expected)
            except BaseException:
                self.remove()
                raise
        _instrumented[model] = self

    def _install(self) -> None:
        register(_instrumented_attention)
        through_interface = [core.module for core in self.cores if core.path == "A"]
        if through_interface:
            # The masks are made by the enclosing models, from their own configurations.
            self._selected.select(IMPLEMENTATION)
            self._selected.select("eager", configurations(core.module for core in self.cores if core.path == "R"))
        for core in self.cores:
            _owners[core.module] = (self, core)
            if core.path == "R":
                self._wrapped.append((core.module, core.module.__dict__.get("forward")))
                core.module.forward = self._wrapper(core)

    def remove(self) -> None:
        """Undo everything: forwards, configurations, ownership."""
        self._uninstall()
        for core in self.cores:
            _owners.pop(core.module, None)
        self._selected.restore()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model run its own eager code, untouched, for the duration of the block."""
        self._uninstall()
        self._selected.select("eager")
        try:
            yield
        finally:
            self._install()

    def _uninstall(self) -> None:
        for module, own_forward in self._wrapped:
            if own_forward is None:
                del module.forward
            else:
                module.forward = own_forward
        self._wrapped.clear()

    @contextmanager
    def session(self, taps: tuple[Tap, ...]) -> Iterator[None]:
        """Add ``taps`` for the duration of the block."""
        before, calls = self._taps, self._calls
        self._taps, self._calls = (*before, *taps), Counter()
        try:
            yield
        finally:
            self._taps, self._calls = before, calls

    def _check(self, model: nn.Module, inputs: Mapping[str, Any], expected: Any) -> None:
        counter = _ReachCounter()
        with self.session((counter,)):
            got = model(**inputs)
        missing = [core.name for core in self.cores if core.index not in counter.reached]
        if missing:
            raise UncoveredArchitectureError(f"patched, but these attention cores were not reached: {missing}")
        if not bitwise_equal_outputs(expected, got):
            raise UncoveredArchitectureError(
                f"{type(model).__name__}: the instrumented attention is not bitwise equal to the model's own eager "
                "attention; this architecture is not covered"
            )

    def _begin(self, core: AttentionCore, scaling: float | None) -> tuple[tuple[Tap, ...], AttentionCall]:
        number = self._calls[core.index]
        self._calls[core.index] += 1
        taps = tuple(tap for tap in self._taps if tap.layers is None or core.index in tap.layers)
        return taps, AttentionCall(core, number, scaling)

    def interface_call(self, core: AttentionCore, tensors: tuple[Tensor, ...], mask: Any, keywords: Any) -> Any:
        """Evaluate a path-A core: its own eager function, under the probe if any tap wants it."""
        function = eager_function(core.module)
        if function is None:
            raise UncoveredArchitectureError(f"{core.name}: its eager attention function is gone")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            raise ValueError(
                f"{core.name}: got a boolean attention mask; eager attention adds its mask to the scores, so True "
                "would hide nothing. Pass a 2-D mask of 0 and 1, or an additive float mask (0 and finfo.min)"
            )
        scaling = keywords.get("scaling")
        scaling = float(tensors[0].shape[-1] ** -0.5 if scaling is None else scaling)
        taps, call = self._begin(core, scaling)
        if not taps:
            return function(core.module, *tensors, mask, **keywords)
        emit = _emitter(taps)
        tensors = tuple(emit(name, t, call) for name, t in zip(("q", "k", "v"), tensors, strict=True))
        probe = AttentionProbe(call, emit, tensors[0].shape[0], operands=False)
        with probe:
            result = function(core.module, *tensors, mask, **keywords)
        probe.finish()
        return result

    def _wrapper(self, core: AttentionCore) -> Callable[..., Any]:
        own_forward = core.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            taps, call = self._begin(core, stated_scaling(core.module))
            if not taps:
                return own_forward(*args, **kwargs)
            batch = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).shape[0]
            probe = AttentionProbe(call, _emitter(taps), batch, operands=True)
            with probe:
                result = own_forward(*args, **kwargs)
            probe.finish()
            return result

        return forward


class _ReachCounter:
    """Notes which cores finished."""

    locations = frozenset({"out"})
    layers = None

    def __init__(self) -> None:
        self.reached: set[int] = set()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        self.reached.add(call.core.index)


def _emitter(taps: tuple[Tap, ...]) -> Callable[[str, Tensor, AttentionCall], Tensor]:
    def emit(location: str, tensor: Tensor, call: AttentionCall) -> Tensor:
        for tap in taps:
            if location in tap.locations:
                replacement = tap.on(location, tensor, call)
                tensor = tensor if replacement is None else replacement
        return tensor

    return emit


def _instrumented_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any
) -> Any:
    owner = _owners.get(module)
    if owner is None:
        raise UncoveredArchitectureError(
            f"{type(module).__name__} asks for the instrumented attention but was not reached by the dry run of "
            "monkey_patch_model; pass example_inputs= that use it (for a copy of a patched model: patch the copy)"
        )
    instrumentation, core = owner
    return instrumentation.interface_call(core, (query, key, value), attention_mask, keywords)


def forget(model: nn.Module) -> None:
    """Remove the instrumentation of ``model``."""
    instrumentation_of(model).remove()
    del _instrumented[model]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and dropout; every module's own training flag comes back."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
