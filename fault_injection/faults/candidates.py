"""Many faults drawn at once, so that one of them can be chosen: the faults of ``draw_fault`` as arrays.

    pool = ElementPool.of(site, spec.index, include_masked=spec.include_masked)
    candidates = draw_candidates(spec, site, pool, 64, random)
    before, after = candidates.values(tensor)        # the elements before and after each candidate
    fault = candidates.fault(17)

The distribution is that of ``draw_fault``. The generator is used in another way, so the same seed gives other faults.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fault_injection.faults.fault import Element, Fault, bit_choices
from fault_injection.faults.kinds import BITS, FAULT_KINDS, PATTERN, RATE
from fault_injection.faults.site import Site
from fault_injection.faults.spec import ElementIndex, FaultSpec
from fault_injection.numbers.bits import check_bits, float_format

Integers = NDArray[np.int64]
Patterns = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class ElementPool:
    """The elements of a site that agree with a partial index.

    Attributes:
        extent: the shape of the part of the tensor that can be hit.
        given: the partial index.
        shape: the shape of the mask of visible elements; an axis of size 1 stands for the whole axis of the site.
        visible: row-major positions in that mask; ``None`` if every element may be hit.
    """

    extent: tuple[int, int, int, int]
    given: tuple[int | None, ...]
    shape: tuple[int, ...] = ()
    visible: Integers | None = None

    @classmethod
    def of(cls, site: Site, partial: ElementIndex, *, include_masked: bool) -> ElementPool:
        """Return the elements that ``Site.draw`` draws from.

        Raises:
            IndexError: a coordinate does not exist.
        """
        site.check(partial)
        given = partial.as_tuple()
        if site.visible is None or include_masked:
            return cls(site.extent, given)
        mask = site.visible.cpu().numpy()
        window = np.zeros(mask.shape, dtype=bool)
        window[tuple(slice(None) if i is None or n == 1 else i for i, n in zip(given, mask.shape, strict=True))] = True
        positions = np.flatnonzero(mask & window)
        # A requested fault is never dropped, even if every key is hidden.
        return cls(site.extent, given, mask.shape, positions) if len(positions) else cls(site.extent, given)

    def __len__(self) -> int:
        """Return the number of elements."""
        found = 1 if self.visible is None else len(self.visible)
        for given, size, seen in zip(self.given, self.extent, self.shape or (0,) * 4, strict=True):
            found *= 1 if given is not None or seen == size else size
        return found

    def draw(self, count: int, random: np.random.Generator) -> Integers:
        """Draw ``count`` elements uniformly, with replacement: (count, 4) int64."""
        found = np.empty((count, 4), dtype=np.int64)
        coordinates: tuple[NDArray[np.intp], ...] = ()
        if self.visible is not None:
            coordinates = np.unravel_index(self.visible[random.integers(len(self.visible), size=count)], self.shape)
        for axis, (given, size) in enumerate(zip(self.given, self.extent, strict=True)):
            if given is not None:
                found[:, axis] = given
            elif self.visible is not None and self.shape[axis] == size:
                found[:, axis] = coordinates[axis]
            else:
                found[:, axis] = random.integers(size, size=count)
        return found


@dataclass(frozen=True, eq=False)
class Candidates:
    """N faults at one site: ``new = (old & keep) ^ toggle``.

    Attributes:
        spec, site: the specification and the site of the draw.
        indices: (N, 4) int64.
        bits: (N, n) int64, the bits of each; n is 0 for kinds without bits.
        keep, toggle: (N,) uint64.
    """

    spec: FaultSpec
    site: Site
    indices: Integers
    bits: Integers
    keep: Patterns
    toggle: Patterns

    def values(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elements before and after each fault, (N,) float64 on the CPU.

        Args:
            tensor: the tensor of the site in a fault-free pass.
        """
        layout = float_format(tensor.dtype)
        where = tuple(torch.from_numpy(axis).to(tensor.device) for axis in self.indices.T)
        before = tensor.detach()[where].cpu().contiguous()
        keep, toggle = (_signed(masks, layout.width) for masks in (self.keep, self.toggle))
        after = ((before.view(layout.integer) & keep) ^ toggle).view(tensor.dtype)
        return before.double(), after.double()

    def fault(self, number: int) -> Fault:
        """Return the candidate with this number."""
        batch, head, row, col = self.indices[number].tolist()
        index, site = (batch, head, row, col), self.site
        element = Element(site.flat(index), int(self.keep[number]), int(self.toggle[number]))
        return Fault(
            self.spec.location,
            site.layer,
            site.module,
            self.spec.kind,
            str(site.dtype).removeprefix("torch."),
            site.shape,
            index,
            tuple(self.bits[number].tolist()),
            (element,),
            masked_position=not site.sees(index),
        )


def _signed(masks: Patterns, width: int) -> Tensor:
    return torch.from_numpy(masks.astype(f"uint{width}").view(f"int{width}"))


def draw_candidates(
    spec: FaultSpec, site: Site, pool: ElementPool, count: int, random: np.random.Generator
) -> Candidates:
    """Draw ``count`` independent faults, each as ``draw_fault`` does.

    Raises:
        ValueError: a bit that the site's native dtype does not have, or a bit error rate, which has no one element.
    """
    kind = FAULT_KINDS[spec.kind]
    if kind.draws == RATE:
        raise ValueError(f"fault.kind: got {spec.kind!r}, allowed a kind that hits one element")
    indices, layout = pool.draw(count, random), float_format(site.dtype)
    bits, drawn = np.empty((count, 0), np.int64), [0] * count
    if kind.draws == PATTERN:
        drawn = (random.integers(1 << 64, size=count, dtype=np.uint64) & np.uint64(layout.all_bits)).tolist()
    elif kind.draws == BITS:
        if isinstance(spec.bits, tuple):
            check_bits(spec.bits, site.dtype)
            bits = np.tile(np.array(spec.bits, np.int64), (count, 1))
        else:
            choices = np.array(bit_choices(spec.bits, site.dtype), np.int64)
            bits = choices[random.integers(len(choices), size=(count, 1))]
        drawn = [layout.number.pattern(row) for row in bits.tolist()]
    masks = [kind.masks(layout.number, pattern) for pattern in drawn]
    keep, toggle = (np.array(part, np.uint64) for part in zip(*masks, strict=True))
    return Candidates(spec, site, indices, bits, keep, toggle)
