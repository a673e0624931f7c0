"""Edges of the proofs, each a correct computation on which a careless tolerance would fire (docs/theory.md)."""

import math

import pytest
import torch
from attention_states import attend, random_state, replaced

from bounds import compute_attention_bounds, detect_violation, get_detector
from bounds.core.attention_state import ProjectedOperand
from bounds.core.row_check import judged
from bounds.fused.fused_attention import FusedState
from bounds.numerics.chain import chain_bounds
from bounds.numerics.rounding import cast
from bounds.projections.projection_sums import ProjectionTables, row_sums


def exact(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.softmax(logits.double(), -1)
    top = logits.double().amax(-1)
    spread = top - (weights * logits.double()).sum(-1)
    entropy = -(weights * torch.log(weights)).sum(-1)
    return weights, top, spread, entropy


def test_T1_epsilon_is_shannon_minus_minimal_entropy():
    weights, _, spread, entropy = exact(torch.randn(50, 7, dtype=torch.float64))
    torch.testing.assert_close(spread, entropy + torch.log(weights.amax(-1)), rtol=0, atol=1e-12)
    assert bool(((spread >= 0) & (spread <= math.log(7))).all())


@pytest.mark.parametrize("n", [2, 3, 9, 200])
def test_T2_the_chain_encloses_epsilon(n):
    logits = torch.randn(300, n, dtype=torch.float64) * torch.logspace(-2, 2, 300, dtype=torch.float64)[:, None]
    weights, top, spread, _ = exact(logits)
    ordered = logits.sort(-1, descending=True).values
    gamma, count = ordered[:, 0] - ordered[:, 1], torch.full((300,), n)
    lower1, middle, upper1, upper2 = chain_bounds(top, gamma, weights.amax(-1), logits.mean(-1), count)
    for small, large in ((lower1, middle), (middle, spread), (spread, upper1), (spread, upper2)):
        assert bool((small <= large + 1e-9).all())


def test_T3_one_key_and_two_keys_lie_on_their_bounds():
    one = compute_attention_bounds(torch.tensor([[3.0]]), torch.tensor([[1.0]]), d=4)
    assert [float(b) for b in (one.epsilon, one.lower, one.upper)] == [0, 0, 0]
    logits = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    two = compute_attention_bounds(logits, torch.softmax(logits, -1), d=4)
    torch.testing.assert_close(two.epsilon, two.lower1, rtol=1e-12, atol=0)
    torch.testing.assert_close(two.epsilon, two.middle, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1.2345678901234567e20, 1.9e19, 1e299])
@pytest.mark.parametrize("n", [100, 1000])
def test_F1_F2_ties_at_a_huge_value_do_not_make_the_tolerance_negative(size, n):
    logits = torch.full((1, n), size, dtype=torch.float64)
    for tight in (False, True):
        bounds = compute_attention_bounds(logits, torch.softmax(logits, -1), d=64, tight=tight)
        assert bool((bounds.tolerance >= 0).all())
        assert detect_violation(bounds.tightened() if tight else bounds).count == 0


@pytest.mark.parametrize("small", ["hidden", "weight"])
def test_F15_covers_operands_that_a_product_reads_as_zero(small):
    # What a processor that reads subnormal numbers as zero returns: nothing.
    hidden = torch.full((1, 3, 256), 1e-39 if small == "hidden" else 1e6, dtype=torch.bfloat16)
    weight = torch.full((32, 256), 1e6 if small == "hidden" else 1e-39, dtype=torch.bfloat16)
    projected = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16)
    for group in (None, 4, 1):
        check = row_sums(ProjectedOperand(hidden, projected), ProjectionTables.of(weight, None, 2, group))
        assert judged("F15", check).violations == 0


def test_F4_a_float64_model_with_a_float32_softmax():
    state = attend(*(torch.randn(2, 4, 12, 16, dtype=torch.float64) for _ in range(3)))
    logits = state.logits.float()
    weights = torch.softmax(logits, -1)
    mass = weights.double()
    narrowed = replaced(state, logits=logits, weights=weights, mass=mass, out=mass @ state.value)
    for name in ("q@o", "comb", "s@w", "W_sum", "W_elem", "O_row", "O_hull"):
        assert get_detector(name).check(narrowed).violations == 0


@pytest.mark.parametrize("count", [64, 1024])
def test_F17_F18_visible_keys_may_lie_in_as_many_blocks_as_there_are(count):
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 16 * count, 16, generator=generator)
    query = torch.randn(1, 1, 1, 16, generator=generator)
    visible = (torch.arange(16 * count) % 16 == 0).view(1, 1, 1, -1)
    logits = (query.double() @ key.double().mT / 4).masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(logits, -1).float()
    # Every rescaling may round three times and use an exponential of its own error.
    worst = lse * (1 + 2.0**-24) + count * 7 * 2.0**-24
    state = FusedState(
        query=query, key=key, value=key, out=torch.zeros(1, 1, 1, 16), lse=worst, scaling=0.25, causal=False,
        visible=visible, kv_equal=False, layer=None, name="",
    )  # fmt: skip
    assert get_detector("lse_bounds").check(state).violations == 0


def test_a_cast_costs_nothing_where_the_target_holds_all_numbers():
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert [cast(*pair).roundoff for pair in ((half, single), (single, double), (half, half))] == [0, 0, 0]
    assert cast(single, half).roundoff == 2.0**-8
    assert cast(double, single).roundoff == 2.0**-24
    assert cast(half, torch.float16).roundoff == 2.0**-11


def test_a_tolerance_that_is_not_finite_fires_like_a_residual_that_is_none():
    state = random_state()
    broken = replaced(state, query=torch.full_like(state.query, math.inf))
    assert get_detector("S_row").check(broken).nonfinite > 0
