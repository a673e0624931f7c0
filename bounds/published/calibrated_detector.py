"""What detectors share that learn from fault-free calls, layer by layer.

>>> from bounds import Verdict
>>> class Largest(CalibratedDetector[float]):
...     name, needs, statement, cost = "largest", frozenset({"out"}), "no output exceeds what was seen", "d"
...     def learn(self, state, known):
...         return max(known or 0.0, float(state.out.abs().max()))
...     def judge(self, state, baseline):
...         return Verdict(self.name, 1, int(float(state.out.abs().max()) > self.learned(state)))
>>> ones = torch.ones(1, 1, 1, 1)
>>> state = AttentionState(query=ones, key=ones, value=ones, logits=ones, weights=ones, out=ones,
...                        scaling=1.0, kv_equal=True, has_bias_or_cap=False, layer=0)
>>> detector = Largest()
>>> detector.check(state).reason
'it has seen no fault-free call of layer 0 in calibration'
>>> detector.calibrate(state)
>>> detector.check(state).fired
False
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, TypeVar

import torch

from bounds.core.attention_state import AttentionState
from bounds.core.detector import Detector

Learned = TypeVar("Learned")


class CalibratedDetector(Detector, Generic[Learned]):
    """A detector with thresholds from fault-free calls of inputs that are not evaluated.

    Subclasses set the class attributes of ``Detector`` and implement ``learn`` and ``judge``. A layer that calibration
    did not show is not judged. No theorem rules out false positives.
    """

    proved = False
    calibrated = True

    def __init__(self, tolerance: float = 0.0) -> None:
        """Set the allowance that is added to every threshold."""
        super().__init__(tolerance)
        self._learned: dict[tuple[str, int | None], Learned] = {}

    @abstractmethod
    def learn(self, state: AttentionState, known: Learned | None) -> Learned:
        """Return the knowledge about a layer after one more fault-free call; ``known`` is None at the first.

        Raises:
            ValueError: when the call cannot be fault-free, as it is not finite.
        """

    def learned(self, state: AttentionState) -> Learned:
        """Return the knowledge about the state's layer."""
        return self._learned[_layer_key(state)]

    @torch.no_grad()
    def calibrate(self, state: AttentionState) -> None:
        """Learn from a fault-free call; one that lacks a tensor teaches nothing, and ``applicable`` will say so.

        Raises:
            ValueError: when the call cannot be fault-free, as it is not finite.
        """
        if super().applicable(state) is None:
            key = _layer_key(state)
            self._learned[key] = self.learn(state, self._learned.get(key))

    def applicable(self, state: AttentionState) -> str | None:
        """Return why nothing can be said: a missing tensor, or a layer that calibration did not show."""
        if (reason := super().applicable(state)) is not None:
            return reason
        if _layer_key(state) not in self._learned:
            return f"it has seen no fault-free call of layer {state.layer} in calibration"
        return None


def _layer_key(state: AttentionState) -> tuple[str, int | None]:
    return state.name, state.layer
