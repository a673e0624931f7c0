"""The instrumented attention of one model: the cores, the taps, and the two entries to the probe.

Path A: cores that dispatch through transformers' attention interface get a registered function that runs the
architecture's own eager function under the probe. Path R: the forward of every other core is wrapped by the probe.

>>> import transformers
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model, inputs = transformers.GPT2LMHeadModel(config), {"input_ids": torch.tensor([[3, 1, 4, 1]])}
>>> instrumentation = Instrumentation(model, inputs)   # patches; fault_injection.monkey_patch_model does this
>>> with tapped(model, counter := ReachCounter()):    # taps see and change q, k, v, scores, weights, out
...     _ = model(**inputs)
>>> counter.reached                                    # the layers whose out was seen
{0}
>>> forget(model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fault_injection.attention.call import AttentionCore, Tap
from fault_injection.attention.discovery import (
    UncoveredArchitectureError,
    discover_cores,
    eager_function,
    stated_scaling,
)
from fault_injection.attention.interface import IMPLEMENTATION, SelectedImplementation, configurations, register
from fault_injection.attention.probe import AttentionProbe
from fault_injection.attention.session import Evaluation, ReachCounter, Session
from fault_injection.numbers.model_outputs import bitwise_equal_outputs, output_tensors

Evaluate = Callable[[AttentionCore, tuple[Tensor, Tensor, Tensor], Any, Mapping[str, Any]], Any]

_instrumented: WeakKeyDictionary[nn.Module, Instrumentation] = WeakKeyDictionary()
_owners: WeakKeyDictionary[nn.Module, tuple[Instrumentation, AttentionCore]] = WeakKeyDictionary()


def is_patched(model: nn.Module) -> bool:
    """Return whether ``model`` is instrumented now."""
    return model in _instrumented


def instrumentation_of(model: nn.Module) -> Instrumentation:
    """Return the instrumentation of a patched model; raise ``ValueError`` if it is not patched."""
    try:
        return _instrumented[model]
    except KeyError:
        raise ValueError(f"{type(model).__name__} is not patched; call monkey_patch_model(model) first") from None


def attention_cores(model: nn.Module) -> list[AttentionCore]:
    """Return the attention cores of a patched model; their position is the layer number of a fault."""
    return list(instrumentation_of(model).cores)


@contextmanager
def tapped(model: nn.Module, *taps: Tap) -> Iterator[None]:
    """Show the attention of ``model`` to ``taps``, in their order: put injectors before observers.

    Sessions nest: the taps of an outer session see the tensors first. Each session counts evaluations from its start.
    """
    with instrumentation_of(model).session(taps):
        yield


@contextmanager
def substituted(model: nn.Module, evaluate: Evaluate) -> Iterator[None]:
    """Replace the attention of the path-A cores of a patched model by ``evaluate``, until the block ends.

    It is called as ``evaluate(core, (query, key, value), mask, keywords)`` and returns the results of an attention
    function of transformers: out ``(batch, query, head, channel)`` and weights or ``None``. To call the patched model's
    own evaluation, use ``instrumentation_of(model).evaluate_interface`` with the same arguments.
    """
    instrumentation = instrumentation_of(model)
    outer, instrumentation.substitute = instrumentation.substitute, evaluate
    try:
        yield
    finally:
        instrumentation.substitute = outer


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Let a patched model run its own eager attention until the block ends, as if it were not patched."""
    with instrumentation_of(model).suspended():
        yield


class Instrumentation:
    """The patch of one model, for as long as it lasts.

    Args:
        model: a Hugging Face model.
        inputs: keyword arguments of one small forward pass, for discovery and for the check that ends patching.

    Raises:
        NoAttentionError, UncoveredArchitectureError: the model cannot be covered completely; it stays unchanged.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        if any(module in _owners for module in model.modules()):
            raise ValueError(f"{type(model).__name__}: a part of it, or the whole, is already patched")
        self._sessions: list[Session] = []
        self._own_forwards: dict[int, Callable[..., Any]] = {}
        self._mask_check: RemovableHandle | None = None
        self._selected = SelectedImplementation(configurations(model.modules()))
        self.injection_layers: tuple[int, ...] | None = None
        self.substitute: Evaluate | None = None
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
        self._mask_check = model.register_forward_pre_hook(_refuse_boolean_mask, with_kwargs=True)
        _instrumented[model] = self

    def _install(self) -> None:
        register(_instrumented_attention)
        through_interface = [core.module for core in self.cores if core.path == "A"]
        if through_interface:
            # The enclosing models make the masks, from their own configurations.
            self._selected.select(IMPLEMENTATION)
            self._selected.select("eager", configurations(core.module for core in self.cores if core.path == "R"))
        for core in self.cores:
            _owners[core.module] = (self, core)
            if core.path == "R":
                if "forward" in core.module.__dict__:
                    self._own_forwards[core.index] = core.module.__dict__["forward"]
                # A bound method: in a deep copy it is bound to the copy, which has no owner.
                core.module.__dict__["forward"] = MethodType(_wrapped_forward, core.module)

    def remove(self) -> None:
        """Undo everything: forwards, configurations, ownership."""
        self._uninstall()
        if self._mask_check is not None:
            self._mask_check.remove()
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
        for core in self.cores:
            if _owners.pop(core.module, None) is not None and core.path == "R":
                del core.module.__dict__["forward"]
                if core.index in self._own_forwards:
                    core.module.__dict__["forward"] = self._own_forwards.pop(core.index)

    @contextmanager
    def session(self, taps: tuple[Tap, ...]) -> Iterator[None]:
        """Add ``taps`` for the duration of the block."""
        session = Session(taps)
        self._sessions.append(session)
        try:
            yield
        finally:
            self._sessions.remove(session)

    def _check(self, model: nn.Module, inputs: Mapping[str, Any], expected: Any) -> None:
        counter = ReachCounter()
        with self.session((counter,)):
            got = model(**inputs)
        missing = [core.name for core in self.cores if core.index not in counter.reached]
        if missing:
            raise UncoveredArchitectureError(f"patched, but these attention cores were not reached: {missing}")
        if not output_tensors(expected):
            raise UncoveredArchitectureError(
                f"{type(model).__name__}: its output holds no tensor that could be compared"
            )
        if not bitwise_equal_outputs(expected, got):
            raise UncoveredArchitectureError(
                f"{type(model).__name__}: the instrumented attention is not bitwise equal to the model's own eager "
                "attention; this architecture is not covered"
            )

    def evaluate_interface(
        self,
        core: AttentionCore,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        keywords: Mapping[str, Any],
    ) -> Any:
        """Evaluate a path-A core: its own eager function, under the probe if any tap wants it."""
        function = eager_function(core.module)
        if function is None:
            raise UncoveredArchitectureError(f"{core.name}: its eager attention function is gone")
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            raise ValueError(f"{core.name}: {_BOOLEAN_MASK}")
        scaling = keywords.get("scaling")
        evaluation = self._evaluation(core, float(tensors[0].shape[-1] ** -0.5 if scaling is None else scaling))
        if evaluation is None:
            return function(core.module, *tensors, mask, **keywords)
        emit = evaluation.emit
        query, key, value = (emit(name, t) for name, t in zip(("query", "key", "value"), tensors, strict=True))
        probe = AttentionProbe(core, emit, query.shape[0], operands=False, note_product=evaluation.note_product)
        with probe:
            result = function(core.module, query, key, value, mask, **keywords)
        probe.finish()
        return result

    def evaluate_forward(self, core: AttentionCore, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Evaluate a path-R core: its own forward, under the probe if any tap wants it."""
        own_forward = self._own_forwards.get(core.index) or MethodType(type(core.module).forward, core.module)
        evaluation = self._evaluation(core, stated_scaling(core.module))
        if evaluation is None:
            return own_forward(*args, **kwargs)
        batch = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).shape[0]
        probe = AttentionProbe(core, evaluation.emit, batch, operands=True, note_product=evaluation.note_product)
        with probe:
            result = own_forward(*args, **kwargs)
        probe.finish()
        return result

    def _evaluation(self, core: AttentionCore, scaling: float | None) -> Evaluation | None:
        """Begin an evaluation of a core; ``None`` if no tap wants it."""
        begun = [(session.taps, session.begin(core, scaling)) for session in self._sessions]
        wanted = [(tap, call) for taps, call in begun for tap in taps if tap.layers is None or core.index in tap.layers]
        return Evaluation(wanted) if wanted else None


_BOOLEAN_MASK = (
    "got a boolean attention mask; eager attention adds its mask to the scores, so True would hide nothing. "
    "Pass a 2-D mask of 0 and 1, or an additive float mask (0 and finfo.min)"
)


def _refuse_boolean_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    masks = [*args, *(value for key, value in kwargs.items() if key.endswith("attention_mask"))]
    if any(isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 4 for mask in masks):
        raise ValueError(f"{type(model).__name__}: {_BOOLEAN_MASK}")


def _owner_of(module: nn.Module) -> tuple[Instrumentation, AttentionCore]:
    owner = _owners.get(module)
    if owner is None:
        raise UncoveredArchitectureError(
            f"{type(module).__name__} asks for the instrumented attention but was not reached by the dry run of "
            "monkey_patch_model; pass example_inputs= that use it (for a copy of a patched model: patch the copy)"
        )
    return owner


def _instrumented_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **keywords: Any
) -> Any:
    instrumentation, core = _owner_of(module)
    evaluate = instrumentation.substitute or instrumentation.evaluate_interface
    return evaluate(core, (query, key, value), attention_mask, keywords)


def _wrapped_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    instrumentation, core = _owner_of(module)
    return instrumentation.evaluate_forward(core, args, kwargs)


def forget(model: nn.Module) -> None:
    """Remove the instrumentation of ``model``."""
    instrumentation_of(model).remove()
    del _instrumented[model]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients and dropout; restore every module's training flag at the end."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
