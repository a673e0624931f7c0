"""A fault, and how to draw it from a specification with open fields.

>>> site = Site(0, "transformer.h.0.attn", "scores", (1, 2, 4, 4), columns=4, dtype=torch.float32)
>>> spec = FaultSpec(location="scores", kind="bitflip", bits=(30,))
>>> fault = draw_fault(spec, site, np.random.Generator(np.random.Philox(key=7)))
>>> fault.bits, len(fault.elements), Fault.from_json(fault.to_json()) == fault
((30,), 1, True)

Every kind comes down to one rule on bit patterns, ``new = (old & keep) ^ toggle``, on one element or on many
(``fault_injection.faults.kinds``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fault_injection.faults.kinds import BITS, FAULT_KINDS, PATTERN, RATE
from fault_injection.faults.site import Site
from fault_injection.faults.spec import FaultSpec
from fault_injection.locations import LOCATION_TABLE
from fault_injection.numbers.bits import bits_in_field, check_bits, float_format


@dataclass(frozen=True)
class Element:
    """The change of one element: ``new = (old & keep) ^ toggle`` at row-major position ``flat``."""

    flat: int
    keep: int
    toggle: int


@dataclass(frozen=True)
class Fault:
    """One fault, down to the bit; hashable and JSON-serialisable.

    Attributes:
        location, layer, module, kind: what is hit, and how.
        dtype, shape: dtype and shape of the tensor that contains ``elements``.
        index: ``(batch, head, row, col)`` of the first element; ``None`` if a bit error rate hit none.
        bits: the bits of a ``bitflip`` or ``stuck_at``; empty for the other kinds.
        elements: every changed element.
        masked_position: whether ``index`` is a key that its query does not see.
        call: the number of the core's evaluation within one pass.
    """

    location: str
    layer: int
    module: str
    kind: str
    dtype: str
    shape: tuple[int, int, int, int]
    index: tuple[int, int, int, int] | None
    bits: tuple[int, ...]
    elements: tuple[Element, ...]
    masked_position: bool = False
    call: int = 0

    def __post_init__(self) -> None:
        for table, name in ((LOCATION_TABLE, self.location), (FAULT_KINDS, self.kind)):
            table.check(name)
        float_format(self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the hit tensor; raises ``ValueError`` if torch has no dtype of this name."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"fault.dtype: got {self.dtype!r}, allowed the name of a torch dtype")
        return dtype

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no blanks."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Fault:
        """Return the fault from the text of ``to_json``."""
        data = json.loads(text)
        index = data.pop("index")
        elements = tuple(Element(**element) for element in data.pop("elements"))
        shape, bits = tuple(data.pop("shape")), tuple(data.pop("bits"))
        return cls(shape=shape, index=None if index is None else tuple(index), bits=bits, elements=elements, **data)


def draw_fault(spec: FaultSpec, site: Site, random: np.random.Generator) -> Fault:
    """Draw the one fault that ``spec`` and ``random`` determine at ``site``.

    Raises:
        ValueError: a bit that the site's native dtype does not have.
        IndexError: a coordinate that does not exist.
    """
    if spec.location != site.location:
        raise ValueError(f"fault.location: the specification says {spec.location!r}, but the site is {site.location!r}")
    kind, layout = FAULT_KINDS[spec.kind], float_format(site.dtype)
    if kind.draws == RATE:
        return _draw_error_rate(spec, site, random)
    index = site.draw(spec.index, random, include_masked=spec.include_masked)
    bits: tuple[int, ...] = ()
    drawn = 0
    if kind.draws == BITS:
        bits = _draw_bits(spec.bits, site.dtype, random)
        drawn = layout.number.pattern(bits)
    elif kind.draws == PATTERN:
        drawn = int.from_bytes(random.bytes(8), "little") & layout.all_bits
    keep, toggle = kind.masks(layout.number, drawn)
    return _fault(spec, site, index, bits, (Element(site.flat(index), keep, toggle),))


def _draw_bits(bits: tuple[int, ...] | str | None, dtype: torch.dtype, random: np.random.Generator) -> tuple[int, ...]:
    if isinstance(bits, tuple):
        check_bits(bits, dtype)
        return bits
    choices = bit_choices(bits, dtype)
    return (choices[int(random.integers(len(choices)))],)


def bit_choices(bits: str | None, dtype: torch.dtype) -> range:
    """Return the bits from which one is drawn: the bits of a field, or all."""
    return range(float_format(dtype).width) if bits is None else bits_in_field(dtype, bits)


def _draw_error_rate(spec: FaultSpec, site: Site, random: np.random.Generator) -> Fault:
    """Flip every bit of every candidate independently: a binomial count, then distinct (element, bit) pairs."""
    candidates = _candidates(spec, site)
    layout = float_format(site.dtype)
    places = len(candidates) * layout.width
    count = int(random.binomial(places, spec.rate or 0.0))
    hit, bits = np.divmod(random.choice(places, size=count, replace=False, shuffle=False), layout.width)
    toggles: dict[int, int] = {}
    for element, bit in zip(hit.tolist(), bits.tolist(), strict=True):
        position = int(candidates[element])
        toggles[position] = toggles.get(position, 0) | 1 << bit
    toggles = dict(sorted(toggles.items()))
    masks = FAULT_KINDS[spec.kind].masks
    elements = tuple(Element(position, *masks(layout.number, drawn)) for position, drawn in toggles.items())
    index: tuple[int, int, int, int] | None = None
    if elements:
        batch, head, row, col = (int(i) for i in np.unravel_index(elements[0].flat, site.shape))
        index = batch, head, row, col
    return _fault(spec, site, index, (), elements)


def _fault(
    spec: FaultSpec,
    site: Site,
    index: tuple[int, int, int, int] | None,
    bits: tuple[int, ...],
    elements: tuple[Element, ...],
) -> Fault:
    dtype, hidden = str(site.dtype).removeprefix("torch."), index is not None and not site.sees(index)
    return Fault(
        spec.location, site.layer, site.module, spec.kind, dtype, site.shape, index, bits, elements,
        masked_position=hidden,
    )  # fmt: skip


def _candidates(spec: FaultSpec, site: Site) -> np.ndarray:
    site.check(spec.index)
    window = np.ones(site.extent, dtype=bool)
    for axis, given in enumerate(spec.index.as_tuple()):
        if given is not None:
            others = np.arange(site.extent[axis]) != given
            np.moveaxis(window, axis, 0)[others] = False
    allowed = window
    if site.visible is not None and not spec.include_masked:
        allowed = window & site.visible.cpu().numpy()
    # As for single faults: a requested fault is never dropped, even if every key is hidden.
    return np.ravel_multi_index(np.nonzero(allowed if allowed.any() else window), site.shape)
