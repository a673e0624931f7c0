"""The checks of the score product: exact and longdouble oracles, no false alarm, completeness, blindness."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from attention_states import DTYPES, flipped, poked, random_state, replaced
from hypothesis import given, settings
from hypothesis import strategies as st

import bounds.products.score_detectors
from bounds import get_detector
from bounds.core.row_check import RowCheck
from bounds.numerics.line_sums import LINE_ELEMENTS, line_sums, line_totals
from bounds.products import score_sums
from bounds.products.product_sums import tile_check

SCORE = ["S_row", "S_col", "S_tile", "S_cs"]
SUMS = ["S_row", "S_col", "S_tile"]
HALVES = [torch.bfloat16, torch.float16]


def ratio(check: RowCheck) -> float:
    """Return the largest residual in units of its tolerance; both must be finite."""
    assert check.residual.dtype == check.tolerance.dtype == torch.float64
    assert bool(torch.isfinite(check.residual).all() & torch.isfinite(check.tolerance).all())
    return float(torch.where(check.residual <= 0, 0.0, check.residual / check.tolerance).max())


def checks(query, key, scores, factor=1.0, addend=None) -> dict[str, RowCheck]:
    operands = (query, key, scores, factor, addend)
    return {
        "S_row": score_sums.row_sums(*operands),
        "S_col": score_sums.column_sums(*operands),
        "S_tile": score_sums.tile_sums(*operands),
        "S_cs": score_sums.length_bound(*operands),
    }


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT


# ------------------------------------------------------------------------------------------------- the lemma, T7 and F5


single = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3), columns=st.integers(1, 5), length=st.integers(1, 6))
def test_T7_holds_in_exact_arithmetic_and_within_F5_in_any_order_of_float32_summation(data, rows, columns, length):
    draw = lambda *shape: np.array(  # noqa: E731
        data.draw(st.lists(single, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))), np.float32
    ).reshape(shape)
    left, right = draw(rows, length), draw(columns, length)
    width = data.draw(st.integers(1, columns))
    result = np.zeros((rows, columns), np.float32)
    for i, j in itertools.product(range(rows), range(columns)):
        # Any tree of additions: two of the remaining terms are joined until one is left.
        terms = [np.float32(a * b) for a, b in zip(left[i], right[j], strict=True)]
        while len(terms) > 1:
            first = terms.pop(data.draw(st.integers(0, len(terms) - 1)))
            second = terms.pop(data.draw(st.integers(0, len(terms) - 1)))
            terms.append(np.float32(first + second))
        result[i, j] = terms[0]
    check = tile_check(*(torch.from_numpy(a)[None, None] for a in (left, right, result)), width=width)
    exact = lambda values: [Fraction(float(value)) for value in values]  # noqa: E731
    for i, tile in itertools.product(range(rows), range(-(-columns // width))):
        part = range(tile * width, min(columns, (tile + 1) * width))
        summed = [sum(exact(right[j])[c] for j in part) for c in range(length)]
        inner = sum(a * b for a, b in zip(exact(left[i]), summed, strict=True))
        assert inner == sum(a * b for j in part for a, b in zip(exact(left[i]), exact(right[j]), strict=True))
        residual = abs(sum(Fraction(float(result[i, j])) for j in part) - inner)
        tolerance = Fraction(float(check.tolerance[0, 0, i, tile]))
        assert residual <= tolerance
        # What the checker measures is off by less than its own share of the tolerance.
        assert abs(residual - Fraction(float(check.residual[0, 0, i, tile]))) <= tolerance / 2**20 + Fraction(2) ** -60


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys", "kv_heads"), [(1, 1, 1), (5, 70, 2), (33, 7, 4), (300, 500, 2)])
def test_T7_residuals_equal_those_of_an_independent_oracle(dtype, rows, keys, kv_heads):
    state = random_state(1, dtype=dtype, rows=rows, keys=keys, kv_heads=kv_heads)
    wrong = state.scores + torch.randn_like(state.scores)
    query, scores = (tensor.double().numpy().astype(np.longdouble) for tensor in (state.query, wrong))
    key = state.key.double().numpy().astype(np.longdouble).repeat(4 // kv_heads, 1)
    exact = np.einsum("bhtd,bhsd->bhts", query, key)
    off = scores - exact
    found = checks(state.query, state.key, wrong)
    np.testing.assert_allclose(found["S_row"].residual.numpy(), np.abs(off.sum(-1)).astype(float), atol=1e-10)
    np.testing.assert_allclose(found["S_col"].residual.numpy(), np.abs(off.sum(-2)).astype(float), atol=1e-10)
    for tile in range(-(-keys // 32)):
        part = np.abs(off[..., 32 * tile : 32 * (tile + 1)].sum(-1)).astype(float)
        np.testing.assert_allclose(found["S_tile"].residual[..., tile].numpy(), part, atol=1e-10)
    lengths = np.sqrt((key**2).sum(-1))[:, :, None, :]
    beyond = (np.abs(scores) / lengths).max(-1) - np.sqrt((query**2).sum(-1))
    atol = 1e-2 if dtype == torch.float16 else 1e-10
    np.testing.assert_allclose(found["S_cs"].residual.numpy(), beyond.astype(float), atol=atol)


def test_F5_sums_of_lines_larger_than_a_block_are_those_of_numpy():
    tensor = normal(0, 2, 3, 257, 700).float()
    assert tensor[0, 0].numel() > LINE_ELEMENTS
    values = tensor.double().numpy()
    for given_tensor, array in ((tensor, values), (tensor.mT, values.swapaxes(-1, -2))):
        sums = line_sums(given_tensor)
        np.testing.assert_allclose(sums.total[..., 0].numpy(), array.sum(-1), rtol=0, atol=1e-10)
        np.testing.assert_allclose(sums.size[..., 0].numpy(), np.abs(array).sum(-1), rtol=1e-13)
        assert torch.equal(line_totals(given_tensor), sums.total)
    tiles = line_sums(tensor, 300).total.numpy()
    edges = [values[..., start : start + 300].sum(-1) for start in (0, 300, 600)]
    np.testing.assert_allclose(tiles, np.stack(edges, -1), rtol=0, atol=1e-10)


def test_float64_operands_are_left_as_they_were():
    state = random_state(2, dtype=torch.float64)
    before = [tensor.clone() for tensor in (state.query, state.key, state.scores)]
    for name in SCORE:
        get_detector(name).check(state)
    assert all(map(torch.equal, before, (state.query, state.key, state.scores)))


# ------------------------------------------------------------------------------------------------ no false positives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["all", "causal", "window", "padded"])
def test_F6_F7_no_score_detector_fires_on_clean_attention(dtype, mask):
    shapes = [(1, 1), (1, 40), (2, 2), (7, 33), (65, 64)]
    for (rows, keys), gain, kv_heads in itertools.product(shapes, [0.0, 1e-3, 1.0, 30.0], [1, 4]):
        state = random_state(
            keys, dtype=dtype, mask=mask, rows=rows, keys=keys, gain=gain, kv_heads=kv_heads, channels=16
        )
        for name in SCORE:
            verdict = get_detector(name).check(state)
            assert verdict.applicable
            assert verdict.rows_checked > 0
            assert not verdict.fired, (name, rows, keys, gain, kv_heads, verdict)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("keys", "channels"), [(1, 64), (2, 128), (3, 16), (128, 128), (255, 64), (1024, 64), (1024, 16)]
)
def test_F6_F7_hold_from_one_key_to_a_thousand(dtype, keys, channels):
    query, key = normal(keys, 1, 2, min(keys, 256), channels).to(dtype), normal(9, 1, 1, keys, channels).to(dtype)
    for name, check in checks(query, key, product(query, key)).items():
        assert ratio(check) <= 1, name


def adversarial(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Operands that are hard on a tolerance, by name."""
    query, key = normal(1, 1, 4, 37, 64), normal(2, 1, 2, 45, 64)
    big = {torch.float64: 1e140, torch.float32: 1e18, torch.bfloat16: 1e18, torch.float16: 30.0}[dtype]
    tiny = {torch.float64: 1e-310, torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-7}[dtype]
    cases = {
        "equal keys": (query, key[:, :, :1].expand_as(key)),
        "equal everything": (torch.full_like(query, 1 / 3), torch.full_like(key, 1 / 3)),
        "zeros": (query * 0, key),
        "one zero row": (query * (torch.arange(37) > 0)[:, None], key),
        "huge": (query * big, key * big),
        "tiny": (query * tiny, key * tiny),
        "tiny times huge": (query * tiny, key * min(big**1.6, 1e130)),
        "huge times tiny": (query * min(big**1.6, 1e130), key * tiny),
        "mixed": (query * torch.logspace(-5, 3, 64, dtype=torch.float64), key),
        "cancelling": (query, torch.cat([key[:, :, :22], -key[:, :, :22]], 2)),
        "parallel": (query, query[:, ::2]),
        "one large key": (query, key * torch.where(torch.arange(45) == 3, 1e3, 1e-3)[:, None]),
    }
    return {name: (left.to(dtype), right.to(dtype)) for name, (left, right) in cases.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_F6_F7_hold_on_adversarial_rows(dtype):
    for case, (query, key) in adversarial(dtype).items():
        scores = product(query, key)
        assert bool(torch.isfinite(scores).all()), case
        for name, check in checks(query, key, scores).items():
            assert ratio(check) <= 1, (case, name)


def test_F5_subnormal_operands_may_be_read_as_zero():
    """Kernels that flush operands are legal: bfloat16 on x86 does it, and with ``set_flush_denormal`` float32 does."""
    query, key = torch.full((1, 1, 3, 64), 2.0**-127), torch.full((1, 1, 5, 64), 2.0**100)
    for dtype in (torch.float32, torch.bfloat16):
        for left, right in ((query, key), (key, query)):
            scores = torch.zeros(1, 1, left.shape[2], right.shape[2], dtype=dtype)
            found = checks(left.to(dtype), right.to(dtype), scores)
            assert all(ratio(check) <= 1 for check in found.values())
            assert ratio(found["S_row"]) > 1e-3


@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_F5_subnormal_results_may_be_flushed(factor):
    """Each of 2 d operations may lose a number just below the normal range, before the factor multiplies it."""
    small = torch.full((1, 1, 3, 64), 2.0**-63)
    flushed = torch.zeros(1, 1, 3, 3)
    for name, check in checks(small, small * 0.99, flushed, factor).items():
        assert ratio(check) <= 1, name
        assert name == "S_cs" or ratio(check) > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_F6_covers_the_roundings_of_the_addend(dtype):
    query, addend = torch.zeros(1, 1, 9, 1, dtype=dtype), torch.ones(1, 1, 1, 40, dtype=dtype)
    scores = (addend + torch.finfo(dtype).eps).expand(1, 1, 9, 40)
    for name, check in checks(query, query[:, :, :1].expand(1, 1, 40, 1), scores, 1.0, addend).items():
        assert ratio(check) <= 1, name
        assert name == "S_cs" or ratio(check) > 0.005, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_F6_is_nearly_attained_by_the_worst_legal_float_product(dtype, sign):
    """Every rounding as large as it may be and all in one direction: d in a product of d terms, and three more.

    In float64 the checker's own rounding is the larger part of the tolerance: 2 n + d + 16 roundings of n = 40 sums.
    """
    query, key = normal(3, 1, 1, 9, 64).abs().to(dtype), normal(4, 1, 1, 40, 64).abs().to(dtype)
    steps = 67 * torch.finfo(dtype).eps / 2
    exact = query.double() @ key.double().mT
    worst = (exact * (1 + sign * steps)).to(dtype)
    away = torch.full_like(worst, -sign * torch.inf)
    # Rounded towards the exact product, to stay legal.
    scores = torch.where((worst.double() - exact).abs() > exact * steps, worst.nextafter(away), worst)
    found = checks(query, key, scores)
    for name in SUMS:
        assert (0.9 if dtype == torch.float32 else 0.15) < ratio(found[name]) <= 1, name


@pytest.mark.parametrize("dtype", HALVES)
def test_F6_is_nearly_attained_by_real_half_precision_products(dtype):
    """One storage rounding, close to half a spacing, the same in every entry."""
    eps = torch.finfo(dtype).eps
    query, key = torch.full((1, 1, 40, 1), 1 + eps, dtype=dtype), torch.full((1, 1, 50, 1), 1 - eps / 2, dtype=dtype)
    found = checks(query, key, product(query, key))
    for name in SUMS:
        assert 0.95 < ratio(found[name]) <= 1, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_F7_is_attained_by_parallel_vectors(dtype):
    eps = torch.finfo(dtype).eps
    # One channel: lengths are exact, and rounding up goes beyond their product.
    query, key = torch.full((1, 1, 2, 1), 1 + eps, dtype=dtype), torch.full((1, 1, 3, 1), 1 + eps / 2, dtype=dtype)
    key = key + eps if dtype in HALVES else key
    check = score_sums.length_bound(query, key, product(query, key))
    assert bool((check.residual <= check.tolerance).all())
    assert bool((check.residual > -(2.0**-6)).all())
    beyond = (product(query, key).double() * (1 + 64 * eps)).to(dtype)
    assert ratio(score_sums.length_bound(query, key, beyond)) > 1


# ----------------------------------------------------------------------------------------------- completeness (T7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_T7_one_wrong_score_fires_exactly_its_row_its_column_and_its_tile(dtype):
    state = random_state(5, dtype=dtype, rows=50, keys=70, kv_heads=2, channels=64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        where = tuple(int(torch.randint(size, (), generator=generator)) for size in state.scores.shape)
        clean = checks(state.query, state.key, state.scores)
        batch, head, row, column = where
        lines = {
            "S_row": (batch, head, row),
            "S_col": (batch, head, column),
            "S_tile": (batch, head, row, column // 32),
        }
        largest = max(float(clean[name].tolerance[line]) for name, line in lines.items())
        # The tolerance of a half format grows with the stored value itself; one spacing is lost to storing.
        before = state.scores[where].double()
        value = (before + 2.1 * largest * (1 + 2.0**-6) + 2 * torch.finfo(dtype).eps * before.abs()).to(dtype)
        wrong = replaced(state, scores=poked(state.scores, where, float(value)))
        for name, line in lines.items():
            assert get_detector(name).check(wrong).positions == (line,), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_scores_always_fire_in_every_detector(dtype, value):
    state = random_state(6, dtype=dtype, rows=40, keys=40, kv_heads=2)
    for where in ((0, 0, 0, 0), (1, 3, 39, 39), (0, 2, 3, 30)):
        wrong = replaced(state, scores=poked(state.scores, where, value))
        for name in SCORE:
            verdict = get_detector(name).check(wrong)
            assert verdict.violations == verdict.nonfinite == 1, (name, where)


def test_a_masked_score_that_is_wrong_is_a_wrong_product():
    state = random_state(7, mask="causal", rows=20, keys=20)
    wrong = replaced(state, scores=poked(state.scores, (0, 1, 2, 19), 1e3))
    assert [get_detector(name).check(wrong).violations for name in SCORE] == [1, 1, 1, 1]


def test_S_tile_sees_what_a_long_row_hides():
    state = random_state(8, rows=4, keys=1024, kv_heads=1, channels=64, mask="all")
    off = 3 * float(score_sums.tile_sums(state.query, state.key, state.scores).tolerance[0, 0, 0].max())
    wrong = replaced(state, scores=poked(state.scores, (0, 0, 0, 500), float(state.scores[0, 0, 0, 500]) + off))
    assert get_detector("S_row").check(wrong).violations == 0
    assert get_detector("S_tile").check(wrong).positions == ((0, 0, 0, 15),)


def test_S_cs_sees_only_scores_that_are_too_large():
    state = random_state(9)
    large = poked(state.scores, (0, 1, 5, 6), 1e4)
    assert get_detector("S_cs").check(replaced(state, scores=large)).positions == ((0, 1, 5),)
    assert not get_detector("S_cs").check(replaced(state, scores=state.scores * 0)).fired


def test_the_users_tolerance_is_added_in_units_of_the_residual():
    state = random_state(10)
    wrong = replaced(state, scores=poked(state.scores, (0, 0, 0, 0), float(state.scores[0, 0, 0, 0]) + 0.5))
    for name in SUMS:
        assert get_detector(name).check(wrong).fired
        assert not get_detector(name, 0.6).check(wrong).fired


# --------------------------------------------------------------------------------------------------- blindness (T9)


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("bit", [29, 27, 22, 31])
def test_T9_a_query_or_key_that_is_wrong_before_the_product_has_right_scores(name, bit):
    state = random_state(11, kv_heads=2)
    wrong = replaced(state, **{name: flipped(getattr(state, name), (1, 1, 3, 2), bit)})
    wrong = replaced(wrong, scores=product(wrong.query, wrong.key))
    assert not torch.equal(wrong.scores, state.scores)
    for detector in SCORE:
        assert not get_detector(detector).check(wrong).fired, detector


def test_T9_whatever_follows_the_scores_is_not_read():
    state = random_state(12)
    other = replaced(
        state, logits=state.logits * 0, weights=state.weights * 7, out=state.out + 1, value=state.value + 1
    )
    for name in SCORE:
        assert get_detector(name).check(other) == get_detector(name).check(state)


# ------------------------------------------------------------------------------------------------ factor and addend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 40), (3, 20, 1), (1, 1, 40), (3, 20, 40)])
def test_F6_F7_hold_for_a_product_with_factor_and_addend_as_bloom_has_it(dtype, shape):
    for gain in (1e-3, 1.0, 50.0):
        query, key = normal(1, 3, 20, 64).to(dtype), normal(2, 3, 40, 64).to(dtype)
        addend = (normal(3, *shape) * gain).to(dtype)
        scores = torch.baddbmm(addend, query, key.mT, beta=1.0, alpha=0.125)
        found = checks(query[None], key[None], scores[None], 0.125, addend if shape[0] == 1 else addend[None])
        for name, check in found.items():
            assert check.residual.shape[:2] == (1, 3)
            assert ratio(check) <= 1, (name, gain)
        wrong = checks(query[None], key[None], scores[None], 0.125, None)
        assert gain < 1 or all(ratio(wrong[name]) > 1 for name in SUMS), "the addend was not read"


def test_an_addend_may_be_a_vector_of_keys():
    state = random_state(13)
    bias = torch.linspace(-1, 1, 12)
    shifted = replaced(state, scores=state.scores + bias, score_addend=bias)
    assert not any(get_detector(name).check(shifted).fired for name in SCORE)
    assert get_detector("S_col").check(replaced(shifted, score_addend=bias.flip(0))).fired


def test_a_negative_factor_is_a_factor():
    state = random_state(14, kv_heads=2)
    turned = replaced(state, scores=state.scores * -0.5, score_factor=-0.5)
    assert not any(get_detector(name).check(turned).fired for name in SCORE)
    assert all(get_detector(name).check(replaced(turned, score_factor=0.5)).fired for name in SUMS)


# ---------------------------------------------------------------------------------------------------- applicability


@pytest.mark.parametrize("name", SCORE)
def test_a_state_without_scores_is_not_judged(name):
    verdict = get_detector(name).check(replaced(random_state(15), scores=None))
    assert verdict.reason == "it reads scores, which this state does not carry"
    get_detector(name).derive(replaced(random_state(15), scores=None))


@pytest.mark.parametrize("name", SCORE)
def test_products_in_reduced_precision_or_times_zero_are_not_judged(name):
    state = random_state(16)
    assert "multiplies by 0" in str(get_detector(name).check(replaced(state, score_factor=0.0)).reason)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "reduced precision" in str(get_detector(name).check(state).reason)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_residuals_are_computed_once_and_kept_with_the_state():
    state = random_state(17)
    get_detector("S_row").derive(state)
    kept = state.derived(bounds.products.score_detectors.score_rows)
    get_detector("S_row").check(state)
    assert state.derived(bounds.products.score_detectors.score_rows) is kept
    assert len(dataclasses.fields(kept)) == 3
