"""The registry of fault kinds, and that a row is all it takes to have another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fault_injection import Fault, FaultSpec, Site, draw_fault, rewrite_bits
from fault_injection.faults.candidates import ElementPool, draw_candidates
from fault_injection.faults.kinds import FAULT_KINDS, FaultKind, that_draw
from fault_injection.numbers.formats import NumberFormat

SITE = Site(0, "h.0.attn", "v", (1, 2, 3, 4), 4, torch.float32)


def to_infinity(layout: NumberFormat, drawn: int) -> tuple[int, int]:
    """Set every bit of the exponent and clear the mantissa; the sign stays."""
    sign = layout.pattern(layout.bits_of("sign"))
    return sign, layout.pattern(layout.bits_of("exponent"))


def odd_bits(layout: NumberFormat, drawn: int) -> tuple[int, int]:
    """Flip the chosen bits and those above them."""
    return layout.all_bits, (drawn | drawn << 1) & layout.all_bits


INFINITY = FaultKind("infinity", "the number becomes an infinity of its sign", "nothing", to_infinity)
PAIR = FaultKind("neighbours", "the chosen bits and those above them flip", "bits", odd_bits)


def hit(fault: Fault, tensor: torch.Tensor) -> torch.Tensor:
    (element,) = fault.elements
    return rewrite_bits(tensor, [element.flat], [element.keep], [element.toggle]).flatten()[element.flat]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_row_makes_a_kind_that_draws_nothing(sign: float) -> None:
    tensor = sign * torch.arange(1.0, 25.0).reshape(SITE.shape)
    with FAULT_KINDS.registered(INFINITY):
        fault = draw_fault(FaultSpec("v", kind="infinity"), SITE, np.random.default_rng(1))
        assert hit(fault, tensor) == sign * torch.inf
        assert Fault.from_json(fault.to_json()) == fault
        pool = ElementPool.of(SITE, FaultSpec("v").index, include_masked=False)
        candidates = draw_candidates(FaultSpec("v", kind="infinity"), SITE, pool, 8, np.random.default_rng(2))
        assert bool((candidates.values(tensor)[1] == sign * torch.inf).all())
        with pytest.raises(ValueError, match=r"fault\.bit: kind 'infinity' has no use for a bit, got \(3,\)"):
            FaultSpec("v", kind="infinity", bits=(3,))
    with pytest.raises(ValueError, match=r"fault\.kind: got 'infinity', allowed bitflip, .*, bit_error_rate"):
        FaultSpec("v", kind="infinity")


def test_one_row_makes_a_kind_that_draws_bits() -> None:
    with FAULT_KINDS.registered(PAIR):
        assert that_draw("bits") == ("bitflip", "stuck_at_0", "stuck_at_1", "neighbours")
        fault = draw_fault(FaultSpec("v", kind="neighbours", bits=(3,)), SITE, np.random.default_rng(1))
        (element,) = fault.elements
        assert (fault.bits, element.keep, element.toggle) == ((3,), 0xFFFF_FFFF, 0b11000)
        drawn = draw_fault(FaultSpec("v", kind="neighbours"), SITE, np.random.default_rng(1))
        assert len(drawn.bits) == 1


def test_a_kind_says_what_is_drawn_for_it() -> None:
    with pytest.raises(ValueError, match="draws: got 'bit', allowed bits, pattern, rate, nothing"):
        FaultKind("odd", "-", "bit", odd_bits)
