"""Inject faults into one forward pass, and say exactly what they hit.

>>> import numpy, transformers
>>> from fault_injection import FaultSpec, SiteSurvey, draw_fault, patched
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.tensor([[3, 1, 4, 1]])
>>> with patched(model):
...     with tapped(model, survey := SiteSurvey(model.dtype)):
...         _ = model(tokens)
...     fault = draw_fault(FaultSpec("v", kind="zero"), survey.site(0, "v"), numpy.random.default_rng(0))
...     with injected(model, [fault]) as injector:
...         _ = model(tokens)
>>> injector.records[0].value_after, injector.records[0].bits_after
(0.0, 0)

A fault that hits nothing is an error, never a silent no-op.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fault_injection.attention.call import AttentionCall
from fault_injection.attention.instrument import tapped
from fault_injection.faults.fault import Fault
from fault_injection.numbers.bits import bit_patterns, rewrite_bits


class FaultMissedError(RuntimeError):
    """A fault did not hit its element; the run would have been a silent no-op."""


@dataclass(frozen=True)
class InjectionRecord:
    """The effect of one fault at its site.

    Attributes:
        fault: the fault.
        value_before, value_after: the first hit element as a number.
        bits_before, bits_after: its bit pattern, as non-negative integers.
        changed: the number of elements with a changed bit pattern.
        dtype: the native dtype of the hit tensor.
    """

    fault: Fault
    value_before: float | None
    value_after: float | None
    bits_before: int | None
    bits_after: int | None
    changed: int
    dtype: torch.dtype


class Injector:
    """A tap that applies faults to their tensors.

    Args:
        faults: any number, on any layers and locations; several on one tensor are applied in order.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults: dict[tuple[int, str, int], list[Fault]] = defaultdict(list)
        for fault in faults:
            self._faults[fault.layer, fault.location, fault.call].append(fault)
        self._applied: set[tuple[int, str, int]] = set()
        self.locations = frozenset(fault.location for fault in faults)
        self.layers = frozenset(fault.layer for fault in faults)
        self.records: list[InjectionRecord] = []

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> Tensor | None:
        """Return the faulty tensor if a fault belongs to this tensor, else ``None``."""
        key = call.core.index, location, call.number
        if key not in self._faults:
            return None
        for fault in self._faults[key]:
            tensor = self._apply(fault, tensor, call, recorded=key in self._applied)
        self._applied.add(key)
        return tensor

    def _apply(self, fault: Fault, tensor: Tensor, call: AttentionCall, *, recorded: bool) -> Tensor:
        if tensor.dtype != fault.torch_dtype:
            raise FaultMissedError(
                f"the fault was drawn for {fault.location} of {fault.module} in {fault.dtype}, but met {tensor.dtype}"
            )
        if tuple(tensor.shape) != fault.shape or call.core.name != fault.module:
            raise FaultMissedError(
                f"the fault was drawn for {fault.location} of {fault.module} with shape {fault.shape}, but met "
                f"{call.core.name} with shape {tuple(tensor.shape)}"
            )
        flat = [element.flat for element in fault.elements]
        faulty = rewrite_bits(tensor, flat, [e.keep for e in fault.elements], [e.toggle for e in fault.elements])
        if not recorded:
            self.records.append(injection_record(fault, _elements(tensor, flat), _elements(faulty, flat)))
        return faulty

    def finish(self) -> None:
        """Raise ``FaultMissedError`` unless every fault was applied."""
        missed = [fault for key, faults in self._faults.items() if key not in self._applied for fault in faults]
        if missed:
            names = ", ".join(f"{fault.location} of layer {fault.layer} ({fault.module})" for fault in missed)
            raise FaultMissedError(f"the forward pass never reached {names}; nothing was injected there")


def _elements(tensor: Tensor, flat: Sequence[int]) -> Tensor:
    where = torch.tensor(flat, dtype=torch.int64, device=tensor.device)
    return tensor.detach()[torch.unravel_index(where, tensor.shape)]


def injection_record(fault: Fault, before: Tensor, after: Tensor) -> InjectionRecord:
    """Return the record of a fault, given its elements (N,) before and after it."""
    patterns_before, patterns_after = bit_patterns(before), bit_patterns(after)
    changed = sum(a != b for a, b in zip(patterns_before, patterns_after, strict=True))
    if not patterns_before:
        return InjectionRecord(fault, None, None, None, None, 0, before.dtype)
    values = float(before[0]), float(after[0])
    return InjectionRecord(fault, *values, patterns_before[0], patterns_after[0], changed, before.dtype)


@contextmanager
def injected(model: nn.Module, faults: Sequence[Fault]) -> Iterator[Injector]:
    """Inject ``faults`` into the forward passes of the block; on leaving, every fault must have been applied."""
    injector = Injector(faults)
    with tapped(model, injector):
        yield injector
    injector.finish()
