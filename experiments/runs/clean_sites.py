"""The clean tensors of an input at a location, and the predicted effects of faults there (``fault.aim: effect``).

sites = CleanSites(subject, batches)
clean = sites.get(batch_index, "scores", layers, situation)     # by layer; the first call makes a fault-free pass
clean[3].elements, clean[3].terms
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bounds.effects.fault_severity import severity_terms
from bounds.effects.severity_terms import SeverityTerms
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import COMPLETE, Situation, call_state, keep_tensor
from fault_injection import AttentionCall
from fault_injection.attention.call_tensors import CallTensors

KEPT_BYTES = 1 << 30
"""The largest number of bytes kept for inputs other than the last one."""


@dataclass(frozen=True, eq=False)
class CleanSite:
    """One location of one layer in a fault-free pass: its tensor, and the terms that all its severities share."""

    elements: Tensor
    terms: SeverityTerms

    @property
    def nbytes(self) -> int:
        """The number of bytes of its tensors."""
        return self.elements.nbytes + self.terms.nbytes


class CleanSites:
    """The clean sites of inputs; it keeps the latest ones.

    Args:
        subject: the patched model.
        batches: batches on its device.
    """

    def __init__(self, subject: Subject, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._subject, self._batches = subject, batches
        self._kept: OrderedDict[tuple[int, str, tuple[int, ...]], Mapping[int, CleanSite]] = OrderedDict()

    def get(
        self, batch_index: int, location: str, layers: tuple[int, ...], situation: Situation
    ) -> Mapping[int, CleanSite]:
        """Return the sites of ``layers``, by layer; ``situation`` belongs to the input."""
        key = batch_index, location, layers
        if key not in self._kept:
            recorder = _Recorder(location, frozenset(layers), situation)
            self._subject.forward(self._batches[batch_index], recorder)
            self._kept[key] = recorder.found
            while len(self._kept) > 1 and self._nbytes() > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _nbytes(self) -> int:
        return sum(site.nbytes for sites in self._kept.values() for site in sites.values())


class _Recorder:
    """A tap that makes clean sites from the first evaluation of each core."""

    locations = COMPLETE

    def __init__(self, location: str, layers: frozenset[int], situation: Situation) -> None:
        self.layers = layers
        self.found: dict[int, CleanSite] = {}
        self._location, self._situation = location, situation
        self._kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep the tensors of the call; at its end, keep only the needed parts."""
        if call.number > 0:
            return
        keep_tensor(self._kept, location, tensor, call, self._situation)
        if location == "out":
            kept = self._kept.take(call)
            state = call_state(call, kept, self._situation)
            elements = kept[self._location].clone()
            self.found[call.core.index] = CleanSite(elements, severity_terms(state, self._location))
