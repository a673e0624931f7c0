"""The terms that the severities of all faults of one location of one call share, kept in float32.

``bounds.effects.fault_severity`` makes it; the closed forms of ``bounds.effects.forms`` read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.effects.head_view import HeadView, in_units_of, score_tilt

Index = tuple[Tensor, ...]
"""Batch, head, row and column of N candidates, each (N,) int64."""


@dataclass(frozen=True, eq=False)
class SeverityTerms:
    """The terms that the severities of all faults of one location of one call share.

    Attributes:
        location: the location.
        evaluate: its closed form (``ClosedForm.severity``).
        slope: change of a logit with a score; for q and k with the product of a query and a key.
        group: number of query heads that read one key/value head.
        tensors: float32, by name, those of them that the location needs: "length" (B, H, T) of the rows of out;
            "query" (B, H, T, d); "key" (B, H_kv, S', d) and "value" (B, H_kv, S', D_v); "log_weights" (B, H, T, S'),
            accurate where a weight is close to 1; "reach" (B, H, T, S'), the length of ``v_j - o_i``; "spread"
            (B, H_kv, S), the largest weight of a key in units of the length of its row.
    """

    location: str
    evaluate: Callable[[SeverityTerms, Index, Tensor], Tensor]
    slope: float
    group: int
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """The number of bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @torch.no_grad()
    def severity(self, indices: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the largest change of a row of the layer's output, relative to that row, for each candidate.

        Args:
            indices: (N, 4) int64: batch, head, row, column of the element; of keys and values the key/value head.
            before: (N,) float64, the element without the fault.
            after: (N,) float64, with it.

        Returns:
            (N,) float64, 0 or more; infinite where the new value is NaN or an infinity.
        """
        finite = torch.isfinite(after)
        added = torch.where(finite, after - before, 0.0)
        moved = self.evaluate(self, indices.unbind(-1), added)
        return torch.where(finite, moved, torch.inf)

    def relative(self, moved: Tensor, rows: Index) -> Tensor:
        """Return ``moved`` in units of the length of the rows; a row of zeros that nothing moves has not changed."""
        return in_units_of(moved, self.tensors["length"][rows].double())


def _log_weights(view: HeadView) -> Tensor:
    # log(1 - x) from x itself, where the weight is so close to 1 that its own logarithm has rounded to 0.
    nearly_one = torch.log1p(-view.others.gather(-1, view.top))
    top = view.log_weights.gather(-1, view.top)
    return view.log_weights.scatter(-1, view.top, torch.where(top > -0.5, nearly_one, top))


def _reach(view: HeadView) -> Tensor:
    towards = view.value.square().sum(-1) + view.mean.square().sum(-1, keepdim=True) - 2 * view.mean @ view.value.mT
    return towards.clamp(min=0).sqrt().scatter(-1, view.top, view.top_direction.norm(dim=-1, keepdim=True))


def _spread(view: HeadView, length: Tensor) -> Tensor:
    return in_units_of(view.mass.abs(), length[:, None]).amax(0)


PARTS: Mapping[str, Callable[[HeadView, Tensor], Tensor]] = {
    "query": lambda view, _: view.query,
    "key": lambda view, _: view.key,
    "value": lambda view, _: view.value,
    "log_weights": lambda view, _: _log_weights(view),
    "reach": lambda view, _: _reach(view),
    "spread": _spread,
}
SHARED_PARTS = frozenset({"key", "value"})
"""The terms that the query heads of a group share."""


def tilt_of(log_weights: Tensor, delta: Tensor) -> Tensor:
    """Return t of T20 for a key of which only the logarithm of its weight is known."""
    log_weights = log_weights.double()
    return score_tilt(log_weights, -torch.expm1(log_weights), delta)
