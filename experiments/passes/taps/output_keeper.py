"""Keep the attention output of one layer, and measure how far a fault moved it (``run.scope = site``).

keeper = OutputKeeper(layer=3)
subject.forward(batch, injector, keeper)
change_of(fault, keeper.out, clean.out)
"""

from __future__ import annotations

from torch import Tensor

from experiments.effects.local_change import LocalChange, local_changes, output_lengths
from fault_injection import AttentionCall, Fault
from fault_injection.faults.one_head import site_of


class OutputKeeper:
    """A tap that keeps the output (B, T, H, d_v) of one core's first evaluation."""

    locations = frozenset({"k", "out"})

    def __init__(self, layer: int) -> None:
        self.layers = frozenset({layer})
        self._out: Tensor | None = None
        self.group = 1
        self._key_heads = 1

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep the output."""
        if call.number == 0 and location == "k":
            self._key_heads = tensor.shape[1]
        elif call.number == 0:
            self._out = tensor.transpose(1, 2).clone()
            self.group = tensor.shape[1] // self._key_heads

    @property
    def out(self) -> Tensor:
        """What was kept; ``ValueError`` if the pass did not reach the core."""
        if self._out is None:
            raise ValueError("the pass never reached the layer whose output was to be kept")
        return self._out


def change_of(fault: Fault, injected: OutputKeeper, clean: OutputKeeper) -> LocalChange:
    """Return how far the output moved, relative to that of the sequence the fault hits.

    A fault in several heads or sequences is measured on the whole batch.
    """
    site = site_of(fault, clean.group)
    if site is None:
        whole = clean.out.flatten(0, 1).unsqueeze(0)
        return local_changes(injected.out.flatten(0, 1).unsqueeze(0), whole, output_lengths(whole))[0]
    heads = slice(site.group * clean.group, (site.group + 1) * clean.group)
    part, expected = (keeper.out[site.sequence : site.sequence + 1] for keeper in (injected, clean))
    return local_changes(part[:, :, heads], expected[:, :, heads], output_lengths(expected))[0]
