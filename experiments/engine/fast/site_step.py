"""The site step: many faults of one layer, each evaluated in the one group of heads that it hits.

A fault of one element touches one head, or for keys and values the query heads that read it. That group is a small
attention call of its own, and the groups of many faults are one batch of it: the architecture's own attention function
computes them together.

    step = site_step(subject, kept, [site_of(fault, kept.group) for fault in faults])
    step.out, step.changed           # (F, T, G, d_v) and (F, T): the faulty outputs, and where they differ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.engine.fast.recording import AttentionRecord, changed_rows
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import COMPLETE
from fault_injection import AttentionCall, InjectionRecord, instrumentation_of, tapped
from fault_injection.attention.call import ScoreProduct
from fault_injection.faults.injector import injection_record
from fault_injection.faults.one_head import FaultSite
from fault_injection.numbers.bits import rewrite_bits


@dataclass(frozen=True, eq=False)
class SiteStep:
    """What the faults did at their sites; F faults, G query heads to a group.

    Attributes:
        sites: the faults.
        records: what each of them hit.
        tensors: by location, the tensors of the batch, if they were kept: q (F, G, T, d), k and v (F, 1, S, .), scores,
            logits, weights and mass (F, G, T, S), out (F, G, T, d_v).
        product: how the scores come from queries and keys.
        out: (F, T, G, d_v), what the attention function returned.
        expected: the same of the fault-free pass.
        changed: (F, T) bool, which rows of it differ.
    """

    sites: tuple[FaultSite, ...]
    records: tuple[InjectionRecord, ...]
    tensors: dict[str, Tensor]
    product: ScoreProduct
    out: Tensor
    expected: Tensor
    changed: Tensor


class _BatchInjector:
    """A tap that injects one fault into each sequence of a batch."""

    layers = None

    def __init__(self, sites: Sequence[FaultSite]) -> None:
        self._sites = sites
        self.locations = frozenset(site.fault.location for site in sites)
        self.records: dict[int, InjectionRecord] = {}

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> Tensor:
        heads, plane = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
        mine = [number for number, site in enumerate(self._sites) if site.fault.location == location]
        flat, keep, toggle, counts = [], [], [], []
        for number in mine:
            site = self._sites[number]
            base = (number * heads + site.head) * plane
            flat += [base + position for position in site.elements]
            keep += [element.keep for element in site.fault.elements]
            toggle += [element.toggle for element in site.fault.elements]
            counts.append(len(site.elements))
        faulty = rewrite_bits(tensor, flat, keep, toggle)
        where = torch.unravel_index(torch.tensor(flat, device=tensor.device), tensor.shape)
        before, after = tensor[where].split(counts), faulty[where].split(counts)
        for number, old, new in zip(mine, before, after, strict=True):
            self.records[number] = injection_record(self._sites[number].fault, old, new)
        return faulty


class Keeper:
    """A tap that keeps the tensors of one call.

    Args:
        overwritten: whether the architecture changes the scores in place after their product.
    """

    locations = COMPLETE
    layers = None

    def __init__(self, overwritten: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.product = ScoreProduct()
        self._overwritten = overwritten

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        """Keep a tensor."""
        self.tensors[location] = tensor.clone() if self._overwritten and location == "scores" else tensor
        self.product = call.product


def site_step(
    subject: Subject, kept: AttentionRecord, sites: Sequence[FaultSite], *, watched: bool, overwritten: bool = False
) -> SiteStep:
    """Evaluate the groups of some faults of one layer.

    Args:
        subject: the patched model.
        kept: the layer's evaluation in the fault-free pass.
        sites: the faults.
        watched: keep the tensors for detectors.
        overwritten: whether the architecture changes the scores in place after their product.
    """
    sequence = torch.tensor([site.sequence for site in sites], device=kept.query.device)
    group = torch.tensor([site.group for site in sites], device=kept.query.device)
    tensors = (
        kept.query.unflatten(1, (-1, kept.group))[sequence, group],
        kept.key[sequence, group].unsqueeze(1),
        kept.value[sequence, group].unsqueeze(1),
    )
    mask = None if kept.mask is None else chosen_groups(kept.mask, sequence, group, kept.group)
    injector, keeper = _BatchInjector(sites), Keeper(overwritten)
    taps = (injector, keeper) if watched else (injector,)
    with torch.no_grad(), tapped(subject.model, *taps):
        interface = instrumentation_of(subject.model).evaluate_interface
        out = interface(kept.core, tensors, mask, kept.keywords)[0]
    expected = kept.out.unflatten(2, (-1, kept.group))[sequence, :, group]
    rows = changed_rows(out.flatten(0, 1), expected.flatten(0, 1)).unflatten(0, out.shape[:2])
    records = tuple(injector.records[number] for number in range(len(sites)))
    return SiteStep(tuple(sites), records, keeper.tensors, keeper.product, out, expected, rows)


def chosen_groups(tensor: Tensor, sequence: Tensor, group: Tensor, size: int) -> Tensor:
    """Return (F, 1 or size, ...) of a tensor (1 or B, 1 or H, ...): of each fault's sequence, its group of heads."""
    batch, heads = tensor.shape[:2]
    if heads > 1:
        return tensor.unflatten(1, (-1, size))[sequence if batch > 1 else torch.zeros_like(sequence), group]
    return tensor[sequence] if batch > 1 else tensor
