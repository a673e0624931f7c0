"""The certificate T26: no single fault moves a row of out further than certified, and the bound is not idle."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import pytest
import torch
from attention_states import DTYPES, attend, mask_of, poked, replaced
from hypothesis import given, settings
from hypothesis import strategies as st

from bounds import AttentionState
from bounds.core.attention_state import ProjectedOperand
from bounds.core.row_check import RowCheck
from bounds.effects.certificate import FaultChecks, certify, largest_error
from bounds.effects.certificate_terms import row_maximum, weighted_maximum
from bounds.products import output_sums, score_sums
from bounds.projections import projection_sums
from bounds.projections.projection_sums import ProjectionTables
from bounds.softmax import softmax_sums

TENSORS = {"q": "query", "k": "key", "v": "value", "scores": "scores", "weights": "weights", "out": "out"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A clean call with its projections, and what is needed to run it again with a fault."""

    state: AttentionState
    tables: dict[str, ProjectionTables]
    hidden: torch.Tensor
    options: dict

    def with_fault(self, location: str, index: tuple[int, ...], after: float) -> AttentionState:
        state = self.state
        hit = poked(getattr(state, TENSORS[location]), index, after)
        if location == "out":
            return replaced(state, out=hit)
        if location in ("q", "k"):
            query, key = (hit, state.key) if location == "q" else (state.query, hit)
            return attend(query, key, state.value, plain_mask(state), **self.options)
        value = (hit if location == "v" else state.value).repeat_interleave(
            state.query.shape[1] // state.key.shape[1], 1
        )
        logits, weights, scores = state.logits, state.weights, state.scores
        keys = state.key.shape[2]
        if location == "scores":
            scores, logits = hit, logits_of(hit, state, self.options)
            weights = torch.softmax(logits, -1, dtype=self.options.get("softmax_dtype"))
        if location == "weights":
            weights = hit
        mass = weights[..., :keys].to(state.value.dtype)
        fields = {"value": hit} if location == "v" else {}
        return replaced(state, scores=scores, logits=logits, weights=weights, mass=mass, out=mass @ value, **fields)

    def check(self, state: AttentionState, location: str) -> RowCheck:
        if location in ("q", "k", "v"):
            operand = ProjectedOperand(self.hidden, getattr(state, TENSORS[location]))
            return projection_sums.row_sums(operand, self.tables[location])
        if location == "scores":
            return score_sums.row_sums(state.query, state.key, state.scores)
        if location == "weights":
            return softmax_sums.row_sums(state.weights, softmax_sums.visible_counts(state))
        return output_sums.row_sums(state.mass, state.value, state.out)

    def checks(self, state: AttentionState) -> FaultChecks:
        return FaultChecks(**{location: self.check(state, location) for location in TENSORS})

    def rows_of(self, location: str) -> tuple[int, ...]:
        return tuple(getattr(self.state, TENSORS[location]).shape[:3])


def plain_mask(state: AttentionState) -> torch.Tensor | None:
    return None if state.visible is None else state.visible[..., : state.key.shape[2]]


def logits_of(scores: torch.Tensor, state: AttentionState, options: dict) -> torch.Tensor:
    logits = scores * state.scaling
    if (cap := options.get("cap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    if (bias := options.get("bias")) is not None:
        logits = logits + bias
    logits = torch.cat([logits, state.logits[..., scores.shape[-1] :]], -1)
    return logits if state.visible is None else logits.masked_fill(~state.visible, torch.finfo(logits.dtype).min)


def make_call(
    seed=0, dtype=torch.float32, rows=12, heads=4, kv_heads=2, d=8, gain=1.0, mask="causal", **options
) -> Call:
    generator = torch.Generator().manual_seed(seed)
    width = 32
    hidden = torch.randn(2, rows, width, generator=generator, dtype=torch.float64).to(dtype)
    operands, tables = {}, {}
    for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        weight = torch.randn(count * d, width, generator=generator, dtype=torch.float64) / width**0.5
        weight = (weight * (gain if name == "q" else 1.0)).to(dtype)
        operands[name] = (hidden @ weight.T).view(2, rows, count, d).transpose(1, 2)
        tables[name] = ProjectionTables.of(weight, None, count)
    state = attend(operands["q"], operands["k"], operands["v"], mask_of(mask, rows, rows), **options)
    return Call(state, tables, hidden, options)


def fires(check: RowCheck) -> bool:
    bad = ~(check.residual <= check.tolerance)
    return bool((bad if check.checked is None else bad & check.checked).any())


def index_in(call: Call, location: str, generator: torch.Generator) -> tuple[int, ...]:
    tensor = getattr(call.state, TENSORS[location])
    sizes = [*tensor.shape[:3], call.state.key.shape[2] if location == "weights" else tensor.shape[-1]]
    return tuple(int(torch.randint(size, (1,), generator=generator)) for size in sizes)


def largest_undetected(call: Call, location: str, index: tuple[int, ...]) -> AttentionState | None:
    """The call with an error in this element just below what its own check finds; None if every error is found."""
    clean = float(getattr(call.state, TENSORS[location])[index])
    tolerance = float(call.check(call.state, location).tolerance.expand(call.rows_of(location))[index[:3]])
    for share in (1.9, 1.5, 1.2, 0.99, 0.9, 0.6, 0.3):
        for sign in (1.0, -1.0):
            faulty = call.with_fault(location, index, clean + sign * share * tolerance)
            if not fires(call.check(faulty, location)):
                return faulty
    return None


def change_of(call: Call, faulty: AttentionState) -> torch.Tensor:
    return (faulty.out.double() - call.state.out.double()).norm(dim=-1)


SITUATIONS = {
    "causal": {},
    "padded": {"mask": "padded"},
    "window": {"mask": "window", "gain": 4.0},
    "all": {"mask": "all", "kv_heads": 4},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 4.0, 0.0])},
    "bias and cap": {"cap": 5.0, "gain": 3.0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_T26_no_undetected_fault_exceeds_its_bound(situation, dtype):
    """Faults just below the threshold of their own check, in every location: the worst that stays unseen."""
    options = dict(SITUATIONS[situation])
    if situation == "bias and cap":
        options["bias"] = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(5)).to(dtype)
    call = make_call(1, dtype, **options)
    generator = torch.Generator().manual_seed(2)
    tightest: dict[str, float] = defaultdict(float)
    for location in TENSORS:
        for _ in range(6):
            index = index_in(call, location, generator)
            faulty = largest_undetected(call, location, index)
            if faulty is None:
                continue
            certificate = certify(faulty, call.checks(faulty))
            assert certificate.reason is None
            bound, change = certificate.bounds[location], change_of(call, faulty)
            seen = ~bound.isnan()
            assert bool((change[seen] <= bound[seen]).all()), (location, index)
            tightest[location] = max(tightest[location], float((change / bound)[seen].max()))
    print(f"\n{situation} {dtype}: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in tightest.items()))
    # The bounds are not idle. Half of the bound of out is the best that an error of one tolerance can reach.
    assert tightest["out"] > 0.4
    assert sum(ratio > 1e-3 for ratio in tightest.values()) >= 5


@settings(max_examples=60, deadline=None)
@given(
    location=st.sampled_from(sorted(TENSORS)),
    seed=st.integers(0, 50),
    size=st.floats(-30, 5),
    sign=st.sampled_from([1.0, -1.0]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(["all", "causal", "window", "padded"]),
    gain=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_T26_holds_for_any_fault_detected_or_not(location, seed, size, sign, dtype, mask, gain):
    """The bound is in terms of the residual, so it survives an alarm: the fault may be of any size."""
    call = make_call(seed, dtype, mask=mask, gain=gain, rows=8)
    index = index_in(call, location, torch.Generator().manual_seed(seed))
    clean = float(getattr(call.state, TENSORS[location])[index])
    faulty = call.with_fault(location, index, clean + sign * 2.0**size)
    bound = certify(faulty, call.checks(faulty)).bounds[location]
    seen = ~bound.isnan()
    assert bool((change_of(call, faulty)[seen] <= bound[seen]).all())


@pytest.mark.parametrize("location", ["q", "k", "v"])
def test_T9_a_fault_before_its_first_use_is_seen_by_its_projection_and_by_nothing_else(location):
    """What follows is a correct evaluation of the faulty operand: bit for bit what an honest call would compute."""
    call = make_call(10, gain=2.0)
    for size in (0.5, 30.0, 1e4):
        index = (1, 1, 5, 3)
        faulty = call.with_fault(location, index, size)
        honest = attend(faulty.query, faulty.key, faulty.value, plain_mask(faulty))
        for name in ("scores", "logits", "weights", "mass", "out"):
            assert torch.equal(getattr(faulty, name), getattr(honest, name))
        assert [name for name in TENSORS if fires(call.check(faulty, name))] == [location]


@pytest.mark.parametrize("location", ["scores", "weights", "out"])
def test_T9_a_fault_in_a_result_is_seen_by_its_operator_and_by_no_other(location):
    call = make_call(11)
    index = (1, 2, 8, 3)
    faulty = call.with_fault(location, index, float(getattr(call.state, location)[index]) + 0.25)
    assert [name for name in TENSORS if fires(call.check(faulty, name))] == [location]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T26_contains_the_rounding_of_both_passes(dtype):
    """The error is known exactly, and is so small that rounding is all there is: what is left must still be covered."""
    generator = torch.Generator().manual_seed(13)
    largest = dict.fromkeys(("q", "k", "v", "scores"), 0.0)
    for seed in range(3):
        call = make_call(seed, dtype, rows=16, softmax_dtype=torch.float32 if dtype == torch.bfloat16 else None)
        for location in largest:
            for _ in range(12):
                index = index_in(call, location, generator)
                clean = getattr(call.state, TENSORS[location])
                after = float(clean[index]) * (1 + 4 * torch.finfo(dtype).eps)
                faulty = call.with_fault(location, index, after)
                size = torch.zeros(clean.shape[:3], dtype=torch.float64)
                size[index[:3]] = abs(float(getattr(faulty, TENSORS[location])[index]) - float(clean[index]))
                exact = FaultChecks(**{location: RowCheck(size, torch.zeros_like(size))})
                bound = certify(faulty, exact).bounds[location]
                change = change_of(call, faulty)
                assert bool((change <= bound).all()), (location, index)
                largest[location] = max(largest[location], float((change / bound).max()))
    print(f"\n{dtype} rounding: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in largest.items()))
    assert max(largest.values()) > 0.02


def test_T26_contains_the_rounding_of_the_weights():
    """Equal values: in real numbers no score can move the output, but weights stored in bfloat16 do not sum to 1."""
    call = make_call(14, rows=16, softmax_dtype=torch.bfloat16)
    state = call.state
    flat = attend(state.query, state.key, torch.ones_like(state.value), state.visible, softmax_dtype=torch.bfloat16)
    call = dataclasses.replace(call, state=flat)
    largest = 0.0
    for row in range(16):
        index = (0, 1, row, row // 2)
        faulty = call.with_fault("scores", index, float(flat.scores[index]) + 1.0)
        error = torch.ones(flat.rows, dtype=torch.float64) * (1 + 2.0**-20)
        bound = certify(faulty, FaultChecks(scores=RowCheck(error, torch.zeros_like(error)))).bounds["scores"]
        change = change_of(call, faulty)
        assert bool((change <= bound).all())
        largest = max(largest, float(change.max()))
    assert largest > 2.0**-9


def test_T26_total_variation_is_at_most_tanh_of_a_quarter_of_the_oscillation():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4000, 6, generator=generator, dtype=torch.float64) * 3
    added = torch.randn(4000, 6, generator=generator, dtype=torch.float64) * torch.logspace(-3, 1.5, 4000)[:, None]
    distance = (torch.softmax(logits + added, -1) - torch.softmax(logits, -1)).abs().sum(-1) / 2
    allowed = torch.tanh((added.amax(-1) - added.amin(-1)) / 4)
    assert bool((distance <= allowed * (1 + 1e-12)).all())
    # and it is attained: two keys whose logits swap
    gap = torch.tensor([1.3], dtype=torch.float64)
    pair = torch.stack([gap / 2, -gap / 2], -1)
    swapped = (torch.softmax(-pair, -1) - torch.softmax(pair, -1)).abs().sum(-1) / 2
    assert torch.allclose(swapped, torch.tanh(2 * gap / 4), rtol=1e-14)


def test_a_clean_call_certifies_itself_and_says_how_well():
    """Largest relative bound by format: float32 knows its output to a per mille, bfloat16 hardly at all."""
    worst = {}
    for dtype in DTYPES:
        call = make_call(4, dtype, rows=32)
        certificate = certify(call.state, call.checks(call.state))
        assert certificate.reason is None
        assert certificate.median_relative <= certificate.largest_relative
        worst[dtype] = certificate.median_relative
    print("\nmedian relative certificate:", {str(dtype): f"{value:.1e}" for dtype, value in worst.items()})
    assert worst[torch.float64] < 1e-11
    assert worst[torch.float32] < 3e-3
    assert worst[torch.float16] < 2


def test_groups_and_tiles_tighten_the_certificate():
    call = make_call(5, torch.bfloat16, rows=32, d=16, mask="all")
    state = call.state
    wide = call.checks(state)
    narrow = dataclasses.replace(
        wide,
        scores=score_sums.tile_sums(state.query, state.key, state.scores, width=4),
        out=output_sums.group_sums(state.mass, state.value, state.out, width=4),
    )
    loose, tight = certify(state, wide), certify(state, narrow)
    assert bool((tight.bounds["out"] < loose.bounds["out"]).all())
    assert tight.bounds["scores"].mean() < loose.bounds["scores"].mean()


def test_what_no_check_covers_is_not_certified():
    call = make_call(6)
    checks = dataclasses.replace(call.checks(call.state), q=None, v=None)
    certificate = certify(call.state, checks)
    assert certificate.reason == "no check covers q, v"
    assert certificate.largest_relative is None
    assert certificate.median_relative is None
    assert set(certificate.bounds) == {"k", "scores", "weights", "out"}
    unknown = certify(replaced(call.state, has_bias_or_cap=None), call.checks(call.state))
    assert "scores: it is not known how the scores become logits" in unknown.reason
    hidden = replaced(call.state, has_bias_or_cap=True, scores=None)
    assert "q: the logits have a bias or soft cap, and this state" in certify(hidden, call.checks(call.state)).reason


def test_a_residual_that_is_no_number_gives_no_bound():
    call = make_call(7)
    for location in TENSORS:
        faulty = call.with_fault(location, (0, 1, 5, 3), math.nan)
        certificate = certify(faulty, call.checks(faulty))
        assert bool(certificate.bounds[location].isinf().any()), location
        assert not certificate.largest_relative < math.inf
    skipped = RowCheck(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([True, False, True]))
    assert largest_error(skipped).isinf().tolist() == [[False, True, False]] * 2


def test_rows_without_a_visible_key_are_left_out():
    call = make_call(8, mask="padded")
    certificate = certify(call.state, call.checks(call.state))
    empty = ~call.state.visible.any(-1).expand(call.state.rows)
    assert bool(empty.any())
    assert torch.equal(certificate.bounds["scores"].isnan(), empty)
    assert certificate.largest_relative < math.inf


def test_row_maxima_agree_with_loops():
    generator = torch.Generator().manual_seed(9)
    per_key = torch.rand(2, 3, 5, generator=generator, dtype=torch.float64)
    mass = torch.randn(2, 3, 4, 5, generator=generator)
    visible = torch.rand(2, 1, 4, 6, generator=generator) > 0.5  # the last column is a sink
    visible[..., 0] = True
    seen, weighted = row_maximum(per_key, visible, 6), weighted_maximum(mass, per_key)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in (2, 3, 4))).tolist():
        assert seen[b, h, i] == max(float(per_key[b, h, j]) for j in range(5) if visible[b, 0, i, j])
        products = [abs(float(mass[b, h, i, j])) * float(per_key[b, h, j]) for j in range(5)]
        assert float(weighted[b, h, i]) == max(products)
