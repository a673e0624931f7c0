"""The probe: reads and rewrites the intermediates of an architecture's *own* eager attention code.

No attention is reimplemented here. A ``TorchFunctionMode`` watches the calls that the model's own code makes and
follows product (scores) -> softmax (logits in, weights out) -> product (out). A tensor that a tap returns replaces the
result of that call, so every later operation, dtype cast and mask is the model's own.

    with AttentionProbe(core, emit, batch=2, operands=True):
        module.forward(hidden_states)   # emit(name, tensor) sees query, key, scores, logits, weights, value, mass, out
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fault_injection.attention.call import AttentionCore, ScoreProduct

PRODUCTS: frozenset[Any] = frozenset(
    {
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
        torch.baddbmm,
        torch.Tensor.baddbmm,
    }
)
_WITH_ADDEND: frozenset[Any] = frozenset({torch.baddbmm, torch.Tensor.baddbmm})
SOFTMAXES: frozenset[Any] = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax})

Emit = Callable[[str, Tensor], Tensor]


class ProbeError(RuntimeError):
    """The model's code did not follow the steps of an attention core; all later results would be meaningless."""


def product_operands(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the two factors of a batched product (both with at least 3 dimensions), else ``None``."""
    if func not in PRODUCTS:
        return None
    first, second = _operand_slots(func, args, kwargs)
    left, right = _get(args, kwargs, first), _get(args, kwargs, second)
    if isinstance(left, Tensor) and isinstance(right, Tensor) and left.dim() >= 3 and right.dim() >= 3:
        return left, right
    return None


def is_batched_softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether this call is a softmax over at least 3 dimensions; routers and classifiers use 2."""
    if func not in SOFTMAXES:
        return False
    tensor = args[0] if args else kwargs.get("input")
    return isinstance(tensor, Tensor) and tensor.dim() >= 3


_FACTOR_NAMES = (("input", "batch1"), ("other", "mat2", "tensor2", "batch2"))


def _operand_slots(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, int | str]:
    """Return where the two factors of a product are: the position or the keyword of each."""
    first = 1 if func in _WITH_ADDEND else 0
    slots: list[int | str] = []
    for offset, names in enumerate(_FACTOR_NAMES):
        position = first + offset
        named = [name for name in names if name in kwargs and not (func in _WITH_ADDEND and name == "input")]
        slots.append(position if position < len(args) else named[0] if named else names[-1])
    return slots[0], slots[1]


def _get(args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str) -> Any:
    if isinstance(slot, str):
        return kwargs.get(slot)
    return args[slot] if slot < len(args) else None


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str, value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(slot, str):
        return args, {**kwargs, slot: value}
    return (*args[:slot], value, *args[slot + 1 :]), kwargs


class AttentionProbe(TorchFunctionMode):
    """Watches one evaluation of one attention core.

    Args:
        core: the core; it says which batched products of the call are the scores and the output.
        emit: called as ``emit(name, tensor)`` with each tensor of attention, in the canonical shapes of
            ``fault_injection.attention.call``; its return value takes the tensor's place. The names are those of
            ``Location.tensor``.
        batch: the batch size, to tell ``(batch * head, query, channel)`` layouts apart.
        operands: emit q, k and v from the factors of the two products (path R); path A emits them before.
        note_product: called before the scores are emitted if their product is not a plain one.

    Raises:
        ProbeError: on leaving, if not all three steps were seen (``finish``).
    """

    def __init__(
        self,
        core: AttentionCore,
        emit: Emit,
        batch: int,
        *,
        operands: bool,
        note_product: Callable[[ScoreProduct], None] = lambda product: None,
    ) -> None:
        super().__init__()
        self._note_product = note_product
        self._core = core
        self._emit = emit
        self._batch = batch
        self._operands = operands
        self._phase = "scores"
        self._products_seen = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._phase == "softmax" and is_batched_softmax(func, args, kwargs):
            return self._softmax(func, args, kwargs)
        if self._phase != "done" and product_operands(func, args, kwargs) is not None:
            number, self._products_seen = self._products_seen, self._products_seen + 1
            if (self._phase, number) == ("scores", self._core.score_product):
                return self._scores(func, args, kwargs)
            if (self._phase, number) == ("out", self._core.out_product):
                return self._out(func, args, kwargs)
        return func(*args, **kwargs)

    def finish(self) -> None:
        """Raise ``ProbeError`` unless scores, weights and out were all seen."""
        if self._phase != "done":
            raise ProbeError(
                f"{self._core.name} ({type(self._core.module).__name__}): its forward ended while waiting "
                f"for the {self._phase!r} step of attention; this code path is not covered"
            )

    def _scores(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self._operands:
            query_slot, key_slot = _operand_slots(func, args, kwargs)
            args, kwargs = self._operand("query", args, kwargs, query_slot, transposed=False)
            args, kwargs = self._operand("key", args, kwargs, key_slot, transposed=True)
        self._phase = "softmax"
        if func in _WITH_ADDEND:
            self._note_product(self._addend(func, args, kwargs))
        return self._result("scores", func(*args, **kwargs))

    def _addend(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ScoreProduct:
        addend: Tensor = args[0] if args else kwargs["input"]
        beta, factor = float(kwargs.get("beta", 1)), float(kwargs.get("alpha", 1))
        # The product broadcasts its addend, and ignores it if beta = 0.
        canonical = self._canonical(addend) if addend.dim() == 3 and addend.shape[0] > 1 else addend
        return ScoreProduct(factor, canonical * beta if beta else None)

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        logits: Tensor = args[0] if args else kwargs["input"]
        dtype = kwargs.get("dtype")
        # softmax(x, dtype=d) first rounds x to d; its input is the rounded tensor.
        narrowed = logits.to(dtype) if dtype is not None and dtype.itemsize < logits.dtype.itemsize else logits
        emitted = self._result("logits", narrowed)
        if emitted is not narrowed:
            args, kwargs = _replaced(args, kwargs, 0 if args else "input", emitted)
        self._phase = "out"
        return self._result("weights", func(*args, **kwargs))

    def _out(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        mass_slot, value_slot = _operand_slots(func, args, kwargs)
        if self._operands:
            args, kwargs = self._operand("value", args, kwargs, value_slot, transposed=False)
        args, kwargs = self._operand("mass", args, kwargs, mass_slot, transposed=False)
        self._phase = "done"
        return self._result("out", func(*args, **kwargs))

    def _operand(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slot: int | str,
        *,
        transposed: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        operand: Tensor = _get(args, kwargs, slot)
        canonical = self._canonical(operand)
        canonical = canonical.transpose(-1, -2) if transposed else canonical
        emitted = self._emit(name, canonical)
        if emitted is canonical:
            return args, kwargs
        changed = emitted.transpose(-1, -2) if transposed else emitted
        return _replaced(args, kwargs, slot, changed.reshape(operand.shape))

    def _result(self, name: str, tensor: Tensor) -> Tensor:
        canonical = self._canonical(tensor)
        emitted = self._emit(name, canonical)
        return tensor if emitted is canonical else emitted.reshape(tensor.shape)

    def _canonical(self, tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:
            return tensor
        if tensor.dim() == 3 and tensor.shape[0] % self._batch == 0:
            return tensor.unflatten(0, (self._batch, tensor.shape[0] // self._batch))
        raise ProbeError(
            f"{self._core.name}: attention tensor of shape {tuple(tensor.shape)} with batch {self._batch}; "
            "expected (batch, head, ., .) or (batch * head, ., .)"
        )
