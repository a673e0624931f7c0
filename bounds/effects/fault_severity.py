"""How much single faults move their layer's output, predicted for many candidates at once from a fault-free call.

    terms = severity_terms(state, "scores")
    terms.severity(indices, before, after)       # (N,) float64: largest change of a row of out, in units of its length

The formulas are T20-T25 of docs/theory.md, as in ``bounds.effects.fault_effect``, where one fault is followed exactly;
here what all faults of a location have in common is computed once and kept in float32, and a candidate costs a
few reads. It is a prediction to choose faults by (``fault.aim: effect``) and no bound: soft caps are taken for the
identity, and what overflows inside the layer is not followed.

Public names: ``SeverityTerms``, ``severity_terms``.

>>> q, k, v = torch.randn(3, 1, 1, 3, 2, generator=torch.Generator().manual_seed(0))
>>> a = q @ k.mT
>>> w = torch.softmax(a, -1)
>>> state = AttentionState(query=q, key=k, value=v, logits=a, scores=a, weights=w, out=w @ v, scaling=1.0,
...                        kv_equal=False, has_bias_or_cap=False)
>>> place, before = torch.tensor([[0, 0, 2, 1]]), state.out[0, 0, 2, 1].double()
>>> length = state.out[0, 0, 2].double().norm()
>>> found = severity_terms(state, "out").severity(place, before[None], (before + 0.5 * length)[None])
>>> round(float(found), 6)
0.5
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds.core.attention_state import AttentionState
from bounds.effects.fault_effect import LOCATIONS, HeadView, head_view, score_tilt, softmax_change

Index = tuple[Tensor, ...]
"""Batch, head, row and column of N candidates, each (N,) int64."""


@dataclass(frozen=True, eq=False)
class SeverityTerms:
    """What the severities of all faults of one location of one call have in common.

    Attributes:
        location: ``q k v scores weights out``.
        slope: change of a logit with a score; for q and k with the product of a query and a key.
        group: number of query heads that read one key/value head.
        tensors: float32, by name, those of them that the location needs: "length" (B, H, T) of the rows of out;
            "query" (B, H, T, d); "key" (B, H_kv, S', d) and "value" (B, H_kv, S', D_v); "log_weights" (B, H, T, S'),
            accurate where a weight is close to 1; "reach" (B, H, T, S'), the length of ``v_j - o_i``; "spread"
            (B, H_kv, S), the largest weight of a key in units of the length of its row.
    """

    location: str
    slope: float
    group: int
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
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
        moved = _EVALUATIONS[self.location](self, indices.unbind(-1), added)
        return torch.where(finite, moved, torch.inf)

    def relative(self, moved: Tensor, rows: Index) -> Tensor:
        """Return ``moved`` in units of the length of the rows; a row of zeros that nothing moves has not changed."""
        return torch.where(moved == 0, 0.0, moved / self.tensors["length"][rows].double())


@torch.no_grad()
def severity_terms(state: AttentionState, location: str) -> SeverityTerms:
    """Compute what the faults of ``location`` have in common, one query head after the other.

    Raises:
        ValueError: an unknown location.
    """
    if location not in LOCATIONS:
        raise ValueError(f"location: got {location!r}, allowed {', '.join(LOCATIONS)}")
    batches, heads = state.out.shape[:2]
    group = heads // state.key.shape[1]
    length = state.out.double().square().sum(-1).sqrt()
    kept: dict[str, list[Tensor]] = {name: [] for name in _NEEDED[location]}
    for batch, head in itertools.product(range(batches), range(heads) if kept else ()):
        view = head_view(state, batch, head)
        for name, found in kept.items():
            if name not in _SHARED or head % group == 0:
                found.append(_PARTS[name](view, length[batch, head]).float())
    tensors = {name: torch.stack(found).unflatten(0, (batches, -1)) for name, found in kept.items()}
    if "spread" in tensors:
        tensors["spread"] = tensors["spread"].unflatten(1, (-1, group)).amax(2)
    slope = state.scaling if location in ("q", "k") else state.scaling / state.score_factor
    return SeverityTerms(location, slope, group, {**tensors, "length": length.float()})


def _log_weights(view: HeadView) -> Tensor:
    # log(1 - x) from x itself, where the weight is so close to 1 that its own logarithm has rounded to 0.
    nearly_one = torch.log1p(-view.others.gather(-1, view.top))
    top = view.log_weights.gather(-1, view.top)
    return view.log_weights.scatter(-1, view.top, torch.where(top > -0.5, nearly_one, top))


def _reach(view: HeadView) -> Tensor:
    towards = view.value.square().sum(-1) + view.mean.square().sum(-1, keepdim=True) - 2 * view.mean @ view.value.mT
    return towards.clamp(min=0).sqrt().scatter(-1, view.top, view.top_direction.norm(dim=-1, keepdim=True))


def _spread(view: HeadView, length: Tensor) -> Tensor:
    mass = view.mass.abs()
    return torch.where(mass == 0, 0.0, mass / length[:, None]).amax(0)


_PARTS: Mapping[str, Callable[[HeadView, Tensor], Tensor]] = {
    "query": lambda view, _: view.query,
    "key": lambda view, _: view.key,
    "value": lambda view, _: view.value,
    "log_weights": lambda view, _: _log_weights(view),
    "reach": lambda view, _: _reach(view),
    "spread": _spread,
}
_SHARED = frozenset({"key", "value"})
"""Parts that the query heads of a group have in common."""

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "q": ("key", "value", "log_weights"),
    "k": ("query", "log_weights", "reach"),
    "v": ("spread",),
    "scores": ("log_weights", "reach"),
    "weights": ("value",),
    "out": (),
}


def _query(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    batch, head, row, channel = index
    key, value = terms.tensors["key"], terms.tensors["value"]
    shared = head // terms.group
    log_weights = terms.tensors["log_weights"][batch, head, row].double()
    delta = terms.slope * added[:, None] * key[batch, shared, :, channel].double()
    top = log_weights.argmax(-1, keepdim=True)
    change = softmax_change(log_weights, log_weights.exp(), top, delta)
    moved = torch.empty_like(added)
    place = batch * key.shape[1] + shared
    for one in place.unique():
        mine = place == one
        moved[mine] = (change[mine] @ value.flatten(0, 1)[one].double()).norm(dim=-1)
    return terms.relative(moved, (batch, head, row))


def _key(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    batch, shared, key, channel = index
    largest = torch.zeros_like(added)
    for reader in range(terms.group):
        head = shared * terms.group + reader
        query = terms.tensors["query"][batch, head, :, channel].double()
        tilt = _tilt(terms.tensors["log_weights"][batch, head, :, key], terms.slope * added[:, None] * query)
        moved = tilt.abs() * terms.tensors["reach"][batch, head, :, key].double()
        largest = torch.maximum(largest, terms.relative(moved, (batch, head)).amax(-1))
    return largest


def _value(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    spread = terms.tensors["spread"][index[:3]].double()
    return torch.where(added == 0, 0.0, added.abs() * spread)


def _scores(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    tilt = _tilt(terms.tensors["log_weights"][index], terms.slope * added)
    return terms.relative(tilt.abs() * terms.tensors["reach"][index].double(), index[:3])


def _weights(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    batch, head, _, key = index
    shared = head // terms.group
    length = terms.tensors["value"][batch, shared, key].double().norm(dim=-1)
    return terms.relative(added.abs() * length, index[:3])


def _out(terms: SeverityTerms, index: Index, added: Tensor) -> Tensor:
    return terms.relative(added.abs(), index[:3])


def _tilt(log_weights: Tensor, delta: Tensor) -> Tensor:
    log_weights = log_weights.double()
    return score_tilt(log_weights, -torch.expm1(log_weights), delta)


_EVALUATIONS: Mapping[str, Callable[[SeverityTerms, Index, Tensor], Tensor]] = {
    "q": _query,
    "k": _key,
    "v": _value,
    "scores": _scores,
    "weights": _weights,
    "out": _out,
}
