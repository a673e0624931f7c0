"""Detectors of the softmax: no alarm on a correct one, no miss beyond twice the tolerance, and what they cannot see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_states import DTYPES, attend, flipped, mask_of, poked, random_state, replaced
from hypothesis import given, settings
from hypothesis import strategies as st

from bounds import get_detector
from bounds.numerics.chain import tight_bounds
from bounds.numerics.rounding import MAX_KEYS, softmax_error
from bounds.softmax.softmax_detectors import WeightDivergence, WeightElements, WeightSimplex, WeightSum
from bounds.softmax.softmax_rows import divergence, elements, simplex
from bounds.softmax.softmax_sums import largest_spread, row_sums, visible_counts

ALL = (WeightSum, WeightSimplex, WeightElements, WeightDivergence)
NAMES = ["W_sum", "W_simplex", "W_elem", "W_kl", "s@w_tight"]
U = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24}


def rows_of(logits, dtype=None):
    """Logits (T, S) and their softmax."""
    return logits, torch.softmax(logits, -1, dtype=dtype), torch.tensor([logits.shape[-1]])


def exact_softmax(logits):
    values = logits.double().numpy().astype(np.longdouble)
    terms = np.exp(values - values.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True)


@pytest.mark.parametrize("mask", ["all", "causal", "window", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_correct_softmax_raises_an_alarm(dtype, mask):
    for keys in (1, 2, 3, 31, 200):
        for gain in (1e-3, 1.0, 30.0, 1e3):
            state = random_state(keys, dtype=dtype, rows=keys, keys=keys, mask=mask, gain=gain, kv_heads=2)
            for name in NAMES:
                verdict = get_detector(name).check(state)
                assert verdict.applicable
                assert not verdict.fired, (name, keys, gain, verdict)
                assert verdict.rows_checked == int((state.derived(visible_counts) > 0).expand(state.rows).sum()), (
                    "rows without a visible key are skipped, all others are not"
                )


def adversarial_rows(dtype):
    largest = 1e4 if dtype == torch.float16 else 1e30
    generator = torch.Generator().manual_seed(0)
    return {
        "ties": torch.zeros(3, 1000),
        "one key": torch.tensor([[-7.0]]),
        "huge spread": torch.randn(50, 40, generator=generator) * largest,
        "at both ends": torch.tensor([[largest, -largest, 0.0]]),
        "subnormal weights": torch.linspace(-110.0, 0.0, 2000)[None],
        "subnormal logits": torch.randn(5, 9, generator=generator) * 1e-40,
        "many keys": torch.randn(2, 2**17, generator=generator),
    }


@pytest.mark.parametrize("single", [False, True], ids=["own", "float32 weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_F11_F12_F13_F14_hold_on_adversarial_rows(dtype, single):
    for name, logits in adversarial_rows(dtype).items():
        logits, weights, n = rows_of(logits.to(dtype), torch.float32 if single and dtype != torch.float64 else None)
        checks = (row_sums(weights, n), simplex(weights, n, None), elements(logits, weights, n))
        for check in (*checks, divergence(logits, weights, n)):
            assert bool((check.residual <= check.tolerance).all()), name


def worst_rounding(logits, dtype, sign):
    """Softmax weights with every rounding that A1-A3 allow as large as it may be, and against each other."""
    u, keys = U[dtype], logits.shape[-1]
    stored = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    delta = logits.double().max(-1, keepdim=True).values - logits.double()
    terms = torch.exp(-delta)
    high = terms * (1 + sign * (4 * u + 3 * u * delta)) * (1 + sign * u) ** 2 * (1 + sign * stored)
    low = (terms * (1 - sign * (4 * u + 3 * u * delta))).sum(-1, keepdim=True) * (1 - sign * u) ** (keys - 1)
    return high / low


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("keys", "gain"), [(2, 0.0), (2, 40.0), (30, 3.0), (1000, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_F11_F13_F14_contain_the_worst_legal_rounding_and_are_nearly_attained(dtype, keys, gain, sign):
    """The tolerance is that of ``dtype``; the weights are float64, so that nothing but the worst case is rounded."""
    logits = torch.linspace(-gain, 0.0, keys, dtype=torch.float64)[None]
    weights = worst_rounding(logits, dtype, sign)
    n = torch.tensor([keys])
    own = torch.empty(1, 1, dtype=dtype)
    tolerance = row_sums(own, n).tolerance
    off = (weights.sum(-1) - 1).abs()
    assert bool((off <= tolerance).all())
    error = (weights - torch.from_numpy(exact_softmax(logits).astype(np.float64))).abs()

    spread = largest_spread(n)
    model = softmax_error(n, spread, dtype)
    delta = -logits
    exact = torch.from_numpy(exact_softmax(logits).astype(np.float64))
    bound = exact * (model.relative + model.slope * delta) + model.absolute
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.7, "the tolerance is far from what may happen"
    if gain == 0.0:
        assert float(off / tolerance) > 0.7
    ratio = divergence_ratio(logits, weights, n, dtype)
    assert ratio <= 1
    if gain == 0.0 and dtype == torch.bfloat16:
        # All weights are off in the same direction: (w/w0) ln(w/w0) - w/w0 + 1 is half the square of that.
        assert ratio > 0.3


def divergence_ratio(logits, weights, n, dtype):
    """The residual of float64 weights in units of the tolerance for ``dtype``."""
    shown = divergence(logits, weights, n).residual
    return float((shown / divergence(logits.to(dtype), weights.to(dtype), n).tolerance).max())


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(DTYPES), st.floats(1e-3, 60.0))
@settings(max_examples=60, deadline=None)
def test_F11_F13_F14_residuals_are_those_of_an_oracle(seed, keys, dtype, gain):
    generator = torch.Generator().manual_seed(seed)
    logits, weights, n = rows_of((torch.randn(4, keys, generator=generator) * gain).to(dtype))
    weights = weights * torch.rand(4, 1, generator=generator).to(dtype)
    stored, exact = weights.double().numpy().astype(np.longdouble), exact_softmax(logits)
    np.testing.assert_allclose(row_sums(weights, n).residual, abs(stored.sum(-1) - 1).astype(float), atol=1e-13)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(stored > 0, stored * np.log(stored / exact), 0.0) - stored + exact
    np.testing.assert_allclose(divergence(logits, weights, n).residual, terms.sum(-1).astype(float), atol=1e-11)
    if dtype != torch.float64:
        residual = elements(logits, weights, n).residual
        np.testing.assert_allclose(residual, element_ratio(logits, weights, n, exact), rtol=1e-3, atol=1e-6)


def element_ratio(logits, weights, n, exact):
    """Return the largest error of each row in units of F13, by the definition."""
    spread, reach = float(largest_spread(n)), softmax_error(n, largest_spread(n), weights.dtype).reach
    delta = logits.double().numpy().max(-1, keepdims=True) - logits.double().numpy()
    bound = np.zeros_like(delta)
    for dtype in (weights.dtype, torch.float64):
        model = softmax_error(n, torch.tensor([spread], dtype=torch.float64), dtype)
        bound += exact * (float(model.relative) + float(model.slope) * np.minimum(delta, reach)) + float(model.absolute)
    return (np.abs(weights.double().numpy() - exact) / bound).max(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_W_sum_and_W_elem_see_every_change_beyond_twice_their_tolerance(dtype):
    state = random_state(3, dtype=dtype, rows=20, keys=20)
    n = state.derived(visible_counts)
    tolerance = float(row_sums(state.weights, n).tolerance.expand(state.rows)[1, 2, 9])
    row = (1, 2, 9)
    for column in (0, 4, 9, 15):
        for sign in (1, -1):
            weights = poked(state.weights.double(), (*row, column), 0.0)
            weights[(*row, column)] = state.weights[(*row, column)].double() + sign * 2.01 * tolerance
            # The dtype decides the tolerance: the changed weights are judged by that of the format they are for.
            residual = row_sums(weights, n).residual
            assert float(residual[row]) > tolerance
    for column in (0, 4, 9):
        before = float(state.weights[(*row, column)])
        for step in (1, -1):
            weights = state.weights.clone()
            value = weights[(*row, column)]
            for _ in range(10_000):
                value = torch.nextafter(value, torch.tensor(step * 2.0, dtype=dtype))
                if abs(float(value) - before) > 2.001 * element_tolerance(state, row, column):
                    break
            weights[(*row, column)] = value
            verdict = WeightElements().check(replaced(state, weights=weights))
            assert verdict.positions == (row,)


def element_tolerance(state, row, column):
    """Return the bound F13 of one weight, from the definition."""

    n = torch.tensor([row[2] + 1])
    spread = largest_spread(n)
    logits = state.logits[row].double()
    exact = torch.softmax(logits, -1)[column]
    delta = logits.max() - logits[column]
    total = 0.0
    for dtype in (state.weights.dtype, torch.float64):
        model = softmax_error(n, spread, dtype)
        total += float(exact * (model.relative + model.slope * delta) + model.absolute)
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("detector", [WeightSum, WeightSimplex, WeightElements, WeightDivergence])
def test_flips_of_the_leading_exponent_bit_of_a_visible_weight_are_seen(detector, dtype):
    state = random_state(5, dtype=dtype)
    bits = torch.finfo(dtype).bits
    verdict = detector().check(replaced(state, weights=flipped(state.weights, (0, 1, 7, 3), bits - 2)))
    assert verdict.positions == ((0, 1, 7),)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_F12_every_bit_of_a_masked_weight_but_the_sign_is_seen(dtype):
    state = random_state(5, dtype=dtype)
    bits = torch.finfo(dtype).bits
    assert float(state.weights[0, 1, 4, 9]) == 0.0
    for bit in range(bits):
        weights = flipped(state.weights, (0, 1, 4, 9), bit)
        verdict = WeightSimplex().check(replaced(state, weights=weights))
        assert verdict.fired == (bit < bits - 1), bit
        assert verdict.positions == (((0, 1, 4),) if bit < bits - 1 else ())
    two = flipped(state.weights, (0, 1, 4, 9), bits - 2)
    assert float(two[0, 1, 4, 9]) == 2.0
    for detector in ALL:
        assert detector().check(replaced(state, weights=two)).positions == ((0, 1, 4),)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_F12_negative_and_too_large_weights_are_seen_and_the_limit_is_tight(dtype):
    state = random_state(5, dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal
    assert WeightSimplex().check(replaced(state, weights=poked(state.weights, (0, 0, 5, 2), -tiny))).fired
    assert WeightSimplex().check(replaced(state, weights=poked(state.weights, (0, 0, 5, 2), 0.0))).fired is False
    n = torch.tensor([12])
    tau = float(row_sums(state.weights, n).tolerance)
    open_state = replaced(random_state(5, dtype=dtype, mask="all"))
    above = 1 + 1.1 * tau + 3 * torch.finfo(dtype).eps
    assert WeightSimplex().check(replaced(open_state, weights=poked(open_state.weights, (0, 0, 5, 2), above))).fired
    assert not WeightSimplex().check(replaced(open_state, weights=poked(open_state.weights, (0, 0, 5, 2), 1.0))).fired


@pytest.mark.parametrize("detector", ALL)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_always_fire(detector, value):
    state = random_state(1)
    for column in (2, 11):
        verdict = detector().check(replaced(state, weights=poked(state.weights, (1, 3, 6, column), value)))
        assert verdict.positions == ((1, 3, 6),)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_logits_fire_where_they_are_read(value):
    state = random_state(1)
    changed = replaced(state, logits=poked(state.logits, (1, 3, 6, 2), value))
    assert WeightElements().check(changed).positions == ((1, 3, 6),)
    assert WeightDivergence().check(changed).positions == ((1, 3, 6),)


@pytest.mark.parametrize("detector", ALL)
def test_T5_logits_that_are_wrong_have_right_weights(detector):
    state = random_state(2)
    logits = poked(state.logits, (0, 0, 8, 3), 17.0)
    consistent = replaced(state, logits=logits, weights=torch.softmax(logits, -1))
    assert not detector().check(consistent).fired


def test_a_masked_logit_that_revives_a_key_is_seen_by_W_simplex_alone():
    state = random_state(2)
    logits = poked(state.logits, (0, 0, 4, 9), 1.0)
    changed = replaced(state, logits=logits, weights=torch.softmax(logits, -1))
    fired = {detector.name for detector in ALL if detector().check(changed).fired}
    assert fired == {"W_simplex"}


def test_weights_of_another_row_are_seen_by_W_elem_and_W_kl_and_not_by_the_sum():
    state = random_state(4, mask="all")
    weights = state.weights.clone()
    weights[0, 0, 3] = state.weights[0, 0, 4]
    fired = {detector.name for detector in ALL if detector().check(replaced(state, weights=weights)).fired}
    assert fired == {"W_elem", "W_kl"}


def test_F14_is_finer_than_the_sum_for_a_small_weight():
    logits, weights, n = rows_of(torch.tensor([[0.0] * 64 + [-12.0]]))
    changed = weights.clone()
    changed[0, 64] += 2e-6
    assert bool((row_sums(changed, n).residual <= row_sums(changed, n).tolerance).all())
    check = divergence(logits, changed, n)
    assert not bool((check.residual <= check.tolerance).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sink_columns_count_as_keys(dtype):
    state = random_state(6, dtype=dtype, sinks=torch.tensor([0.3, -5.0, 4.0, 0.0]))
    assert int(state.derived(visible_counts)[0, 0, 0]) == 2
    for name in NAMES:
        assert not get_detector(name).check(state).fired
    sink = poked(state.weights, (0, 0, 3, 12), 0.9)
    assert WeightSum().check(replaced(state, weights=sink)).positions == ((0, 0, 3),)


def test_visible_counts_are_as_small_as_the_mask():
    state = random_state(0, mask="padded", rows=9, keys=9)
    counts = state.derived(visible_counts)
    assert tuple(counts.shape) == (2, 1, 9)
    assert counts[1, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert replaced(state, visible=None).derived(visible_counts).tolist() == [[[9]]]
    every = torch.ones(1, 1, 9, 1, dtype=torch.bool)
    assert replaced(state, visible=every).derived(visible_counts)[0, 0].tolist() == [9] * 9


def test_the_tolerances_do_not_depend_on_the_weights():
    state = random_state(0)
    n = state.derived(visible_counts)
    clean, wild = row_sums(state.weights, n), row_sums(state.weights * 1e30, n)
    assert torch.equal(clean.tolerance, wild.tolerance)
    assert torch.equal(
        divergence(state.logits, state.weights, n).tolerance, divergence(state.logits, state.weights * 9, n).tolerance
    )


def test_a_tolerance_of_the_user_is_added():
    state = random_state(0)
    changed = replaced(state, weights=poked(state.weights, (0, 0, 7, 1), float(state.weights[0, 0, 7, 1]) + 0.01))
    assert get_detector("W_sum").check(changed).fired
    assert not get_detector("W_sum", 0.02).check(changed).fired
    assert get_detector("W_elem").check(changed).fired
    assert not get_detector("W_elem", 1e7).check(changed).fired


def test_too_many_keys_and_missing_tensors_are_named():
    few = random_state(0)
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, MAX_KEYS + 1)
    many = replaced(few, query=few.query[:1, :1, :1], logits=wide, weights=wide, out=few.out[:1, :1, :1],
                    key=few.key[:1, :1], value=few.value[:1, :1], visible=None)  # fmt: skip
    assert "no error bound is proved for more than" in str(WeightSum().check(many).reason)
    with pytest.raises(ValueError, match="dtype: got int64, allowed float64"):
        row_sums(torch.ones(2, 2, dtype=torch.int64), torch.tensor([2]))


def test_T4_bounds_with_F3_hold_and_are_narrower_than_the_chain():
    """A weight error the chain accepts leaves the interval T4."""
    logits = torch.tensor([[0.0, -1.0, -1.0, -3.0, -4.0]]).view(1, 1, 1, 5)
    values = torch.zeros(1, 1, 5, 5)
    base = attend(logits, torch.eye(5).view(1, 1, 5, 5) * 5**0.5, values)
    assert torch.allclose(base.logits, logits)
    fired = []
    for step in np.linspace(-0.03, 0.03, 61):
        changed = replaced(base, weights=poked(base.weights, (0, 0, 0, 4), float(base.weights[0, 0, 0, 4]) + step))
        plain, tight = get_detector("s@w").check(changed), get_detector("s@w_tight").check(changed)
        assert tight.smallest_margin <= plain.smallest_margin
        fired.append((plain.fired, tight.fired))
    assert (False, True) in fired
    assert (False, False) in fired
    assert (True, False) not in fired
    gamma, tail = torch.tensor([1.0], dtype=torch.float64), torch.exp(-logits.double()[..., 1:].abs()).sum().view(1)
    lower, upper = tight_bounds(gamma, tail, torch.tensor([5]))
    weights = torch.softmax(logits.double().view(-1), -1)
    spread = -(weights * logits.double().view(-1)).sum()
    assert lower < spread < upper


def test_T4_row_of_three_keys_is_determined_so_that_only_F2_and_F3_separate_it_from_an_alarm():
    state = random_state(0, rows=3, keys=3)
    assert not get_detector("s@w_tight").check(state).fired
    assert get_detector("s@w_tight").check(state).smallest_margin is None
    weights = poked(state.weights, (0, 0, 2, 1), float(state.weights[0, 0, 2, 1]) * 1.001)
    assert get_detector("s@w_tight").check(replaced(state, weights=weights)).positions == ((0, 0, 2),)
    assert mask_of("causal", 3, 3) is not None
