"""T18 and T19: a single wrong element is found and repaired, and a right one is never touched."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from attention_states import DTYPES, flipped, poked, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bounds import AttentionState
from bounds.core.row_check import RowCheck
from bounds.effects import correction
from bounds.effects.correction import Repair, repair_output, repair_scores, repair_weights
from bounds.products import output_sums, score_sums
from bounds.softmax import softmax_sums

LOCATIONS = ["scores", "weights", "out"]
PRODUCTS = ["scores", "out"]
HALVES = [torch.bfloat16, torch.float16]

Repaired = tuple[Tensor, tuple[Repair, ...]]


def repair(state: AttentionState, location: str, tensor: Tensor) -> Repaired:
    if location == "scores":
        return repair_scores(state.query, state.key, tensor)
    if location == "out":
        return repair_output(state.mass, state.value, tensor)
    return repair_weights(state.logits, tensor, state.visible)


def checks_of(state: AttentionState, location: str) -> list[RowCheck]:
    """The checks a fault must exceed twice: rows, and columns where there are any."""
    if location == "weights":
        count = torch.full(state.rows, state.logits.shape[-1]) if state.visible is None else state.visible.sum(-1)
        return [softmax_sums.row_sums(state.weights, count)]
    if location == "scores":
        operands = state.query, state.key, state.scores
        return [score_sums.row_sums(*operands), score_sums.column_sums(*operands)]
    operands = state.mass, state.value, state.out
    return [output_sums.row_sums(*operands), output_sums.column_sums(*operands)]


def exact_of(state: AttentionState, location: str, index: tuple[int, int, int, int]) -> float:
    """The element in float64, by NumPy, from its operands alone."""
    batch, head, row, column = index
    numbers = lambda tensor: tensor.detach().double().numpy()  # noqa: E731
    if location == "weights":
        logits = numbers(state.logits)[batch, head, row]
        seen = np.ones(logits.shape, dtype=bool)
        if state.visible is not None:
            seen = np.broadcast_to(state.visible.numpy(), state.logits.shape)[batch, head, row]
        powers = np.exp(logits - logits[seen].max(), where=seen, out=np.zeros_like(logits))
        return float(powers[column] / powers.sum())
    source = head // (state.query.shape[1] // state.key.shape[1])
    if location == "scores":
        return float(np.dot(numbers(state.query)[batch, head, row], numbers(state.key)[batch, source, column]))
    return float(np.dot(numbers(state.mass)[batch, head, row], numbers(state.value)[batch, source, :, column]))


def clean_of(state: AttentionState, location: str) -> Tensor:
    return getattr(state, location)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def unit_of(value: float, dtype: torch.dtype) -> float:
    """The distance between the numbers of ``dtype`` around ``value``."""
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    return max(smallest, 2.0 ** math.floor(math.log2(abs(value))) * info.eps) if value else smallest


# ----------------------------------------------------------------------------------------- T19: nothing to repair


@pytest.mark.parametrize("mask", ["all", "causal", "window", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T19_a_clean_call_is_left_alone(dtype: torch.dtype, mask: str) -> None:
    shapes = [
        {"rows": 12, "keys": 12},
        {"rows": 1, "keys": 1},
        {"rows": 1, "keys": 70, "kv_heads": 2},
        {"rows": 90, "keys": 90, "kv_heads": 1},
        {"rows": 5, "keys": 200, "gain": 30.0},
        {"rows": 16, "keys": 16, "gain": 0.0},
        {"rows": 16, "keys": 16, "gain": 1e-3, "channels": 1},
    ]
    for seed, shape in enumerate(shapes):
        state = random_state(seed, dtype=dtype, mask=mask, **shape)
        for location in LOCATIONS:
            tensor = clean_of(state, location)
            got, repairs = repair(state, location, tensor)
            assert got is tensor, (location, shape)
            assert repairs == (), (location, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T19_the_smallest_and_largest_numbers_are_left_alone(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for size in (info.tiny * info.eps, info.tiny, info.tiny**0.5, (info.max / 64) ** 0.5):
        query = torch.full((1, 2, 9, 4), size, dtype=dtype)
        scores = query @ query.mT
        assert repair_scores(query, query, scores) == (scores, ())
        weights = torch.softmax(scores, -1)
        assert repair_weights(scores, weights) == (weights, ())
        out = weights @ query
        assert repair_output(weights, query, out) == (out, ())


# ------------------------------------------------------------------------------------------- T18: a single element


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 24, "keys": 24, "kv_heads": 2, "mask": "causal"},
        {"rows": 1, "keys": 40, "mask": "all"},
        {"rows": 50, "keys": 3, "mask": "all"},
        {"rows": 20, "keys": 33, "kv_heads": 1, "mask": "padded"},
    ],
    ids=["square", "one row", "tall", "padded"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("location", LOCATIONS)
def test_T18_every_flip_above_threshold_is_located_and_repaired(location: str, dtype: torch.dtype, shape: dict) -> None:
    state = random_state(5, dtype=dtype, **shape)
    clean, generator = clean_of(state, location), torch.Generator().manual_seed(11)
    checks = checks_of(state, location)
    above = 0
    for number in range(160):
        index = tuple(int(torch.randint(size, (), generator=generator)) for size in clean.shape)
        faulty = flipped(clean, index, number % (8 * clean.element_size()))
        delta = abs(float(faulty[index]) - float(clean[index]))
        places = [index[:3], (*index[:2], index[3])]
        thresholds = [
            2 * float(check.tolerance.expand(check.residual.shape)[place])
            for check, place in zip(checks, places, strict=False)
        ]
        judged = checks[0].checked is None or bool(checks[0].checked.expand(state.rows)[index[:3]])
        repaired, repairs = repair(state, location, faulty)
        if not judged:
            assert repairs == ()
        elif not delta <= max(thresholds):
            above += 1
            assert [(found.index, found.status) for found in repairs] == [(index, "repaired")]
            assert_repaired(state, location, index, faulty, repaired, repairs[0])
        elif repairs:  # one of the two sums was enough
            assert [(found.index, found.status) for found in repairs] == [(index, "repaired")]
    assert above >= 40


def assert_repaired(
    state: AttentionState, location: str, index: tuple, faulty: Tensor, repaired: Tensor, found: Repair
) -> None:
    clean, value = clean_of(state, location), float(repaired[index])
    assert same_bits(poked(repaired, index, 0.0), poked(clean, index, 0.0)), "another element was changed"
    assert found.value_after == value
    assert found.value_before == float(faulty[index]) or math.isnan(found.value_before)
    exact = exact_of(state, location, index)
    allowed = 1e-13 * (1 + abs(exact)) if clean.dtype == torch.float64 else 0.51 * unit_of(exact, clean.dtype)
    assert abs(value - exact) <= allowed, "not the nearest number of the format"
    if clean.dtype in HALVES:
        assert abs(value - float(clean[index])) <= 1.01 * unit_of(exact, clean.dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("location", LOCATIONS)
def test_T18_nonfinite_elements_are_repaired(location: str, dtype: torch.dtype, value: float) -> None:
    state = random_state(2, dtype=dtype, kv_heads=2)
    for index in ((0, 0, 0, 0), (1, 3, 11, 7), (0, 1, 2, 9)):  # the last one is masked
        _, repairs = found = repair(state, location, poked(clean_of(state, location), index, value))
        assert [(one.index, one.status) for one in repairs] == [(index, "repaired")]
        assert abs(float(found[0][index]) - exact_of(state, location, index)) <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T18_a_row_alone_is_enough(dtype: torch.dtype) -> None:
    """Sums of 400 rows tolerate more than sums of 3 columns: the column stays silent."""
    state = random_state(3, dtype=dtype, rows=400, keys=3, mask="all")
    rows, columns = checks_of(state, "scores")
    index = (1, 2, 250, 1)
    delta = (3 * float(rows.tolerance[1, 2, 250]) + float(columns.tolerance[1, 2, 1])) / 4
    faulty = poked(state.scores, index, float(state.scores[index]) + delta)
    assert bool(
        (score_sums.column_sums(state.query, state.key, faulty).residual[1, 2] <= columns.tolerance[1, 2]).all()
    )
    repaired, (found,) = repair_scores(state.query, state.key, faulty)
    assert (found.status, found.index) == ("repaired", index)
    assert abs(float(repaired[index]) - float(state.scores[index])) < delta / 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_T18_a_product_with_factor_and_addend(dtype: torch.dtype) -> None:
    state = random_state(4, dtype=dtype, rows=10, keys=14, mask="all")
    addend = torch.randn(2, 4, 1, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = torch.baddbmm(
        addend.expand(2, 4, 10, 14).reshape(8, 10, 14),
        state.query.reshape(8, 10, 16),
        state.key.reshape(8, 14, 16).mT,
        alpha=0.25,
    )
    scores = flat.view(2, 4, 10, 14)
    assert repair_scores(state.query, state.key, scores, 0.25, addend) == (scores, ())
    faulty = poked(scores, (1, 2, 3, 4), 1e4)
    repaired, (found,) = repair_scores(state.query, state.key, faulty, 0.25, addend)
    assert (found.status, found.index) == ("repaired", (1, 2, 3, 4))
    assert torch.allclose(repaired, scores, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


# -------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("location", LOCATIONS)
def test_rounding_errors_are_left_alone(location: str) -> None:
    state = random_state(7, rows=40, keys=40)
    clean = clean_of(state, location)
    faulty = flipped(clean, (1, 1, 39, 3), 0)
    got, repairs = repair(state, location, faulty)
    assert got is faulty
    assert repairs == ()


def test_a_negative_zero_is_a_zero() -> None:
    state = random_state(8)
    for location, index in (("weights", (0, 0, 1, 9)), ("weights", (0, 0, 3, 4))):
        faulty = flipped(clean_of(state, location), index, 31)
        assert math.copysign(1.0, float(faulty[index])) == -1.0
        assert repair(state, location, faulty) == (faulty, ())
    query = torch.zeros(1, 1, 3, 4)
    scores = flipped(query @ query.mT, (0, 0, 1, 1), 31)
    assert repair_scores(query, query, scores) == (scores, ())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("location", PRODUCTS)
def test_several_elements_of_a_head_are_reported_and_left(location: str, dtype: torch.dtype) -> None:
    state = random_state(9, dtype=dtype, kv_heads=2)
    clean = clean_of(state, location)
    corners = {
        "one row": ((0, 1, 4, 2), (0, 1, 4, 7), (0, 1, 4, None)),
        "one column": ((0, 1, 4, 2), (0, 1, 8, 2), (0, 1, None, 2)),
        "both": ((0, 1, 4, 2), (0, 1, 8, 7), (0, 1, None, None)),
    }
    for first, second, told in corners.values():
        for sign in (1, -1):  # with -1 the two cancel in the sum that they share
            faulty = poked(clean, first, float(clean[first]) + 64)
            faulty = poked(faulty, second, float(clean[second]) + sign * 64)
            got, repairs = repair(state, location, faulty)
            assert got is faulty
            assert [(found.status, found.value_before, found.value_after) for found in repairs] == [
                ("unrepaired", None, None)
            ]
            if sign == 1:
                assert repairs[0].index == told


@pytest.mark.parametrize("location", LOCATIONS)
def test_heads_are_repaired_one_by_one(location: str) -> None:
    state = random_state(10, kv_heads=2)
    clean = clean_of(state, location)
    single, double = [(0, 3, 4, 2), (1, 0, 7, 7)], [(1, 2, 5, 1), (1, 2, 5, 4)]
    faulty = clean
    for index in (*single, *double):
        faulty = poked(faulty, index, 100.0)
    repaired, repairs = repair(state, location, faulty)
    assert [(found.status, found.index[:3]) for found in repairs] == [
        ("repaired", (0, 3, 4)),
        ("repaired", (1, 0, 7)),
        ("unrepaired", (1, 2, 5)),
    ]
    torch.testing.assert_close(repaired[tuple(zip(*single, strict=True))], clean[tuple(zip(*single, strict=True))])
    assert all(float(repaired[index]) == 100.0 for index in double)


def test_a_repair_that_leaves_its_row_broken_is_undone() -> None:
    """The second fault of a row is too small for its column's tolerance, not for the row's."""
    state = random_state(3, rows=400, keys=3, mask="all")
    rows, columns = checks_of(state, "scores")
    place, delta = (0, 0, 100), 3 * float(rows.tolerance[0, 0, 100])
    assert delta < float(columns.tolerance[0, 0, 2]) / 2
    faulty = poked(state.scores, (*place, 0), 50.0)
    faulty = poked(faulty, (*place, 2), float(state.scores[(*place, 2)]) + delta)
    got, (found,) = repair_scores(state.query, state.key, faulty)
    assert got is faulty
    assert (found.status, found.index, found.value_before) == ("unrepaired", (*place, 0), 50.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_second_fault_that_one_sum_sees_is_not_passed_over(transposed: bool) -> None:
    """In 3 rows of 400 keys a small fault breaks its column and not its row; in 400 rows of 3 keys the reverse."""
    state = (
        random_state(3, rows=400, keys=3, mask="all") if transposed else random_state(3, rows=3, keys=400, mask="all")
    )
    rows, columns = checks_of(state, "scores")
    large, small = ((0, 0, 1, 9), (0, 0, 2, 77)) if not transposed else ((0, 0, 9, 1), (0, 0, 77, 2))
    tight = columns.tolerance[0, 0, 77] if not transposed else rows.tolerance[0, 0, 77]
    faulty = poked(state.scores, large, 50.0)
    faulty = poked(faulty, small, float(state.scores[small]) + 3 * float(tight))
    got, (found,) = repair_scores(state.query, state.key, faulty)
    assert got is faulty
    assert found.status == "unrepaired"
    assert found.index == ((0, 0, None, 1) if transposed else (0, 0, 1, None))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_errors_of_the_operands_are_none_of_the_product(value: float) -> None:
    state = random_state(11, mask="all")
    query = poked(state.query, (0, 0, 3, 3), value)
    scores = query @ state.key.mT
    assert repair_scores(query, state.key, scores)[1] == ()
    weights = torch.softmax(poked(state.logits, (0, 0, 3, 3), math.nan), -1)
    assert repair_weights(poked(state.logits, (0, 0, 3, 3), math.nan), weights)[1] == ()
    out_value = poked(state.value, (0, 0, 3, 3), value)
    assert repair_output(state.mass, out_value, state.mass @ out_value)[1] == ()
    finite = poked(state.query, (0, 0, 3, 3), 1e6)
    assert repair_scores(finite, state.key, finite @ state.key.mT)[1] == ()


def test_a_product_too_large_for_its_format_is_not_replaced_by_infinity() -> None:
    query = torch.full((1, 1, 2, 4), 200.0, dtype=torch.float16)
    query[0, 0, 0] = 1.0
    got, repairs = repair_scores(query, query, torch.tensor([[[[4.0, 800.0], [800.0, math.inf]]]]).half())
    assert [(found.index, found.status) for found in repairs] == [((0, 0, 1, 1), "unrepaired")]
    assert float(got[0, 0, 1, 1]) == math.inf


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_weight_of_a_masked_key_is_repaired(dtype: torch.dtype) -> None:
    state = random_state(12, dtype=dtype, mask="padded")
    smallest = torch.finfo(dtype).tiny
    repaired, (found,) = repair(state, "weights", poked(state.weights, (1, 2, 9, 0), smallest))
    assert (found.status, found.index, found.value_after) == ("repaired", (1, 2, 9, 0), 0.0)
    assert same_bits(repaired, state.weights)


def test_a_row_without_keys_is_not_looked_at() -> None:
    state = random_state(13, mask="padded")
    assert not bool(state.visible[1, 0, 0].any())
    faulty = poked(state.weights, (1, 0, 0, 0), 7.0)
    assert repair(state, "weights", faulty) == (faulty, ())


def test_masked_keys_that_compete_are_an_error_of_the_logits() -> None:
    state = random_state(13)
    logits = state.logits.clone()
    logits[0, 0, 4] = torch.finfo(torch.float32).min  # the visible ones have fallen as low as the mask
    assert repair_weights(logits, torch.softmax(logits, -1), state.visible)[1] == ()


def test_a_logit_of_minus_infinity_has_weight_zero() -> None:
    state = random_state(13, mask="all")
    logits = poked(state.logits, (0, 0, 4, 1), -math.inf)
    weights = torch.softmax(logits, -1)
    assert repair_weights(logits, weights) == (weights, ())
    for key in (1, 2):
        repaired, (found,) = repair_weights(logits, poked(weights, (0, 0, 4, key), 0.9))
        assert (found.status, found.index) == ("repaired", (0, 0, 4, key))
        torch.testing.assert_close(repaired, weights)


@pytest.mark.parametrize("mask", ["all", "causal"])
def test_the_weight_of_a_sink_is_repaired(mask: str) -> None:
    state = random_state(14, sinks=torch.tensor([0.3, 2.0, -1.0, 9.0]), mask=mask)
    repaired, (found,) = repair(state, "weights", poked(state.weights, (0, 3, 5, 12), 0.25))
    assert (found.status, found.index) == ("repaired", (0, 3, 5, 12))
    torch.testing.assert_close(repaired, state.weights)


def test_a_row_that_sums_to_something_else_after_its_repair_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(weights: Tensor, n: Tensor) -> RowCheck:
        return RowCheck(torch.ones(weights.shape[:-1], dtype=torch.float64), torch.zeros(()), None)

    monkeypatch.setattr(softmax_sums, "row_sums", never)
    state = random_state(15, rows=1, keys=5, mask="all")
    faulty = poked(state.weights, (1, 0, 0, 2), 0.9)
    got, repairs = repair(state, "weights", faulty)
    assert got is faulty
    assert [found.status for found in repairs] == ["unrepaired"] * 8
    assert {(found.index, found.value_before) for found in repairs if found.value_before is not None} == {
        ((1, 0, 0, 2), float(faulty[1, 0, 0, 2]))
    }


def test_rows_of_weights_are_repaired_one_by_one() -> None:
    state = random_state(15)
    faulty = state.weights
    for index in ((0, 0, 8, 2), (0, 0, 9, 2), (0, 0, 10, 1), (0, 0, 10, 2)):
        faulty = poked(faulty, index, 0.9)
    repaired, repairs = repair(state, "weights", faulty)
    assert [(found.status, found.index) for found in repairs] == [
        ("repaired", (0, 0, 8, 2)),
        ("repaired", (0, 0, 9, 2)),
        ("unrepaired", (0, 0, 10, None)),
    ]
    torch.testing.assert_close(repaired[0, 0, :10], state.weights[0, 0, :10])
    assert same_bits(repaired[0, 0, 10:], faulty[0, 0, 10:])


def test_weights_without_a_mask() -> None:
    state = random_state(16, mask="all")
    assert state.visible is None
    repaired, (found,) = repair(state, "weights", poked(state.weights, (0, 0, 0, 11), 3.0))
    assert found.status == "repaired"
    torch.testing.assert_close(repaired, state.weights)


# --------------------------------------------------------------------- T18: whatever the faults, what is right stays


@settings(max_examples=80)
@given(
    location=st.sampled_from(LOCATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
    count=st.integers(2, 6),
    sizes=st.lists(st.floats(-9, 4), min_size=6, max_size=6),
)
def test_T18_no_sound_element_is_ever_changed(
    location: str, dtype: torch.dtype, seed: int, count: int, sizes: list[float]
) -> None:
    state = random_state(seed % 3, dtype=dtype, rows=9, keys=9, heads=2, kv_heads=1)
    clean, random = clean_of(state, location), np.random.default_rng(seed)
    faulty, hit = clean, set()
    for size in sizes[:count]:
        index = tuple(int(random.integers(n)) for n in (2, 2, 3, 3))
        faulty = poked(faulty, index, float(clean[index]) + float(random.choice([-1, 1])) * 10.0**size)
        hit.add(index)
    repaired, repairs = repair(state, location, faulty)
    changed = {tuple(place) for place in (repaired.view(torch.uint8) != faulty.view(torch.uint8)).nonzero().tolist()}
    width = clean.element_size()
    assert {(*place[:3], place[3] // width) for place in changed} <= hit
    assert {found.index for found in repairs if found.status == "repaired"} <= hit


def test_T18_an_element_within_its_own_rounding_is_never_the_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even sums that fired on a sound product would not get an element of it replaced."""

    def crossing(check: Callable[..., RowCheck], place: int) -> Callable[..., RowCheck]:
        def fires(*operands: object) -> RowCheck:
            found = check(*operands)
            residual = found.residual.clone()
            if residual.shape[-1] > place:
                residual[0, 0, place] = math.inf
            return RowCheck(residual, found.tolerance, found.checked)

        return fires

    monkeypatch.setattr(score_sums, "row_sums", crossing(score_sums.row_sums, 3))
    monkeypatch.setattr(score_sums, "column_sums", crossing(score_sums.column_sums, 5))
    state = random_state(17)
    got, (found,) = repair_scores(state.query, state.key, state.scores)
    assert got is state.scores
    assert (found.status, found.index, found.value_before) == ("unrepaired", (0, 0, 3, 5), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("location", PRODUCTS)
def test_T18_no_clean_element_is_outside_its_own_bound(location: str, dtype: torch.dtype) -> None:
    largest = 0.0
    for seed in range(6):
        state = random_state(seed, dtype=dtype, rows=40, keys=150, kv_heads=2, gain=10.0 ** (seed - 3), mask="all")
        left, right = (state.query, state.key) if location == "scores" else (state.mass, state.value.mT)
        product = correction._Product(location, left, right, clean_of(state, location))
        for place in range(0, 16):
            for part in (
                product.part(1, 3, slice(place, place + 1), slice(None)),
                product.part(1, 3, slice(None), slice(place, place + 1)),
            ):
                check = part.elements()
                assert check.residual.numel() == part.result.numel()
                largest = max(largest, float((check.residual / check.tolerance).max()))
    assert largest <= 1.0
    if dtype in HALVES:
        assert largest > 0.9, "the rounding of the format is reached"
