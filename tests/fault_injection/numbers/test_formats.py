"""The table of number formats, and that a row is all it takes to flip bits of another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fault_injection import FaultSpec, Site, bit_field, bit_patterns, draw_fault, flip_bits
from fault_injection.numbers.bits import float_format
from fault_injection.numbers.formats import FORMATS, NumberFormat, model_dtypes

NO_ZERO_SIGN = NumberFormat("float8_e4m3fnuz", exponent=4, mantissa=3)
"""A format that torch has and the table has not."""


def test_one_row_makes_a_format_whose_bits_are_numbered_flipped_and_drawn() -> None:
    dtype = torch.float8_e4m3fnuz
    tensor = torch.tensor([1.0, 2.0, 4.0]).to(dtype).reshape(1, 1, 1, 3)
    with pytest.raises(ValueError, match=r"got torch\.float8_e4m3fnuz, allowed float64, float32, .*, float8_e5m2"):
        float_format(dtype)
    with FORMATS.registered(NO_ZERO_SIGN):
        assert [bit_field(dtype, bit) for bit in (0, 3, 7)] == ["mantissa", "exponent", "sign"]
        assert bit_patterns(flip_bits(tensor, 1, [7])) == [pattern ^ (0x80 * (i == 1)) for i, pattern in
                                                           enumerate(bit_patterns(tensor))]  # fmt: skip
        site = Site(0, "h.0.attn", "v", (1, 1, 1, 3), 3, dtype)
        fault = draw_fault(FaultSpec("v", bits="exponent"), site, np.random.default_rng(0))
        assert fault.dtype == "float8_e4m3fnuz"
        assert fault.bits[0] in NO_ZERO_SIGN.bits_of("exponent")
        with pytest.raises(ValueError, match=r"bit: got 8, allowed 0\.\.7 for float8_e4m3fnuz"):
            draw_fault(FaultSpec("v", bits=(8,)), site, np.random.default_rng(0))
    assert "float8_e4m3fnuz" not in FORMATS


@pytest.mark.parametrize("name", FORMATS.names())
def test_rows_agree_with_torch(name: str) -> None:
    number, dtype = FORMATS[name], getattr(torch, name)
    known = torch.finfo(dtype)
    assert number.bits == known.bits
    assert 2.0**-number.mantissa == known.eps
    assert 2.0 ** (1 - number.bias) == known.smallest_normal


def test_models_are_computed_in_four_formats() -> None:
    assert model_dtypes() == ("float64", "float32", "bfloat16", "float16")
