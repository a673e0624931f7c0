"""Record where the operands of an attention call came from, while the call runs.

    with OperandRecorder(model, operand_sources(model)) as recorder, tapped(model, tap):
        model(**batch)             # inside tap.on(...): recorder.recorded(call.core)["q"].hidden

A record lives from the projection until the attention module that reads it returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Size, Tensor, nn
from torch.utils.hooks import RemovableHandle

from fault_injection.attention.call import AttentionCore
from fault_injection.operands.operand_source import OperandSource
from fault_injection.operands.operand_tails import Rotation


@dataclass(frozen=True, eq=False)
class RecordedOperand:
    """Where the queries, keys or values of a call come from.

    Attributes:
        hidden: (B, T, D), what the linear module read.
        projected: (B, H, T, d), what it returned, ordered by head and channel; a view where its rows are contiguous.
        rotation: cosines and sines that the attention module was given, (B or 1, T, width); None without.
    """

    hidden: Tensor
    projected: Tensor
    rotation: Rotation | None = None


class OperandRecorder:
    """Hooks the projections and the attention cores of a model; a context manager.

    Args:
        model: the model that ``sources`` belong to, patched or not.
        sources: from ``operand_sources``; an operand that has a reason instead of a source is never recorded.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Mapping[str, OperandSource | str]]) -> None:
        self._cores = {name: module for name, module in model.named_modules() if name in sources}
        self._sources = {
            name: {operand: source for operand, source in of_core.items() if isinstance(source, OperandSource)}
            for name, of_core in sources.items()
        }
        self._linears: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._rotations: dict[str, Rotation | None] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> OperandRecorder:
        """Set the hooks."""
        linears = dict.fromkeys(s.projection.module for of_core in self._sources.values() for s in of_core.values())
        self._handles = [linear.register_forward_hook(self._after_linear, with_kwargs=True) for linear in linears]
        for name, core in self._cores.items():
            self._handles += self._hook_core(name, core)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks and forget everything."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._linears.clear()
        self._rotations.clear()

    def recorded(self, core: AttentionCore) -> dict[str, RecordedOperand]:
        """Return the operands of the call of ``core`` that runs now, by "q", "k", "v".

        Those without a source, or whose projection did not run in this call (they come from a cache), are missing. A
        cache may also have *lengthened* the operand; compare the shapes of ``projected`` and operand.
        """
        return {
            operand: _record(source, *self._linears[source.projection.module], self._rotations.get(core.name))
            for operand, source in self._sources.get(core.name, {}).items()
            if source.projection.module in self._linears
        }

    def _hook_core(self, name: str, core: nn.Module) -> list[RemovableHandle]:
        own = {source.projection.module for source in self._sources[name].values()}

        def forget() -> None:
            self._rotations.pop(name, None)
            for linear in own:
                self._linears.pop(linear, None)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # What an earlier call left behind because it failed.
            forget()
            self._rotations[name] = given_rotation(args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            forget()

        return [
            core.register_forward_pre_hook(before, with_kwargs=True),
            core.register_forward_hook(after, always_call=True),
        ]

    def _after_linear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is not None and isinstance(output, Tensor):
            self._linears[module] = given.detach(), output.detach()


def given_rotation(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Rotation | None:
    """Return the cosines and sines among the arguments of an attention module, (batch or 1, position, width)."""
    named = kwargs.get("position_embeddings")
    for candidate in (named,) if named is not None else args:
        if isinstance(candidate, Tensor) and candidate.is_complex():
            candidate = candidate.real, candidate.imag
        if isinstance(candidate, tuple) and len(candidate) == 2 and _are_tables(*candidate):
            cos, sin = (table.detach() if table.dim() == 3 else table.detach().unsqueeze(0) for table in candidate)
            return cos, sin
    return None


def _are_tables(cos: Any, sin: Any) -> bool:
    return (
        isinstance(cos, Tensor)
        and isinstance(sin, Tensor)
        and cos.shape == sin.shape
        and cos.dim() in (2, 3)
        and cos.is_floating_point()
    )


def _record(source: OperandSource, given: Tensor, returned: Tensor, rotation: Rotation | None) -> RecordedOperand:
    batch, rows = _leading(given.shape[:-1])
    features = returned.reshape(batch, rows, returned.shape[-1])[..., source.features]
    projected = features.unflatten(-1, (source.heads, -1)).transpose(1, 2)
    return RecordedOperand(given.reshape(batch, rows, given.shape[-1]), projected, rotation)


def _leading(shape: Size) -> tuple[int, int]:
    """Return (batch, rows): one axis is one sequence, and axes of length one between batch and rows do not count."""
    if len(shape) < 2:
        return 1, shape.numel()
    return shape[0], shape[1:].numel()
