"""The tap that repairs a pass while it runs.

If the sums of a product's rows and columns, or of the weights' rows, show that one element of scores, weights or output
is wrong, the tap computes this element again, and the pass continues with it (``bounds.effects.correction``).

    corrector = Corrector(situation.visible)
    with tapped(model, injector), tapped(model, watcher), tapped(model, corrector):
        model(**batch)
    corrector.repairs

It comes after injectors and watchers, which see the faulty tensor. In a fault-free pass it finds nothing
(docs/theory.md, T19). It cannot repair errors of queries, keys and values, because the products start from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace

from torch import Tensor

from bounds.effects.correction import Repair, repair_output, repair_scores, repair_weights
from bounds.numerics.rounding import reduced_precision
from experiments.errors import CheckRefusedError
from fault_injection import OBSERVED, AttentionCall
from fault_injection.attention.call_tensors import CallTensors

_PRODUCTS = {"scores": "q", "out": "v"}
"""By result of a product, the operand whose dtype says in which precision it was computed."""


class Corrector:
    """Repairs scores, weights and outputs inside a pass.

    Args:
        visible: by ``(layer, call)``, which keys each query sees (``Situation.visible``).
        layers: the layers to repair (default: all).
        synchronize: called before every reading of the clock.

    Attributes:
        repairs: what became of every violation, in the order of computation.
        seconds: time spent.

    Raises:
        CheckRefusedError: while the pass runs, when matrix products are set to less precision than the theorems assume.
    """

    locations = frozenset(OBSERVED)

    def __init__(
        self,
        visible: Mapping[tuple[int, int], Tensor],
        *,
        layers: AbstractSet[int] | None = None,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.layers = layers
        self.repairs: list[Repair] = []
        self.seconds = 0.0
        self._visible = visible
        self._synchronize = synchronize
        self._kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> Tensor | None:
        """Keep operands; return a repaired copy of a result where one element of it was wrong, else ``None``."""
        if location not in ("scores", "weights", "out"):
            self._kept.keep(call, location, tensor.detach())
            return None
        self._synchronize()
        start = time.perf_counter()
        repaired, found = self._repair(location, tensor.detach(), call)
        self.repairs += [replace(repair, layer=call.core.index, call=call.number) for repair in found]
        self._synchronize()
        self.seconds += time.perf_counter() - start
        return repaired if any(repair.status == "repaired" for repair in found) else None

    def _repair(self, location: str, tensor: Tensor, call: AttentionCall) -> tuple[Tensor, tuple[Repair, ...]]:
        take = self._kept.of(call).pop
        if location == "weights":
            return repair_weights(take("logits"), tensor, self._visible[call.core.index, call.number])
        self._require_precision(location, call)
        if location == "scores":
            return repair_scores(take("q"), take("k"), tensor, call.product.factor, call.product.addend)
        return repair_output(take("mass"), take("v"), tensor)

    def _require_precision(self, location: str, call: AttentionCall) -> None:
        setting = reduced_precision(self._kept.of(call)[_PRODUCTS[location]])
        if setting is not None:
            raise CheckRefusedError(
                f"detect.correct: {location} of {call.core.name}: {setting}; the theorems need full precision"
            )
