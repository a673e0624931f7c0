"""The terms of instrumented attention: locations, cores, calls and taps.

An *attention core* is a module that evaluates softmax(QK^T)V. Each evaluation is an ``AttentionCall``. While it
runs, every tensor it produces is offered to the *taps*, in the order of computation; a tap may look (return
``None``) or replace it (return a tensor of the same shape and dtype).

Shapes: q ``(batch, head, query, channel)``; k, v ``(batch, key/value head, key, channel)``, not repeated for
grouped queries where the model's own code repeats them inside; scores, logits, weights ``(batch, head, query, key)``;
out ``(batch, head, query, channel)``. Which locations there are is written in ``fault_injection.locations``.

>>> ScoreProduct().factor
1.0
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol
from weakref import ref

from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionCore:
    """One module of a model that evaluates attention.

    Attributes:
        index: position in the order of first evaluation in a forward pass; this is what ``layer`` means.
        name: qualified module name, e.g. ``transformer.h.0.attn``.
        path: ``A`` if the module dispatches through transformers' attention interface, ``R`` if its forward is wrapped.
        reference: the module, held weakly: a patched model that is dropped must be freed.
        score_product, out_product: the numbers of the batched products that give the scores and the output (0 and 1
            unless the evaluation has other products).
    """

    index: int
    name: str
    path: str
    reference: ref[nn.Module] = field(repr=False, compare=False)
    score_product: int = 0
    out_product: int = 1

    @property
    def module(self) -> nn.Module:
        """The module; raises ``ReferenceError`` once the model is gone."""
        module = self.reference()
        if module is None:
            raise ReferenceError(f"{self.name}: the model this attention belonged to is gone")
        return module


@dataclass(frozen=True, eq=False)
class ScoreProduct:
    """The score product of a call: ``factor * QK^T + addend``.

    Attributes:
        factor: 1 for a plain product.
        addend: ``(batch, head, query, key)`` or a shape that broadcasts to it; ``None`` for a plain product. Already
            multiplied by the factor that the product applies to it.
    """

    factor: float = 1.0
    addend: Tensor | None = None


@dataclass(eq=False)
class AttentionCall:
    """One evaluation of a core. Taps use it as a key for tensors (``CallTensors``): two evaluations are never equal.

    Attributes:
        core: the core that is evaluated.
        number: how often this core was evaluated before in the session of the tap that is called (0 for an ordinary
            forward pass). A recomputation by gradient checkpointing has the number of the evaluation it repeats.
        scaling: the factor between QK^T and the logits if the architecture states it, else ``None``.
        product: how the scores follow from queries and keys; known from the scores on.
    """

    core: AttentionCore
    number: int
    scaling: float | None = None
    product: ScoreProduct = field(default_factory=ScoreProduct)


class Tap(Protocol):
    """An object that observes or changes the tensors of attention calls."""

    @property
    def locations(self) -> AbstractSet[str]:
        """The members of ``OBSERVED`` this tap is called for."""

    @property
    def layers(self) -> AbstractSet[int] | None:
        """The indices of the cores this tap is called for; ``None`` for all."""

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> Tensor | None:
        """Observe ``tensor``; return a replacement, or ``None`` to keep it."""
