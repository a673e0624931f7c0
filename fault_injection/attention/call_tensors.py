"""The tensors that one tap keeps from attention calls while they run.

A tap sees the tensors of a call one after the other, and often needs several of them at once. Every tap keeps its own:
other taps of the same pass neither see nor clear them. They are freed when the call ends, also after an exception.

    kept = CallTensors()                  # in the tap
    kept.keep(call, "q", tensor)          # at an event of the call
    kept.take(call)["q"]                  # at its last event; afterwards nothing of the call is kept

>>> import torch, weakref
>>> from fault_injection import AttentionCore
>>> core = AttentionCore(0, "h.0.attn", "A", weakref.ref(torch.nn.Identity()))
>>> call, kept = AttentionCall(core, 0), CallTensors()
>>> kept.keep(call, "q", torch.ones(1, 2, 3, 4))
>>> len(kept), kept.take(call)["q"].shape, len(kept)
(1, torch.Size([1, 2, 3, 4]), 0)
>>> kept.keep(call, "q", torch.ones(1, 2, 3, 4))
>>> del call
>>> len(kept)
0
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import Tensor

from fault_injection.attention.call import AttentionCall

__all__ = ["CallTensors"]


class CallTensors:
    """The tensors that one tap keeps, by call and location."""

    def __init__(self) -> None:
        # Weak keys: a call that ends by an exception reaches no last event.
        self._kept: WeakKeyDictionary[AttentionCall, dict[str, Tensor]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, call: AttentionCall, location: str, tensor: Tensor) -> None:
        """Keep a tensor of a running call."""
        self._kept.setdefault(call, {})[location] = tensor

    def of(self, call: AttentionCall) -> dict[str, Tensor]:
        """Return the tensors kept from a call, by location."""
        return self._kept.setdefault(call, {})

    def take(self, call: AttentionCall) -> dict[str, Tensor]:
        """Return the tensors kept from a call, and forget them."""
        return self._kept.pop(call, {})
