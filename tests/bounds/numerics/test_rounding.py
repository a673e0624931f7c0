"""Rounding-error bounds against exact and higher-precision arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bounds.numerics import rounding
from bounds.numerics.rounding import accumulation, gamma, reduced_precision, softmax_error, storage

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@given(bits=st.integers(0, 2**32 - 1))
def test_storage_bounds_the_rounding_of_every_float32(dtype, bits):
    value = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    stored = value.to(dtype)
    if not bool(torch.isfinite(stored)):
        return
    error = abs(Fraction(stored.item()) - Fraction(value.item()))
    model = storage(dtype)
    assert error <= Fraction(model.roundoff) * abs(Fraction(stored.item())) + Fraction(model.absolute)


@pytest.mark.parametrize("dtype", HALVES)
def test_storage_error_is_nearly_attained_so_it_cannot_be_smaller(dtype):
    # Just above the midpoint between 1 and its successor.
    spacing = torch.finfo(dtype).eps
    value = torch.tensor(1 + spacing / 2 + 2.0**-23)
    error = abs(value.to(dtype).item() - value.item())
    assert error > 0.98 * storage(dtype).roundoff
    tiny = torch.finfo(dtype).smallest_normal * spacing
    value = torch.tensor(1.5 * tiny, dtype=torch.float64).to(torch.float32)
    assert abs(value.to(dtype).item() - value.item()) == storage(dtype).absolute


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formats_that_are_computed_in_have_no_storage_error(dtype):
    assert storage(dtype) == rounding.Storage(0.0, 0.0)


def test_half_formats_accumulate_in_float32():
    assert accumulation(torch.bfloat16) == accumulation(torch.float16) == accumulation(torch.float32)
    assert accumulation(torch.float32).roundoff == torch.finfo(torch.float32).eps / 2
    assert accumulation(torch.float64).roundoff == torch.finfo(torch.float64).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_reach_exp_is_below_the_smallest_number(dtype):
    reach = accumulation(dtype).exp_reach
    info = torch.finfo(dtype)
    smallest = math.log(info.smallest_normal) + math.log(info.eps)
    assert -reach < smallest - math.log(2)


@pytest.mark.parametrize("function", [storage, accumulation])
def test_unknown_dtypes_are_refused(function):
    with pytest.raises(ValueError, match=r"dtype: got int32, allowed float64, float32, bfloat16, float16"):
        function(torch.int32)


@given(st.integers(1, 10**6))
def test_gamma_bounds_a_product_of_roundings(count):
    u = 2.0**-24
    assert gamma(count, u) >= math.expm1(count * math.log1p(u)) * (1 - 1e-9)
    assert gamma(count, u) >= -math.expm1(count * math.log1p(-u)) * (1 - 1e-9)


def elementwise_ratio(logits: torch.Tensor, weights: torch.Tensor, exact: np.ndarray) -> float:
    """Return the largest |stored - exact| of softmax weights in units of its bound."""
    values, stored = logits.double().numpy(), weights.double().numpy()
    delta = values.max(-1, keepdims=True) - values
    spread = torch.from_numpy(np.asarray((exact * delta).sum(-1), dtype=np.float64))
    n = torch.full(spread.shape, logits.shape[-1])
    error = softmax_error(n, spread, weights.dtype)
    relative, slope, absolute = (term.numpy()[..., None] for term in (error.relative, error.slope, error.absolute))
    bound = stored * (relative + slope * np.minimum(delta, error.reach)) + absolute
    return float((np.abs(stored - exact) / bound).max())


def exact_softmax(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy().astype(np.longdouble)
    terms = np.exp(values - values.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.float32, 0.2), (torch.bfloat16, 0.95), (torch.float16, 0.9), (torch.float64, 0.0)],
)
@pytest.mark.parametrize("keys", [1, 2, 3, 17, 128, 1000])
def test_softmax_weights_stay_inside_their_error_bound(dtype, least, keys):
    generator = torch.Generator().manual_seed(keys)
    worst = 0.0
    for scale in (1e-3, 0.5, 4.0, 40.0, 400.0):
        logits = (torch.randn(max(8, 20_000 // keys), keys, generator=generator) * scale).to(dtype)
        if dtype == torch.float64:
            logits = logits + torch.randn(logits.shape, generator=generator, dtype=dtype) * 1e-9
        worst = max(worst, elementwise_ratio(logits, torch.softmax(logits, -1), exact_softmax(logits)))
    assert worst <= 1
    if 2 <= keys <= 17:
        assert worst > least, "the bound is far from what happens: a term is wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "delta"), [(2, 0.0), (2, 60.0), (30, 5.0), (1000, 1.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_worst_legal_softmax_stays_inside_the_bound_and_nearly_attains_it(dtype, keys, delta, sign):
    """Every rounding as large as it may be, and all in one direction."""
    u, stored = 2.0**-24, storage(dtype).roundoff
    deltas = np.zeros(keys)
    deltas[0] = delta
    terms = np.exp(-deltas)
    exact = terms / terms.sum()
    spread = torch.tensor(float((exact * deltas).sum()), dtype=torch.float64)
    exp = 1 + sign * (4 * u + 3 * u * deltas[0])
    others = terms * (1 - sign * (4 * u + 3 * u * deltas)) * (1 - sign * u) ** (keys - 1)
    worst = terms[0] * exp / others.sum() * (1 + sign * u) ** 2 * (1 + sign * stored)
    error = softmax_error(torch.tensor(keys), spread, dtype)
    bound = worst * float(error.relative + error.slope * delta) + float(error.absolute)
    assert 0.8 * bound < abs(worst - exact[0]) <= bound


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_softmax_of_half_logits_and_its_cast_are_covered(dtype):
    logits = (torch.randn(200, 65, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    single = torch.softmax(logits, -1, dtype=torch.float32)
    assert elementwise_ratio(logits, single, exact_softmax(logits)) <= 1
    assert elementwise_ratio(logits, single.to(dtype), exact_softmax(logits)) <= 1


def test_subnormal_weights_are_covered():
    logits = torch.tensor([[0.0, -86.0, -88.0, -95.0, -103.0, -103.9, -105.0, -3e4]])
    assert elementwise_ratio(logits, torch.softmax(logits, -1), exact_softmax(logits)) <= 1
    flushed = torch.softmax(logits, -1)
    flushed[flushed < torch.finfo(torch.float32).smallest_normal] = 0.0
    assert elementwise_ratio(logits, flushed, exact_softmax(logits)) <= 1


def test_row_sum_bounds_the_sum_of_the_weights():
    logits = torch.randn(500, 300, generator=torch.Generator().manual_seed(3)) * 2
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.softmax(logits.to(dtype), -1)
        n = torch.full((500,), 300)
        spread = torch.full((500,), math.log(300.0), dtype=torch.float64)
        off = (weights.double().sum(-1) - 1).abs()
        assert bool((off <= softmax_error(n, spread, dtype).row_sum(spread, n)).all())


def test_the_error_grows_with_the_number_of_keys_but_stays_a_bound_up_to_the_limit():
    n = torch.tensor([1, 10, 1000, rounding.MAX_KEYS])
    spread = torch.full((4,), 14.0, dtype=torch.float64)
    relative = softmax_error(n, spread, torch.bfloat16).relative
    assert bool((relative.diff() > 0).all())
    assert float(relative[-1]) < 0.1


def test_reduced_precision_products_are_recognised():
    single = torch.zeros(1)
    assert reduced_precision(single) is None
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "reduced precision" in str(reduced_precision(single))
        assert reduced_precision(single.double()) is None
        assert reduced_precision(single.bfloat16()) is None
    finally:
        torch.set_float32_matmul_precision(before)
    assert reduced_precision(single) is None
