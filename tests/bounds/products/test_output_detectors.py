"""The checks of the value product: independent oracles, no false alarm, completeness, blindness, hull and K = V."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from attention_states import DTYPES, attend, flipped, poked, random_state, replaced

import bounds.products.output_detectors
import bounds.products.score_detectors
from bounds import AttentionState, get_detector
from bounds.core.row_check import RowCheck
from bounds.products import output_hull, output_sums
from bounds.products.key_value_identity import identity

SUMS = ["O_row", "O_col", "O4_row"]
HULL = ["O_hull", "O_norm"]
HALVES = [torch.bfloat16, torch.float16]


def ratio(check: RowCheck) -> float:
    """Return the largest residual in units of its tolerance; both must be finite."""
    assert check.residual.dtype == check.tolerance.dtype == torch.float64
    assert bool(torch.isfinite(check.residual).all() & torch.isfinite(check.tolerance).all())
    return float(torch.where(check.residual <= 0, 0.0, check.residual / check.tolerance).max())


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recomputed(state: AttentionState, **changes: torch.Tensor) -> AttentionState:
    """Return the state with other tensors and the output that the value product makes of them."""
    changed = replaced(state, **changes)
    group = changed.mass.shape[1] // changed.value.shape[1]
    return replaced(changed, out=changed.mass @ changed.value.repeat_interleave(group, 1))


def sums(mass: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> dict[str, RowCheck]:
    return {
        "O_row": output_sums.row_sums(mass, value, out),
        "O_col": output_sums.column_sums(mass, value, out),
        "O4_row": output_sums.group_sums(mass, value, out),
    }


# ------------------------------------------------------------------------------------------------- residuals, T7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys", "kv_heads", "channels"), [(1, 1, 1, 1), (5, 70, 2, 10), (400, 420, 1, 8)])
def test_T7_residuals_equal_those_of_an_independent_oracle(dtype, rows, keys, kv_heads, channels):
    state = random_state(1, dtype=dtype, rows=rows, keys=keys, kv_heads=kv_heads, channels=channels)
    wrong = state.out + torch.randn_like(state.out)
    mass, out = (tensor.double().numpy().astype(np.longdouble) for tensor in (state.mass, wrong))
    value = state.value.double().numpy().astype(np.longdouble).repeat(4 // kv_heads, 1)
    off = out - mass @ value
    found = sums(state.mass, state.value, wrong)
    np.testing.assert_allclose(found["O_row"].residual.numpy(), np.abs(off.sum(-1)).astype(float), atol=1e-10)
    np.testing.assert_allclose(found["O_col"].residual.numpy(), np.abs(off.sum(-2)).astype(float), atol=1e-10)
    for group in range(-(-channels // 4)):
        part = np.abs(off[..., 4 * group : 4 * group + 4].sum(-1)).astype(float)
        np.testing.assert_allclose(found["O4_row"].residual[..., group].numpy(), part, atol=1e-10)


def test_float64_operands_are_left_as_they_were():
    state = random_state(2, dtype=torch.float64, kv_equal=True)
    names = ("query", "key", "value", "scores", "mass", "out")
    before = [getattr(state, name).clone() for name in names]
    for name in (*SUMS, *HULL, "KV"):
        assert get_detector(name).check(state).applicable
    assert all(torch.equal(old, getattr(state, name)) for old, name in zip(before, names, strict=True))


# ------------------------------------------------------------------------------------------------ no false positives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["all", "causal", "window", "padded"])
@pytest.mark.parametrize("kv_equal", [False, True])
def test_F8_F9_F10_no_output_detector_fires_on_clean_attention(dtype, mask, kv_equal):
    names = [*SUMS, *HULL, *(["KV"] if kv_equal else [])]
    for (rows, keys), gain, kv_heads in itertools.product(
        [(1, 1), (1, 40), (2, 2), (65, 64)], [0.0, 1.0, 30.0], [1, 4]
    ):
        options = {"rows": rows, "keys": keys, "gain": gain, "kv_heads": kv_heads, "channels": 18}
        state = random_state(keys, dtype=dtype, mask=mask, kv_equal=kv_equal, **options)
        for name in names:
            verdict = get_detector(name).check(state)
            assert verdict.applicable
            assert verdict.rows_checked > 0
            assert not verdict.fired, (name, options, verdict)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("keys", "channels"), [(1, 64), (2, 128), (3, 16), (128, 128), (255, 64), (1024, 64)])
def test_F8_F9_F10_hold_from_one_key_to_a_thousand(dtype, keys, channels):
    query = normal(keys, 1, 2, min(keys, 200), channels).to(dtype)
    key = normal(9, 1, 1, keys, channels).to(dtype)
    visible = torch.arange(keys) <= torch.arange(query.shape[2])[:, None] + keys - query.shape[2]
    state = attend(query, key, key, visible, kv_equal=True)
    for name in (*SUMS, *HULL, "KV"):
        verdict = get_detector(name).check(state)
        assert verdict.largest_ratio <= 1, name
        assert not verdict.fired


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("softmax_dtype", [None, torch.float32])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.0, 3.0, -50.0, 9.0])])
def test_F8_F9_F10_hold_with_a_float32_softmax_and_with_sinks(dtype, softmax_dtype, sinks):
    for gain, kv_equal in itertools.product([0.0, 1.0, 9.0], [False, True]):
        state = random_state(
            3, dtype=dtype, gain=gain, rows=50, keys=50, softmax_dtype=softmax_dtype, sinks=sinks, kv_equal=kv_equal
        )
        for name in (*SUMS, *HULL, *(["KV"] if kv_equal else [])):
            assert not get_detector(name).check(state).fired, (name, gain)


def adversarial(dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits and values that are hard on a tolerance, by name."""
    logits, value = normal(1, 1, 4, 37, 45), normal(2, 1, 2, 45, 12)
    big = {torch.float64: 1e140, torch.float32: 1e37, torch.bfloat16: 1e37, torch.float16: 6e3}[dtype]
    tiny = {torch.float64: 1e-310, torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 1e-7}[dtype]
    spread = torch.linspace(-120, 0, 45, dtype=torch.float64)
    cases = {
        "ties": (logits * 0, value),
        "ties, equal values": (logits * 0, value * 0 + 1 / 3),
        "one key": (logits * 1e3, value),
        "subnormal weights": (spread.expand_as(logits), value),
        "subnormal weights, huge values": (spread.expand_as(logits), value * big),
        "zeros": (logits, value * 0),
        "huge": (logits, value * big),
        "tiny": (logits, value * tiny),
        "positive": (logits, value.abs() * 1e3),
        "negative": (logits, -value.abs() * 1e3),
        "mixed": (logits, value * torch.logspace(-5, 3, 12, dtype=torch.float64)),
        "one large value": (logits, value * torch.where(torch.arange(45) == 3, 1e3, 1e-3)[:, None]),
    }
    return {name: (left.to(dtype), right.to(dtype)) for name, (left, right) in cases.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_F8_F9_hold_on_adversarial_rows(dtype):
    for case, (logits, value) in adversarial(dtype).items():
        mass = torch.softmax(logits, -1)
        out = mass @ value.repeat_interleave(2, 1)
        assert bool(torch.isfinite(out).all()), case
        reach = output_hull.mass_reach(mass, mass)
        found = sums(mass, value, out) | {
            "O_hull": output_hull.channel_hull(value, out, reach),
            "O_norm": output_hull.length_hull(value, out, reach),
        }
        for name, check in found.items():
            assert ratio(check) <= 1, (case, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_F10_holds_on_adversarial_rows(dtype):
    for case, (_, key) in adversarial(dtype).items():
        if "huge" in case:
            key = key * (
                2.0**-60 if dtype in (torch.float32, torch.bfloat16) else 2.0**-9 if dtype == torch.float16 else 1
            )
        query = normal(5, 1, 4, 9, 12).to(dtype)
        state = attend(query, key, key, kv_equal=True)
        assert bool(torch.isfinite(state.scores).all()), case
        check = identity(state.query, key, state.scores, state.mass, state.out)
        assert ratio(check) <= 1, case


def test_F8_subnormal_operands_may_be_read_as_zero():
    """Kernels that flush operands are legal: bfloat16 on x86 does it."""
    small, large = torch.full((1, 1, 6, 8), 2.0**-127), torch.full((1, 1, 8, 4), 2.0**100)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.zeros(1, 1, 6, 4, dtype=dtype)
        for mass, value in ((small, large), (torch.ones(1, 1, 6, 8), torch.full((1, 1, 8, 4), 2.0**-127))):
            for name, check in sums(mass.to(dtype), value.to(dtype), out).items():
                assert 1e-3 < ratio(check) <= 1, name


def test_F10_subnormal_operands_may_be_read_as_zero():
    for dtype in (torch.float32, torch.bfloat16):
        query, key = torch.ones(1, 1, 6, 4, dtype=dtype), torch.full((1, 1, 8, 4), 2.0**100, dtype=dtype)
        mass = torch.full((1, 1, 6, 8), 2.0**-127, dtype=dtype)
        assert 1e-3 < ratio(identity(query, key, query @ key.mT, mass, query * 0)) <= 1
        assert 1e-3 < ratio(identity(query * 2.0**-127, key, mass * 0, mass * 0 + 1 / 8, key[:, :, :6])) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_F8_is_nearly_attained_by_the_worst_legal_float_product(dtype, sign):
    """Every rounding as large as it may be and all in one direction."""
    mass, value = torch.softmax(normal(3, 1, 1, 9, 64), -1).to(dtype), normal(4, 1, 1, 64, 12).abs().to(dtype)
    steps = 67 * torch.finfo(dtype).eps / 2
    exact = mass.double() @ value.double()
    worst = (exact * (1 + sign * steps)).to(dtype)
    away = torch.full_like(worst, -sign * torch.inf)
    out = torch.where((worst.double() - exact).abs() > exact * steps, worst.nextafter(away), worst)
    for name, check in sums(mass, value, out).items():
        assert (0.9 if dtype == torch.float32 else 0.15) < ratio(check) <= 1, name


@pytest.mark.parametrize("dtype", HALVES)
def test_F8_is_nearly_attained_by_real_half_precision_products(dtype):
    eps = torch.finfo(dtype).eps
    mass, value = torch.full((1, 1, 40, 1), 1 - eps / 2, dtype=dtype), torch.full((1, 1, 1, 50), 1 + eps, dtype=dtype)
    for name, check in sums(mass, value, mass @ value).items():
        assert 0.95 < ratio(check) <= 1, name


@pytest.mark.parametrize(("dtype", "keys"), [(torch.bfloat16, 255), (torch.float16, 2047)])
def test_F9_weights_that_round_up_leave_the_hull_and_stay_within_the_tolerance(dtype, keys):
    """1/255 and 1/2047 round up by almost u_s, and so does the output: it is beyond the values, which are all equal."""
    value = torch.full(
        (1, 1, keys, 4), 1 + 64 * torch.finfo(dtype).eps / (1 if dtype == torch.float16 else 4), dtype=dtype
    )
    state = attend(torch.zeros(1, 1, 2, 4, dtype=dtype), value, value)
    assert bool((state.out > value[:, :, :1]).all())
    for name in HULL:
        found = get_detector(name).check(state)
        assert not found.fired
        assert found.largest_ratio > 0.6


@pytest.mark.parametrize("sign", [1, -1])
def test_F9_a_sink_leaves_less_mass_than_one(sign):
    state = random_state(4, rows=9, keys=9, sinks=torch.full((4,), 5.0))
    state = recomputed(state, value=sign * (1 + state.value.abs()))
    assert bool((state.out.abs() < 1).any())
    assert not any(get_detector(name).check(state).fired for name in HULL)


@pytest.mark.parametrize("sign", [1, -1])
def test_F10_is_nearly_attained_by_the_worst_legal_float_products(sign):
    """Every rounding of both products as large as it may be, in opposite directions; parallel vectors."""
    query, key, mass = torch.ones(1, 1, 3, 60), torch.ones(1, 1, 40, 60), torch.full((1, 1, 3, 40), 1 / 32)
    scores = torch.full((1, 1, 3, 40), 60 * (1 + sign * 60 * 2.0**-24))
    out = torch.full((1, 1, 3, 60), 1.25 * (1 - sign * 40 * 2.0**-24))
    assert 0.9 < ratio(identity(query, key, scores, mass, out)) <= 1


def test_F10_is_nearly_attained_by_storage_roundings():
    one = torch.ones(1, 1, 1, 1)
    for dtype in HALVES:
        eps = torch.finfo(dtype).eps
        key, mass = ((one + shift).to(dtype) for shift in (eps, -eps / 2))
        query = (1.5 * one + eps).to(dtype)
        # The output is rounded down, the score up.
        assert 0.8 < ratio(identity(query, key, query @ key.mT, mass, mass @ key)) <= 1
    # A score below half the smallest number is stored as 0.
    query, key = (one * 2.0**-12).half(), (one * 1.99 * 2.0**-14).half()
    scores = query @ key.mT
    assert float(scores) == 0
    assert 0.9 < ratio(identity(query, key, scores, one.half(), key)) <= 1


def test_F9_F10_hold_where_squares_underflow():
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 30, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for scale in (1e-155, 1e-160, 1e-170):
        state = attend(query * scale, key, key, kv_equal=True)
        assert get_detector("KV").check(state).largest_ratio <= 1
        state = attend(query, key * scale, key * scale, kv_equal=True)
        assert all(not get_detector(name).check(state).fired for name in ("KV", *HULL, "S_cs"))


@pytest.mark.parametrize("dtype", HALVES)
def test_F10_is_not_idle_on_real_half_precision_products(dtype):
    eps = torch.finfo(dtype).eps
    query, key = torch.full((1, 1, 3, 1), 1 + eps, dtype=dtype), torch.full((1, 1, 1, 1), 1 - eps / 2, dtype=dtype)
    state = attend(query, key, key, kv_equal=True)
    assert 0.4 < get_detector("KV").check(state).largest_ratio <= 1


# ----------------------------------------------------------------------------------------------- completeness (T7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_T7_one_wrong_output_fires_exactly_its_row_its_column_and_its_group(dtype):
    state = random_state(5, dtype=dtype, rows=50, keys=70, kv_heads=2, channels=22)
    generator = torch.Generator().manual_seed(0)
    detectors = bounds.products.output_detectors
    functions = (detectors.output_rows, detectors.output_columns, detectors.output_groups)
    for _ in range(12):
        where = tuple(int(torch.randint(size, (), generator=generator)) for size in state.out.shape)
        batch, head, row, column = where
        lines = {"O_row": (batch, head, row), "O_col": (batch, head, column), "O4_row": (batch, head, row, column // 4)}
        largest = max(
            float(state.derived(function).tolerance[line])
            for function, line in zip(functions, lines.values(), strict=True)
        )
        before = state.out[where].double()
        value = (before + 2.1 * largest * (1 + 2.0**-6) + 2 * torch.finfo(dtype).eps * before.abs()).to(dtype)
        wrong = replaced(state, out=poked(state.out, where, float(value)))
        for name, line in lines.items():
            assert get_detector(name).check(wrong).positions == (line,), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_outputs_always_fire_in_every_detector(dtype, value):
    state = random_state(6, dtype=dtype, rows=40, keys=40, kv_heads=2, kv_equal=True)
    for where in ((0, 0, 0, 0), (1, 3, 39, 15), (0, 2, 3, 7)):
        wrong = replaced(state, out=poked(state.out, where, value))
        for name in (*SUMS, *HULL, "KV"):
            verdict = get_detector(name).check(wrong)
            assert verdict.violations == verdict.nonfinite == 1, (name, where)


def test_short_rows_have_smaller_tolerances_where_the_mask_is_known():
    state = random_state(7, rows=200, keys=200, channels=64)
    value = float(state.out[0, 0, 1, 0]) + 5e-4
    wrong = replaced(state, out=poked(state.out, (0, 0, 1, 0), value))
    assert get_detector("O_row").check(wrong).positions == ((0, 0, 1),)
    assert get_detector("O_row").check(replaced(wrong, visible=None)).violations == 0
    # An upper bound of the number of keys is as sound.
    assert not get_detector("O_row").check(replaced(state, visible=None)).fired


def test_hull_and_norm_see_what_lies_outside_the_values():
    state = random_state(8)
    largest = float(state.value[1, 2, :, 3].max())
    wrong = replaced(state, out=poked(state.out, (1, 2, 5, 3), 1.01 * largest))
    assert get_detector("O_hull").check(wrong).positions == ((1, 2, 3),)
    below = replaced(state, out=poked(state.out, (1, 2, 5, 3), 1.01 * float(state.value[1, 2, :, 3].min())))
    assert get_detector("O_hull").check(below).positions == ((1, 2, 3),)
    long = replaced(state, out=poked(state.out, (0, 1, 7, 0), 1e2))
    assert get_detector("O_norm").check(long).positions == ((0, 1, 7),)
    inside = replaced(state, out=state.out * 0.5)
    assert not any(get_detector(name).check(inside).fired for name in HULL)


def test_the_users_tolerance_is_added_in_units_of_the_residual():
    state = random_state(10)
    wrong = replaced(state, out=poked(state.out, (0, 0, 0, 0), float(state.out[0, 0, 0, 0]) + 0.5))
    for name in SUMS:
        assert get_detector(name).check(wrong).fired
        assert not get_detector(name, 0.6).check(wrong).fired


# --------------------------------------------------------------------------------------------------- blindness (T9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [(1, 1, 9, 2), (0, 0, 3, 3), (0, 0, 3, 11)])
def test_T9_weights_that_are_wrong_before_the_product_have_a_right_output(dtype, where):
    """A negative weight and a weight on a masked key included: the sums check the product, whatever it multiplies."""
    state = random_state(11, dtype=dtype, kv_heads=2, channels=32)
    for value in (-0.9, 0.0, 0.01, 0.7, 2.0, 1e9):
        wrong = poked(state.mass, where, value)
        changed = recomputed(state, mass=wrong, weights=wrong)
        for name in SUMS:
            assert not get_detector(name).check(changed).fired, (name, value)
    # Only masses that sum to much more than 1 leave the hull.
    assert all(get_detector(name).check(changed).fired for name in HULL)


@pytest.mark.parametrize("bit", [31, 29, 20])
def test_T9_values_that_are_wrong_before_the_product_have_a_right_output(bit):
    state = random_state(12, kv_heads=2)
    changed = recomputed(state, value=flipped(state.value, (0, 1, 3, 5), bit))
    for name in (*SUMS, *HULL):
        assert not get_detector(name).check(changed).fired, name


def test_T9_whatever_precedes_the_weights_is_not_read():
    state = random_state(13)
    other = replaced(state, query=state.query * 3, key=state.key + 1, scores=state.scores * 0, logits=state.logits * 2)
    for name in (*SUMS, *HULL):
        assert get_detector(name).check(other) == get_detector(name).check(state)


# ------------------------------------------------------------------------------------------------------ hull and mask


def test_a_huge_value_at_a_masked_key_does_no_harm():
    for dtype in (torch.float32, torch.bfloat16):
        state = random_state(14, dtype=dtype, mask="padded", rows=12, keys=12)
        huge = recomputed(state, value=poked(state.value, (1, 0, 0, 0), 1e37))
        clean = {name: get_detector(name).check(huge) for name in (*SUMS, *HULL)}
        assert not any(verdict.fired for verdict in clean.values())
        wrong = replaced(huge, out=poked(huge.out, (1, 0, 9, 0), 50.0))
        # Seen by the rows: the mass at the huge value is 0. Its own column is lost to hull and norm.
        assert get_detector("O_row").check(wrong).violations in (0, 1)
        assert not get_detector("O_hull").check(wrong).fired
        other = replaced(huge, out=poked(huge.out, (1, 1, 9, 0), 50.0))
        assert all(get_detector(name).check(other).violations == 1 for name in (*SUMS, *HULL))


@pytest.mark.parametrize("left", [float("nan"), 0.0, 7.0])
def test_rows_that_see_no_key_are_not_judged(left):
    state = random_state(15, mask="padded", kv_equal=True)
    empty = ~state.visible.any(-1)
    assert bool(empty.any())
    out = state.out.masked_fill(empty[..., None], left)
    mass = state.mass.masked_fill(empty[..., None], left)
    changed = replaced(state, out=out, mass=mass)
    rows = int((~empty).sum()) * 4
    for name in (*SUMS, *HULL, "KV"):
        verdict = get_detector(name).check(changed)
        assert not verdict.fired, name
        expected = {"O_row": rows, "O_norm": rows, "KV": rows, "O4_row": rows * 4}.get(name, 2 * 4 * 16)
        assert verdict.rows_checked == expected, name


class _Attention(torch.nn.Module):
    pass


def test_hull_and_norm_are_not_judged_while_dropout_may_be_on():
    model = torch.nn.Module()
    model.layer = _Attention()
    state = replaced(random_state(16), name="layer")
    doubled = recomputed(state, mass=state.mass * 3)
    for name in HULL:
        detector = get_detector(name)
        assert detector.check(doubled).fired
        detector.prepare(model)
        model.train()
        assert "dropout" in str(detector.check(doubled).reason)
        # It is asked of the module that attends, and again at every call.
        model.layer.eval()
        assert detector.check(doubled).fired
    assert not any(get_detector(name).check(doubled).fired for name in SUMS)


def test_mass_reach_covers_cast_and_sinks():
    single, half = torch.zeros(1, 1, 1, 100), torch.zeros(1, 1, 1, 100, dtype=torch.bfloat16)
    assert 1 < output_hull.mass_reach(single, single) < 1 + 1e-4
    assert 1 + 2.0**-8 <= output_hull.mass_reach(single, half) < 1.01
    assert 1 + 2.0**-8 <= output_hull.mass_reach(half, half) < 1.01
    for dtype, keys in itertools.product(HALVES, (3, 77, 1024)):
        weights = torch.softmax(normal(1, 1, 1, 50, keys).float(), -1)
        mass = weights.to(dtype)
        assert float(mass.double().sum(-1).max()) <= output_hull.mass_reach(weights, mass)


# -------------------------------------------------------------------------------------------------------------- K = V


@pytest.mark.parametrize("options", [{"cap": 5.0}, {"bias": torch.linspace(-3, 3, 12)}, {"sinks": torch.zeros(4)}])
def test_T6_F10_the_identity_holds_for_the_scores_whatever_becomes_of_them(options):
    for dtype, gain in itertools.product(DTYPES, [1.0, 10.0]):
        given = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
        state = random_state(17, dtype=dtype, gain=gain, kv_heads=2, kv_equal=True, **given)
        verdict = get_detector("KV").check(state)
        assert verdict.applicable
        assert not verdict.fired


def test_F10_the_identity_ties_scores_values_and_output():
    state = random_state(18, kv_heads=2, kv_equal=True, gain=3.0)
    row = (1, 2, 9)
    for name, index in (("scores", (*row, 4)), ("out", (*row, 5))):
        tensor = getattr(state, name)
        wrong = replaced(state, **{name: poked(tensor, index, float(tensor[index]) + 1.0)})
        assert get_detector("KV").check(wrong).positions == (row,)
    # A value that is no longer its key is seen in the rows that read it.
    values = recomputed(state, value=poked(state.value, (1, 1, 9, 5), 9.0))
    assert all(position[:1] == (1,) and position[2] >= 9 for position in get_detector("KV").check(values).positions)
    assert get_detector("KV").check(values).fired
    # A wrong key that is the value as well is a clean evaluation of another key (T9).
    both = poked(state.key, (1, 1, 9, 5), 9.0)
    again = attend(state.query, both, both, state.visible, kv_equal=True)
    assert not get_detector("KV").check(again).fired
    # So is a wrong weight that the output was computed from.
    weights = recomputed(state, mass=poked(state.mass, (*row, 1), 0.9))
    assert not get_detector("KV").check(weights).fired


def test_F10_scales_with_the_factor_of_the_product():
    state = random_state(19, kv_equal=True)
    scaled = replaced(state, scores=state.scores * -0.25, score_factor=-0.25)
    assert not get_detector("KV").check(scaled).fired
    assert get_detector("KV").check(replaced(scaled, score_factor=0.25)).fired


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_equal": False}, "does not guarantee equal keys and values"),
        ({"scores": None}, "it reads scores, which this state does not carry"),
        ({"mass": None}, "it reads mass, which this state does not carry"),
        ({"score_addend": torch.zeros(1)}, "adds a bias"),
        ({"score_factor": 0.0}, "multiplies by 0"),
    ],
)
def test_KV_says_why_it_does_not_apply(changes, reason):
    state = replaced(random_state(20, kv_equal=True), **changes)
    assert reason in str(get_detector("KV").check(state).reason)
    get_detector("KV").derive(state)


# ---------------------------------------------------------------------------------------------------- applicability


@pytest.mark.parametrize("name", [*SUMS, *HULL])
def test_states_without_mass_and_products_in_reduced_precision_are_not_judged(name):
    state = random_state(21)
    assert (
        get_detector(name).check(replaced(state, mass=None)).reason == "it reads mass, which this state does not carry"
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "reduced precision" in str(get_detector(name).check(state).reason)
    finally:
        torch.set_float32_matmul_precision(before)


def test_values_may_have_another_number_of_channels_than_queries():
    query, key, value = normal(1, 2, 4, 9, 16), normal(2, 2, 2, 11, 16), normal(3, 2, 2, 11, 10)
    state = attend(query.float(), key.float(), value.float())
    for name in (*SUMS, *HULL):
        verdict = get_detector(name).check(state)
        assert verdict.applicable
        assert not verdict.fired
    assert get_detector("O4_row").check(state).rows_checked == 2 * 4 * 9 * 3


def test_what_several_detectors_read_is_computed_once():
    state = random_state(22)
    for name in (*SUMS, *HULL):
        get_detector(name).derive(state)
    kept = state.derived(bounds.products.output_detectors.output_rows)
    get_detector("O_row").check(state)
    assert state.derived(bounds.products.output_detectors.output_rows) is kept
    assert dataclasses.is_dataclass(kept)
