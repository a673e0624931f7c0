"""The epsilon chain: against a slow oracle, as properties, and free of false positives."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from bounds import compute_attention_bounds, detect_violation
from bounds.numerics import blocks
from bounds.numerics.blocks import row_blocks
from bounds.numerics.chain import lambert_table, tight_bounds

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TENSOR_FIELDS = [
    "n", "checked", "a_star", "w_star", "gamma", "epsilon", "lower1", "middle", "upper1", "upper2",
    "lower", "upper", "tolerance", "magnitude", "tight_lower", "tight_upper",
]  # fmt: skip


def softmax(logits: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    return torch.softmax(logits if visible is None else logits.masked_fill(~visible, -math.inf), -1)


def slow_row(logits: list[float], weights: list[float], alpha: float) -> dict[str, float]:
    """The chain of one row of visible entries, term by term."""
    n = len(logits)
    order = sorted(range(n), key=lambda j: logits[j], reverse=True)
    a_star, w_star = logits[order[0]], weights[order[0]]
    row = {"epsilon": a_star - math.fsum(w * a for w, a in zip(weights, logits, strict=True))}
    if n == 1:
        row |= dict.fromkeys(("lower1", "middle", "upper1", "upper2"), 0.0)
    else:
        gamma = a_star - logits[order[1]]
        lambert = brentq(lambda x: x * math.exp(x) - (n - 1) / math.e, 0.0, 30.0, xtol=1e-15)
        decay = (n - 1) * math.exp(-gamma)
        row["lower1"] = gamma / (1 + math.exp(min(gamma, 700.0)))
        row["middle"] = gamma * (1 - w_star)
        row["upper1"] = a_star - math.fsum(logits) / n
        row["upper2"] = lambert if gamma <= lambert + 1 else gamma * decay / (1 + decay)
    return {name: value / alpha for name, value in row.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_quantity_agrees_with_a_row_by_row_oracle(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 3, 5, 9, generator=generator) * 3).to(dtype)
    visible = torch.rand(2, 1, 5, 9, generator=generator) < 0.5
    weights = softmax(logits, visible)
    bounds = compute_attention_bounds(logits, weights, 16, visible)
    for index in itertools.product(range(2), range(3), range(5)):
        seen = visible.expand(2, 3, 5, 9)[index]
        assert int(bounds.n[index]) == int(seen.sum())
        if not seen.any():
            assert not bounds.checked[index]
            assert math.isnan(bounds.epsilon[index])
            continue
        a, w = logits[index][seen].double().tolist(), weights[index][seen].double().tolist()
        for name, value in slow_row(a, w, alpha=0.25).items():
            assert getattr(bounds, name)[index].item() == pytest.approx(value, rel=1e-12, abs=1e-12), name
        assert bounds.lower[index] == max(bounds.lower1[index], bounds.middle[index])
        assert bounds.upper[index] == min(bounds.upper1[index], bounds.upper2[index])


finite = st.floats(-50, 50, allow_nan=False)
rows = st.one_of(
    st.lists(finite, min_size=1, max_size=40),
    st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=40),
    st.lists(st.sampled_from([0.0, -1e-3, 1e-9, 5e3, -1e6]), min_size=1, max_size=12),
)


@settings(max_examples=300, deadline=None)
@given(row=rows, scale=st.sampled_from([1e-30, 1e-6, 1.0, 30.0, 1e20]))
def test_the_chain_and_the_tight_bounds_hold_on_every_row(row, scale):
    logits = torch.tensor(row, dtype=torch.float64) * scale
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 1, tight=True)
    tau, chain = bounds.tolerance, (bounds.lower1, bounds.middle, bounds.epsilon, bounds.upper)
    assert bool(tau <= 1e-11 * (1 + logits.abs().max()))
    for smaller, larger in itertools.pairwise(chain):
        assert bool(smaller <= larger + tau)
    assert detect_violation(bounds).count == 0
    assert detect_violation(bounds.tightened()).count == 0
    outwards = tau + 1e-10 * (1 + bounds.tight_upper)
    assert bool(bounds.middle <= bounds.tight_lower + outwards)
    assert bool(bounds.tight_upper <= bounds.upper2 + outwards)


@settings(max_examples=100, deadline=None)
@given(row=st.lists(finite, min_size=2, max_size=20), shift=st.floats(-20, 20))
def test_epsilon_does_not_change_when_all_logits_are_shifted(row, shift):
    logits = torch.tensor(row, dtype=torch.float64)
    here = compute_attention_bounds(logits, torch.softmax(logits, -1), 4)
    there = compute_attention_bounds(logits + shift, torch.softmax(logits + shift, -1), 4)
    for name in ("epsilon", "lower", "upper"):
        torch.testing.assert_close(getattr(here, name), getattr(there, name), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gap", [0.0, 0.3, 1.7, 25.0])
def test_two_keys_make_both_lower_bounds_equal_to_epsilon(gap):
    logits = torch.tensor([0.2, 0.2 - gap], dtype=torch.float64)
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 1)
    for name in ("lower1", "middle"):
        assert getattr(bounds, name).item() == pytest.approx(bounds.epsilon.item(), abs=1e-14)


def test_middle_is_attained_when_all_others_tie():
    logits = torch.tensor([1.5] + [0.25] * 30, dtype=torch.float64)
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 1)
    assert bounds.middle.item() == pytest.approx(bounds.epsilon.item(), abs=1e-14)
    assert bounds.lower1 < bounds.middle


@pytest.mark.parametrize("n", [2, 7, 100])
def test_upper1_is_attained_when_all_logits_tie_and_upper2_at_the_lambert_gap(n):
    logits = torch.full((n,), 3.25, dtype=torch.float64)
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 1)
    assert bounds.upper1.item() == pytest.approx(0.0, abs=1e-13)
    assert bounds.gamma == 0
    gap = 1 + lambert_table(n)[n].item()
    logits[1:] -= gap
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 1)
    assert bounds.upper2.item() == pytest.approx(bounds.epsilon.item(), abs=1e-13)
    logits[1:] -= 2.0  # a wider gap: the second branch, attained as well
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 1)
    assert bounds.upper2.item() == pytest.approx(bounds.epsilon.item(), abs=1e-13)


def test_one_visible_key_has_zero_bounds_and_the_tolerance_decides():
    logits = torch.tensor([[7.0, -3.0]])
    bounds = compute_attention_bounds(logits, torch.tensor([[1.0, 0.0]]), 4, torch.tensor([[True, False]]))
    for name in ("gamma", "epsilon", "lower1", "middle", "upper1", "upper2"):
        assert getattr(bounds, name).item() == 0.0
    assert 0 < bounds.tolerance.item() < 1e-4


def test_lambert_table_solves_its_equation():
    table = lambert_table(5000)
    others = torch.arange(len(table)).sub(1).clamp(min=0).double()
    torch.testing.assert_close(table * table.exp(), others / math.e, rtol=1e-14, atol=0)


def test_tight_bounds_are_the_extremes_of_a_random_search():
    gap, n, w_star = 0.7, 6, 0.35
    tail, second = (1 - w_star) / w_star, math.exp(-gap)
    generator = np.random.default_rng(0)
    shares = [generator.dirichlet(np.full(n - 2, 10**power), 4000) for power in (-2, -1, -0.5, 0, 1, 2)]
    others = np.concatenate(shares) * (tail - second)
    others = others[others.max(-1) <= second]
    terms = np.concatenate([np.full((len(others), 1), second), others], axis=1)
    values = w_star * -(terms * np.log(np.maximum(terms, 1e-300))).sum(-1)
    lower, upper = tight_bounds(
        torch.tensor(gap, dtype=torch.float64), torch.tensor(tail, dtype=torch.float64), torch.tensor(n)
    )
    assert float(lower) <= values.min()
    assert values.max() <= float(upper)
    assert values.min() - float(lower) < 0.02
    assert float(upper) - values.max() < 0.02


# ------------------------------------------------------------------------------------------ no false positives


def masks(n: int) -> dict[str, torch.Tensor | None]:
    query, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
    padding = torch.ones(2, 1, 1, n, dtype=torch.bool)
    padding[1, ..., : n // 3] = False
    return {
        "all": None,
        "causal": key <= query,
        "window": (key <= query) & (key > query - 3),
        "padded": padding & (key <= query),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 64, 300])
def test_no_correct_softmax_violates_the_chain(dtype, n):
    generator = torch.Generator().manual_seed(n)
    largest = 0.0
    for gain in (0.0, 1e-3, 1.0, 8.0, 300.0):
        offset = 30 * gain * torch.randn(2, 2, n, 1, generator=generator)
        logits = (torch.randn(2, 2, n, n, generator=generator) * gain + offset).clamp(-6e4, 6e4).to(dtype)
        for name, visible in masks(n).items():
            weights = softmax(logits, visible)
            bounds = compute_attention_bounds(logits, weights, 32, visible, tight=True)
            assert detect_violation(bounds).count == 0, (gain, name)
            assert detect_violation(bounds.tightened()).count == 0, (gain, name)
            found = detect_violation(compute_attention_bounds(logits, weights, 32, visible))
            largest = max(largest, found.largest_ratio)
            assert found.rows_checked == bounds.checked.sum()
    if n == 300 and dtype in (torch.bfloat16, torch.float16):
        assert largest > 0.3, "the tolerance is much larger than what happens"


def test_without_a_tolerance_correct_rows_do_violate_the_chain():
    logits = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), 32)
    bare = dataclasses.replace(bounds, tolerance=torch.zeros_like(bounds.tolerance))
    assert detect_violation(bare).count > 20


def test_a_float32_softmax_in_a_half_precision_model_is_covered_by_the_weights_dtype():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    weights = torch.softmax(logits, -1, dtype=torch.float32)
    single = compute_attention_bounds(logits, weights, 8)
    half = compute_attention_bounds(logits, weights.half(), 8)
    assert detect_violation(single).count == detect_violation(half).count == 0
    assert bool((single.tolerance < half.tolerance / 10).all())


# -------------------------------------------------------------------------------------------- what it can see


def test_a_weight_error_larger_than_the_interval_is_always_seen():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(400, 24, generator=generator) * 3
    weights = torch.softmax(logits, -1)
    clean = compute_attention_bounds(logits, weights, 1)
    smallest = logits.argmin(-1, keepdim=True)  # not the largest, so the bounds themselves stay
    width = (clean.upper - clean.lower + 4 * clean.tolerance)[:, None]
    faulty = weights.double()
    faulty.scatter_add_(-1, smallest, 1.01 * width / logits.gather(-1, smallest).abs())
    found = detect_violation(compute_attention_bounds(logits, faulty.float(), 1))
    assert found.count == 400


def test_a_fault_before_the_softmax_is_never_seen():
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(300, 24, generator=generator)
    bits = logits.view(torch.int32)
    for bit in range(31):
        faulty = logits.clone()
        faulty[:, 7] = (bits[:, 7] ^ (1 << bit)).view(torch.float32)
        faulty = faulty[faulty.isfinite().all(-1)]
        assert len(faulty) > 0
        bounds = compute_attention_bounds(faulty, torch.softmax(faulty, -1), 4)
        assert detect_violation(bounds).count == 0, bit


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["logits", "weights"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nonfinite_visible_entry_stays_nonfinite(value, place, dtype):
    logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"logits": logits, "weights": torch.softmax(logits, -1)}
    tensors[place][2, 4] = value
    for tight in (False, True):
        found = detect_violation(compute_attention_bounds(tensors["logits"], tensors["weights"], 4, tight=tight))
        assert found.positions.tolist() == [[2]]
        assert found.nonfinite == 1


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_hidden_entries_are_not_read(garbage):
    visible = masks(40)["padded"]
    logits = torch.randn(2, 2, 40, 40, generator=torch.Generator().manual_seed(2))
    weights = softmax(logits, visible)
    clean = compute_attention_bounds(logits, weights, 16, visible, tight=True)
    hidden = ~visible.expand_as(logits)
    dirty = compute_attention_bounds(
        logits.masked_fill(hidden, garbage), weights.masked_fill(hidden, garbage), 16, visible, tight=True
    )
    for name in TENSOR_FIELDS:
        one, other = getattr(clean, name), getattr(dirty, name)
        assert torch.equal(one[clean.checked], other[clean.checked]), name
    assert clean.checked.sum() < clean.checked.numel()


# ------------------------------------------------------------------------------------------------ masks, units


def test_additive_and_boolean_masks_mean_the_same():
    logits = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    visible = masks(6)["padded"]
    weights = softmax(logits, visible)
    reference = compute_attention_bounds(logits, weights, 4, visible)
    zeros = torch.zeros(visible.shape)
    for hidden in (-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float32).min * 0.9):
        mask = zeros.masked_fill(~visible, hidden)
        other = compute_attention_bounds(logits, weights, 4, mask)
        assert torch.equal(reference.n, other.n)
        assert torch.equal(reference.epsilon[reference.checked], other.epsilon[other.checked])


def test_a_finite_bias_in_an_additive_mask_hides_nothing():
    mask = torch.tensor([0.0, -1e4, -1e30])
    logits = torch.zeros(1, 3)
    assert compute_attention_bounds(logits, logits + 1 / 3, 4, mask).n.item() == 3


def test_nan_in_a_mask_counts_as_visible_so_that_its_row_is_reported():
    logits = torch.tensor([[0.0, math.nan]])
    bounds = compute_attention_bounds(logits, torch.tensor([[0.5, 0.5]]), 4, torch.tensor([0.0, math.nan]))
    assert detect_violation(bounds).nonfinite == 1


def test_epsilon_is_in_units_of_the_unscaled_scores():
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.softmax(scores / 4, -1)
    by_dimension = compute_attention_bounds(scores / 4, weights, 16)
    by_scale = compute_attention_bounds(scores / 4, weights, 999, scale=0.25)
    expected = scores.amax(-1) - (weights * scores).sum(-1)
    for bounds in (by_dimension, by_scale):
        torch.testing.assert_close(bounds.epsilon, expected, rtol=1e-12, atol=1e-12)
        assert bounds.scale == 0.25
    assert torch.equal(by_dimension.upper, by_scale.upper)


# ---------------------------------------------------------------------------------------------------- blocks


@given(
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple),
    width=st.integers(1, 9),
    elements=st.integers(1, 200),
)
def test_blocks_cover_every_row_once_and_stay_small(shape, width, elements):
    seen = np.zeros(shape, dtype=int)
    for block in row_blocks(shape, width, elements):
        assert seen[block].size * width <= max(elements, width)
        seen[block] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 100, 700, 3001])
def test_the_result_does_not_depend_on_the_blocks(dtype, elements, monkeypatch):
    logits = (torch.randn(2, 3, 37, 29, generator=torch.Generator().manual_seed(4)) * 4).to(dtype)
    visible = torch.rand(2, 1, 37, 29, generator=torch.Generator().manual_seed(5)) < 0.7
    weights = softmax(logits, visible)
    weights[1, 2, 3, 4] = math.nan
    whole = compute_attention_bounds(logits, weights, 8, visible, tight=True)
    monkeypatch.setattr(row_blocks, "__defaults__", (elements,))
    assert len(list(row_blocks((2, 3, 37), 29))) > 1
    parts = compute_attention_bounds(logits, weights, 8, visible, tight=True)
    for name in TENSOR_FIELDS:
        one, other = getattr(whole, name), getattr(parts, name)
        if one.dtype == torch.float64:
            one, other = one.view(torch.int64), other.view(torch.int64)
        assert torch.equal(one, other), name


def test_a_block_of_float64_temporaries_stays_below_the_memory_limit():
    temporaries_alive_at_once = 8
    assert blocks.BLOCK_ELEMENTS * 8 * temporaries_alive_at_once <= 32 * 2**20


def test_strided_and_row_only_inputs_give_the_same_numbers():
    logits = torch.randn(3, 5, 4, 7, generator=torch.Generator().manual_seed(8))
    weights = torch.softmax(logits, -1)
    reference = compute_attention_bounds(logits, weights, 4)
    strided = compute_attention_bounds(logits.transpose(0, 1), weights.transpose(0, 1), 4)
    assert torch.equal(reference.epsilon, strided.epsilon.transpose(0, 1))
    one = compute_attention_bounds(logits[1, 2, 3], weights[1, 2, 3], 4)
    assert torch.equal(one.epsilon, reference.epsilon[1, 2, 3])
    assert torch.equal(one.tolerance, reference.tolerance[1, 2, 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("visible", [None, torch.ones(6, dtype=torch.bool)])
def test_no_gradient_flows_and_inputs_are_unchanged(dtype, visible):
    logits = torch.randn(4, 6).to(dtype).requires_grad_()
    weights = torch.softmax(logits, -1)
    copies = logits.detach().clone(), weights.detach().clone()
    assert not compute_attention_bounds(logits, weights, 4, visible, tight=True).epsilon.requires_grad
    assert torch.equal(logits, copies[0])
    assert torch.equal(weights, copies[1])


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 0}, r"d: got 0, allowed a positive integer"),
        ({"d": 2.5}, r"d: got 2\.5, allowed a positive integer"),
        ({"scale": 0.0}, r"scale: got 0\.0, allowed a positive finite number"),
        ({"scale": math.nan}, r"scale: got nan"),
        ({"weights": torch.zeros(2, 4)}, r"got shapes \(2, 3\) and \(2, 4\), allowed one common shape"),
        ({"scores": torch.zeros(2, 3, dtype=torch.int32)}, r"dtype: got int32, allowed float64"),
        ({"scores": torch.zeros(2, 0), "weights": torch.zeros(2, 0)}, r"scores: got 0 keys, allowed 1\.\."),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask: got shape \(2, 4\).*broadcast to \(2, 3\)"),
        ({"mask": torch.ones(5, 2, 3, dtype=torch.bool)}, r"mask: got shape \(5, 2, 3\)"),
        ({"mask": torch.ones(2, 3, dtype=torch.int64)}, r"mask: got dtype torch\.int64, allowed bool"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"scores": torch.zeros(2, 3), "weights": torch.zeros(2, 3), "d": 4} | change
    with pytest.raises(ValueError, match=message):
        compute_attention_bounds(**arguments)


def test_tightened_needs_the_tight_bounds():
    bounds = compute_attention_bounds(torch.zeros(1, 2), torch.full((1, 2), 0.5), 4)
    with pytest.raises(ValueError, match="pass tight=True"):
        bounds.tightened()
