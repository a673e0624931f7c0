"""A session of taps: which evaluations of the attention cores they see, and under which numbers.

>>> import torch, weakref
>>> module = torch.nn.Identity()
>>> core, session = AttentionCore(0, "h.0.attn", "A", weakref.ref(module)), Session(())
>>> [session.begin(core, scaling=0.5).number for _ in range(3)]
[0, 1, 2]
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from fault_injection.attention.call import AttentionCall, AttentionCore, ScoreProduct, Tap
from fault_injection.locations import at


class Session:
    """Taps, and how often each core was evaluated since they were added."""

    def __init__(self, taps: tuple[Tap, ...]) -> None:
        self.taps = taps
        self._evaluations: Counter[int] = Counter()

    def begin(self, core: AttentionCore, scaling: float | None) -> AttentionCall:
        """Return the call of an evaluation that begins now."""
        number = self._evaluations[core.index]
        if _in_backward() and number > 0:
            # Gradient checkpointing repeats the last evaluation; faults that hit it also hit its repetition.
            return AttentionCall(core, number - 1, scaling)
        self._evaluations[core.index] += 1
        return AttentionCall(core, number, scaling)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


class Evaluation:
    """Offers the tensors of one evaluation of a core to the taps that want it, location by location."""

    def __init__(self, wanted: list[tuple[Tap, AttentionCall]]) -> None:
        self._wanted = wanted

    def emit(self, name: str, tensor: Tensor) -> Tensor:
        """Offer a tensor of the probe to the taps; return it, or what they put in its place."""
        for location in at(name):
            for tap, call in self._wanted:
                if location.name in tap.locations:
                    replacement = tap.on(location.name, tensor, call)
                    tensor = tensor if replacement is None else replacement
        return tensor

    def note_product(self, product: ScoreProduct) -> None:
        """Tell the calls how the scores follow from queries and keys."""
        for _, call in self._wanted:
            call.product = product


class ReachCounter:
    """A tap that notes which cores finished."""

    locations = frozenset({"out"})
    layers = None

    def __init__(self) -> None:
        self.reached: set[int] = set()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Note the core of a call that finished."""
        self.reached.add(call.core.index)
