"""Certify calls of a model: gather the six checks that the certificate T26 rests on.

certifier = Certifier(model)                         # reads the weights, as they are now
certifier.certify(state).largest_relative            # inside a pass, on a state with projected operands
"""

from __future__ import annotations

from torch import nn

from bounds.core.attention_state import AttentionState
from bounds.core.row_check import RowCheck
from bounds.effects.certificate import Certificate, FaultChecks, certify
from bounds.products.output_detectors import OutputRows, output_rows
from bounds.products.score_detectors import ScoreRows, score_rows
from bounds.projections.projection_detectors import KeyProjection, ProjectionDetector, QueryProjection, ValueProjection
from bounds.softmax.softmax_detectors import WeightSum, weight_sums


class Certifier:
    """Bounds the effect of an undetected fault, call by call.

    Args:
        model: the model whose calls are certified; the tables of its projections are made here.
    """

    needs = frozenset({"projected"})

    def __init__(self, model: nn.Module) -> None:
        self._projections: dict[str, ProjectionDetector] = {
            "q": QueryProjection(),
            "k": KeyProjection(),
            "v": ValueProjection(),
        }
        for detector in self._projections.values():
            detector.prepare(model)

    def certify(self, state: AttentionState) -> Certificate:
        """Return the certificate of a call; locations whose check does not apply are reported as not certified."""
        return certify(state, FaultChecks(**self._operands(state), **_products(state)))

    def _operands(self, state: AttentionState) -> dict[str, RowCheck]:
        return {
            location: detector.certifying_rows(state)
            for location, detector in self._projections.items()
            if detector.applicable(state) is None
        }


def _products(state: AttentionState) -> dict[str, RowCheck]:
    sources = {"scores": (ScoreRows, score_rows), "weights": (WeightSum, weight_sums), "out": (OutputRows, output_rows)}
    return {
        location: state.derived(rows)
        for location, (detector, rows) in sources.items()
        if detector().applicable(state) is None
    }
