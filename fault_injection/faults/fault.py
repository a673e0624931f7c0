"""What a fault is: a specification that may leave things open, and the one fault drawn from it.

    spec = FaultSpec(location="scores", kind="bitflip", bits=(30,))
    fault = draw_fault(spec, site, numpy.random.Generator(numpy.random.Philox(key=7)))
    Fault.from_json(fault.to_json()) == fault

Every kind comes down to one rule on bit patterns, ``new = (old & keep) ^ toggle``, on one element or on many.

Public names: ``KINDS``, ``BIT_KINDS``, ``FaultSpec``, ``Fault``, ``Element``, ``draw_fault``, ``bit_choices``,
``bit_masks``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from fault_injection.attention.call import LOCATIONS
from fault_injection.faults.site import ElementIndex, Site
from fault_injection.names import nearest
from fault_injection.numbers.bits import (
    FIELDS,
    bits_in_field,
    check_bits,
    clear_masks,
    flip_masks,
    float_format,
    set_masks,
)

KINDS = ("bitflip", "stuck_at_0", "stuck_at_1", "zero", "random_value", "bit_error_rate")
BIT_KINDS: dict[str, Callable[[tuple[int, ...], torch.dtype], tuple[int, int]]] = {
    "bitflip": flip_masks,
    "stuck_at_0": clear_masks,
    "stuck_at_1": set_masks,
}


def _check_names(location: str, kind: str) -> None:
    for key, got, allowed in (("location", location, LOCATIONS), ("kind", kind, KINDS)):
        if got not in allowed:
            raise ValueError(f"fault.{key}: got {got!r}, allowed {', '.join(allowed)}{nearest(str(got), allowed)}")


@dataclass(frozen=True)
class FaultSpec:
    """What kind of fault to draw.

    Attributes:
        location: ``q k v scores weights out``.
        kind: ``bitflip`` (all ``bits``), ``stuck_at_0``, ``stuck_at_1`` (``bits`` cleared or set), ``zero`` (the
            element becomes +0.0), ``random_value`` (its bits become a uniformly random pattern, which may be NaN),
            ``bit_error_rate`` (every bit of every element that may be hit flips with probability ``rate``).
        bits: bit numbers, the name of a field (one of its bits is drawn), or ``None`` (any bit is drawn).
        index: the element, in full or in part.
        include_masked: draw hidden keys of scores and weights as well.
        rate: the bit error rate, in (0, 1]; for that kind only.

    Raises:
        ValueError: unknown names, bits given for a kind that has none, a rate where it does not belong.
    """

    location: str
    kind: str = "bitflip"
    bits: tuple[int, ...] | str | None = None
    index: ElementIndex = field(default_factory=ElementIndex)
    include_masked: bool = False
    rate: float | None = None

    def __post_init__(self) -> None:
        _check_names(self.location, self.kind)
        self._check_bits()
        if (self.kind == "bit_error_rate") != (self.rate is not None):
            wanted = "needs" if self.kind == "bit_error_rate" else "has no use for"
            raise ValueError(f"fault.rate: kind {self.kind!r} {wanted} a rate, got {self.rate}")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"fault.rate: got {self.rate}, allowed: above 0, at most 1")

    def _check_bits(self) -> None:
        if self.bits is not None and self.kind not in BIT_KINDS:
            raise ValueError(
                f"fault.bit: kind {self.kind!r} has no use for a bit, got {self.bits}; leave it out (null)"
            )
        if isinstance(self.bits, str) and self.bits not in FIELDS:
            raise ValueError(
                f"fault.bit: got {self.bits!r}, allowed a bit number, a list of them, or {', '.join(FIELDS)}"
                f"{nearest(self.bits, FIELDS)}"
            )
        if self.bits is not None and not isinstance(self.bits, (str, tuple)):
            raise ValueError(f"fault.bit: got {self.bits!r}, allowed a tuple of bit numbers, a field name or None")
        if isinstance(self.bits, tuple):
            object.__setattr__(self, "bits", tuple(int(bit) for bit in self.bits))
            if min(self.bits, default=0) < 0:
                raise ValueError(f"bit: got {min(self.bits)}, allowed 0 or more")
            if not self.bits:
                raise ValueError("fault.bit: got an empty list; leave it out to draw any bit")
            check_bits(self.bits, torch.float64)


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
        dtype, shape: of the tensor that ``elements`` refer to.
        index: ``(batch, head, row, col)`` of the first element; ``None`` if a bit error rate hit none.
        bits: the bits of a ``bitflip`` or ``stuck_at``; empty for the other kinds.
        elements: every changed element.
        masked_position: whether ``index`` is a key that its query does not see.
        call: which evaluation of the core within one pass.
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
        _check_names(self.location, self.kind)
        float_format(self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the hit tensor; ``ValueError`` if torch has none of this name."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"fault.dtype: got {self.dtype!r}, allowed the name of a torch dtype")
        return dtype

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no blanks."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Fault:
        """Read what ``to_json`` wrote."""
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
    if spec.kind == "bit_error_rate":
        return _draw_error_rate(spec, site, random)
    index = site.draw(spec.index, random, include_masked=spec.include_masked)
    bits: tuple[int, ...] = ()
    if spec.kind == "zero":
        keep, toggle = 0, 0
    elif spec.kind == "random_value":
        layout = float_format(site.dtype)
        keep, toggle = 0, int.from_bytes(random.bytes(8), "little") & layout.all_bits
    else:
        bits = _draw_bits(spec.bits, site.dtype, random)
        keep, toggle = bit_masks(spec.kind, bits, site.dtype)
    return Fault(
        spec.location,
        site.layer,
        site.module,
        spec.kind,
        str(site.dtype).removeprefix("torch."),
        site.shape,
        index,
        bits,
        (Element(site.flat(index), keep, toggle),),
        masked_position=not site.sees(index),
    )


def _draw_bits(bits: tuple[int, ...] | str | None, dtype: torch.dtype, random: np.random.Generator) -> tuple[int, ...]:
    if isinstance(bits, tuple):
        check_bits(bits, dtype)
        return bits
    choices = bit_choices(bits, dtype)
    return (choices[int(random.integers(len(choices)))],)


def bit_choices(bits: str | None, dtype: torch.dtype) -> range:
    """Return the bits that one is drawn from: those of a field, or all."""
    return range(float_format(dtype).width) if bits is None else bits_in_field(dtype, bits)


@functools.cache
def bit_masks(kind: str, bits: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Return ``(keep, toggle)`` of a ``bitflip``, ``stuck_at_0`` or ``stuck_at_1``."""
    return BIT_KINDS[kind](bits, dtype)


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
    elements = tuple(Element(position, layout.all_bits, toggle) for position, toggle in toggles.items())
    index: tuple[int, int, int, int] | None = None
    if elements:
        batch, head, row, col = (int(i) for i in np.unravel_index(elements[0].flat, site.shape))
        index = batch, head, row, col
    return Fault(
        spec.location,
        site.layer,
        site.module,
        spec.kind,
        str(site.dtype).removeprefix("torch."),
        site.shape,
        index,
        (),
        elements,
        masked_position=index is not None and not site.sees(index),
    )


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
    # As for single faults: what was asked for is never dropped, even where every key is hidden.
    return np.ravel_multi_index(np.nonzero(allowed if allowed.any() else window), site.shape)
