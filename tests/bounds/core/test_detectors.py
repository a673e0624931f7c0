"""The detectors of the epsilon chain and of non-finite values, on attention as models compute it."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from attention_states import DTYPES, attend, mask_of, poked, random_state, replaced
from registrations import registrations_undone

from bounds import (
    AttentionState,
    Detector,
    Verdict,
    compute_attention_bounds,
    detect_violation,
    get_detector,
    list_detectors,
    register_detector,
    registry,
)
from bounds.core.detector import MAX_POSITIONS
from bounds.epsilon import epsilon_statistics
from bounds.epsilon.query_output import compute_query_output
from bounds.fused.fused_attention import FusedState
from bounds.numerics.blocks import row_blocks

ONLINE = ["finite", "s@w", "q@o", "comb"]
ORACLES = ["oracle_s@w", "oracle_q@o", "oracle_comb"]


# ------------------------------------------------------------------------------------------ no false positives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_equal", [False, True])
def test_no_detector_fires_on_clean_attention(dtype, kv_equal):
    shapes = [(1, 1), (1, 9), (2, 2), (7, 31), (64, 64), (200, 200)]
    for (rows, keys), gain, kv_heads in itertools.product(shapes, [0.0, 0.3, 2.0, 25.0], [1, 4]):
        for mask in ("all", "causal", "window", "padded"):
            options = {"dtype": dtype, "rows": rows, "keys": keys, "gain": gain, "kv_heads": kv_heads}
            state = random_state(keys, mask=mask, kv_equal=kv_equal, **options)
            for name in ONLINE:
                verdict = get_detector(name).check(state)
                assert verdict.applicable
                assert not verdict.fired, (name, options, mask, verdict)
            for name in ORACLES:
                detector = get_detector(name)
                assert not detector.check(state, detector.reduce(state)).fired, (name, options, mask)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_equal", [False, True])
def test_no_violation_on_the_rows_counted_in_the_documentation(dtype, kv_equal):
    rows = dict.fromkeys(("s@w", "q@o", "comb"), 0)
    for keys, seeds in ((64, 12), (256, 4), (1024, 1)):
        for seed, gain, mask in itertools.product(range(seeds), [0.3, 1, 4, 16], ["causal", "padded"]):
            options = {"dtype": dtype, "rows": keys, "keys": keys, "gain": gain, "kv_heads": 2}
            state = random_state(seed, mask=mask, kv_equal=kv_equal, **options)
            for name in rows:
                verdict = get_detector(name).check(state)
                assert not verdict.fired, (name, options, mask, verdict)
                rows[name] += verdict.rows_checked
    assert set(rows.values()) == {165_296}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_softmax_inside_a_half_precision_model_is_clean(dtype):
    for kv_equal, gain in itertools.product([False, True], [0.5, 8.0]):
        state = random_state(
            3, dtype=dtype, gain=gain, keys=90, rows=90, kv_equal=kv_equal, softmax_dtype=torch.float32
        )
        assert state.weights.dtype == torch.float32
        for name in ONLINE:
            assert not get_detector(name).check(state).fired, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tolerance_of_the_output_path_is_needed_and_not_vacuous(dtype):
    state = random_state(1, dtype=dtype, rows=80, keys=80, kv_equal=True)
    bounds = state.derived(epsilon_statistics.epsilon_bounds)
    path = compute_query_output(state, bounds)
    off = (path.epsilon - bounds.epsilon).abs()
    assert bool((off <= path.tolerance).all())
    assert float((off / path.tolerance).max()) > (1e-4 if dtype == torch.float64 else 0.02)
    bare = dataclasses.replace(bounds, tolerance=torch.zeros_like(bounds.tolerance))
    assert detect_violation(bare, path.epsilon).count > 0


# ---------------------------------------------- the worst legal rounding, term by term: sound, and hardly loose


def one_head(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(1, 1, *tensor.shape)


def path_error(state: AttentionState) -> float:
    """Return how far the q@o path is from the weights' epsilon, in units of its own tolerance."""
    bounds = state.derived(epsilon_statistics.epsilon_bounds)
    path = compute_query_output(state, bounds)
    return float(((path.epsilon - bounds.epsilon).abs() / path.tolerance).max())


def test_the_worst_legal_float32_products_stay_within_the_tolerance():
    n, d, u = 40, 16, 2.0**-24
    key = torch.full((n, d), 1.0) * torch.linspace(0.5, 0.9, n)[:, None]
    query = torch.ones(1, d)
    # Parallel vectors make Cauchy-Schwarz an equality; the score product errs upwards, the value product downwards.
    logits = (query.double() @ key.double().T * 0.25 * (1 + (d + 2) * u)).float()
    weights = torch.softmax(logits, -1)
    out = (weights.double() @ key.double() * (1 - (n + 1) * u)).float()
    tensors = [one_head(tensor) for tensor in (query, key, key, logits, weights, out)]
    state = AttentionState(*tensors, scaling=0.25, kv_equal=True, has_bias_or_cap=False)
    assert 0.9 < path_error(state) <= 1


def test_the_worst_legal_bfloat16_storage_stays_within_the_tolerance():
    u = 2.0**-8
    query, key = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -0.98 * 2 * u]])  # q.k = 1 - 1.96 u
    logits = torch.ones(1, 1)  # stored after the product and after the scaling, up both times
    weights = torch.tensor([[1 + 0.98 * u]])  # float32; becomes 1 in bfloat16
    out = key - torch.tensor([[u, 0.0]])  # stored downwards
    half = [one_head(tensor.bfloat16()) for tensor in (query, key, key, logits)]
    state = AttentionState(
        *half, one_head(weights), one_head(out.bfloat16()), scaling=1.0, kv_equal=True, has_bias_or_cap=False
    )
    assert torch.equal(state.weights.bfloat16(), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))
    assert 0.85 < path_error(state) <= 1


def test_weights_that_sum_to_slightly_more_than_one_stay_within_the_slack():
    u = 2.0**-24
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    weights = one * (1 + 12 * u)  # the most that one key's weight may be off
    tensors = [one_head(tensor) for tensor in (one, zero, one, zero, weights, weights + 2 * u)]
    state = AttentionState(*tensors, scaling=1.0, kv_equal=False, has_bias_or_cap=False)
    assert 0.5 < get_detector("q@o").check(state).largest_ratio <= 1


# ------------------------------------------------------------------------------------- the q@o path, T6


def slow_path(state: AttentionState, b: int, h: int, i: int) -> tuple[float, float]:
    """Epsilon by q.o and the slack of one row, one number at a time."""
    kv = h // (state.query.shape[1] // state.key.shape[1])
    q = state.query[b, h, i].double()
    seen = [j for j in range(state.key.shape[2]) if state.visible.expand_as(state.logits)[b, h, i, j]]
    largest = max(state.logits[b, h, i, j].item() for j in seen)
    epsilon = largest / state.scaling - math.fsum((q * state.out[b, h, i].double()).tolist())
    keys, values = state.key[b, kv].double(), state.value[b, kv].double()
    slack = q.norm().item() * max((values[j] - keys[j]).norm().item() for j in seen)
    return epsilon, slack


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("elements", [40, 2**15])
def test_epsilon_and_slack_of_the_output_agree_with_a_slow_oracle(kv_heads, elements, monkeypatch):
    monkeypatch.setattr(row_blocks, "__defaults__", (elements,))
    state = random_state(2, kv_heads=kv_heads, mask="window")
    path = compute_query_output(state, state.derived(epsilon_statistics.epsilon_bounds))
    for b, h, i in itertools.product(range(2), range(4), range(12)):
        epsilon, slack = slow_path(state, b, h, i)
        assert path.epsilon[b, h, i].item() == pytest.approx(epsilon, rel=1e-12, abs=1e-12)
        assert path.slack[b, h, i].item() == pytest.approx(slack, rel=1e-12)


def test_blocks_do_not_change_the_output_path(monkeypatch):
    state = random_state(4, kv_heads=2, softmax_dtype=torch.float32, dtype=torch.float16)
    bounds = state.derived(epsilon_statistics.epsilon_bounds)
    whole = compute_query_output(state, bounds)
    monkeypatch.setattr(row_blocks, "__defaults__", (50,))
    parts = compute_query_output(state, bounds)
    for name in ("epsilon", "slack", "tolerance"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_without_slack_separate_keys_and_values_would_fire():
    state = random_state(5, gain=3.0, rows=40, keys=40)
    assert not get_detector("q@o").check(state).fired
    assert get_detector("q@o").check(replaced(state, kv_equal=True)).violations > 50


def test_masked_keys_and_values_do_not_enter_the_slack():
    state = random_state(6, mask="padded")
    hidden = torch.zeros(2, 1, 12, 1, dtype=torch.bool)
    hidden[1, :, :4] = True
    bounds = state.derived(epsilon_statistics.epsilon_bounds)
    dirty = replaced(
        state, key=state.key.masked_fill(hidden, math.nan), value=state.value.masked_fill(hidden, math.inf)
    )
    clean, other = (compute_query_output(each, bounds) for each in (state, dirty))
    for name in ("epsilon", "slack", "tolerance"):
        one, two = getattr(clean, name)[bounds.checked], getattr(other, name)[bounds.checked]
        assert torch.equal(one, two), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_bias_or_cap": True}, "the logits have a bias or soft cap"),
        ({"has_bias_or_cap": None}, "it is not known whether"),
        ({"value": torch.zeros(2, 4, 12, 6), "out": torch.zeros(2, 4, 12, 6)}, "16 channels and values 6"),
        ({"logits": torch.zeros(2, 4, 12, 13), "weights": torch.zeros(2, 4, 12, 13), "visible": None}, "sinks"),
    ],
)
def test_the_output_path_says_where_it_does_not_apply(changes, reason):
    state = replaced(random_state(), **changes)
    for name in ("q@o", "comb"):
        verdict = get_detector(name).check(state)
        assert not verdict.applicable
        assert not verdict.fired
        assert verdict.rows_checked == 0
        assert reason in verdict.reason
    assert get_detector("s@w").check(state).applicable
    with pytest.raises(ValueError, match="q@o does not apply"):
        compute_query_output(state, state.derived(epsilon_statistics.epsilon_bounds))


def test_the_output_path_does_not_apply_to_reduced_precision_products():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "reduced precision" in get_detector("q@o").check(random_state()).reason
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------- what they see


def test_a_planted_weight_fault_is_seen_where_it_is():
    state = random_state()
    fault = replaced(state, weights=poked(state.weights, (1, 2, 7, 3), 64.0))
    verdict = get_detector("s@w").check(fault)
    assert (verdict.violations, verdict.nonfinite, verdict.positions) == (1, 0, ((1, 2, 7),))
    assert verdict.largest_ratio > 1
    assert verdict.smallest_margin < 0
    assert verdict.rows_checked == 96


def test_a_fault_in_scores_is_invisible_online_and_visible_to_the_oracle():
    state = random_state(gain=0.5)
    oracle = get_detector("oracle_s@w")
    baseline = oracle.reduce(state)
    scores = poked(state.scores, (0, 1, 8, 2), 1e6)
    logits = (scores * state.scaling).masked_fill(~state.visible, torch.finfo(torch.float32).min)
    weights = torch.softmax(logits, -1)
    fault = replaced(state, scores=scores, logits=logits, weights=weights, out=weights @ state.value)
    assert not get_detector("s@w").check(fault).fired
    assert get_detector("s@w").check(fault).rows_checked == 96
    # Against the fault-free bounds: the fault makes the row one-hot, its epsilon 0.
    assert oracle.check(fault, baseline).positions == ((0, 1, 8),)


def test_an_output_fault_is_seen_through_the_query_only():
    state = random_state(kv_equal=True)
    fault = replaced(state, out=poked(state.out, (0, 3, 11, 5), 1e4))
    assert not get_detector("s@w").check(fault).fired
    for name in ("q@o", "comb"):
        assert get_detector(name).check(fault).positions == ((0, 3, 11),)
    for name in ("oracle_q@o", "oracle_comb"):
        detector = get_detector(name)
        assert detector.check(fault, detector.reduce(state)).positions == ((0, 3, 11),)
    oracle = get_detector("oracle_s@w")
    assert not oracle.check(fault, oracle.reduce(state)).fired


def test_comb_is_the_union_of_both_paths():
    state = random_state(kv_equal=True)
    weights = poked(state.weights, (0, 0, 5, 1), 64.0)
    fault = replaced(state, weights=weights, out=poked(state.out, (1, 1, 6, 0), -1e4))
    weights_only, output_only, both = (get_detector(name).check(fault) for name in ("s@w", "q@o", "comb"))
    assert weights_only.positions == ((0, 0, 5),)
    assert (1, 1, 6) in output_only.positions
    assert set(both.positions) == set(weights_only.positions) | set(output_only.positions)
    assert both.largest_ratio == max(weights_only.largest_ratio, output_only.largest_ratio)
    assert both.smallest_margin == min(weights_only.smallest_margin, output_only.smallest_margin)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("location", ["query", "key", "value", "scores", "weights", "out"])
def test_nonfinite_values_fire(location, value):
    state = random_state(kv_equal=False)
    index = (1, 2, 7, 3)
    tensors = {"query": state.query, "key": state.key, "value": state.value}
    if location in tensors:
        tensors[location] = poked(tensors[location], index, value)
        fault = attend(**tensors, visible=state.visible)
    elif location == "weights":
        weights = poked(state.weights, index, value)
        fault = attend(**tensors, visible=state.visible, weights=weights)
    elif location == "scores":
        scores = poked(state.scores, index, value)
        logits = (scores * state.scaling).masked_fill(~state.visible, torch.finfo(torch.float32).min)
        weights = torch.softmax(logits, -1)
        fault = replaced(state, scores=scores, logits=logits, weights=weights, out=weights @ state.value)
    else:
        fault = replaced(state, out=poked(state.out, index, value))
    finite = get_detector("finite").check(fault)
    assert finite.fired
    assert finite.nonfinite == finite.violations
    assert location in finite.detail
    assert get_detector("q@o").check(fault).nonfinite > 0
    assert get_detector("comb").check(fault).nonfinite > 0
    assert get_detector("s@w").check(fault).fired is (location not in ("value", "out"))


def test_finite_reads_visible_scores_only_but_all_weights():
    state = random_state(mask="causal")
    hidden, seen = (0, 0, 2, 9), (0, 0, 9, 2)
    detector = get_detector("finite")
    assert not detector.check(replaced(state, scores=poked(state.scores, hidden, math.inf))).fired
    assert not detector.check(replaced(state, logits=poked(state.logits, hidden, math.nan))).fired
    verdict = detector.check(replaced(state, scores=poked(state.scores, seen, math.inf)))
    assert (verdict.positions, verdict.detail) == (((0, 0, 9),), "scores: 1 row")
    assert detector.check(replaced(state, weights=poked(state.weights, hidden, math.nan))).fired
    assert detector.check(replaced(state, scores=None)).rows_checked == 5 * 96 + 96


def test_finite_skips_weights_and_output_of_rows_without_a_visible_key():
    state = random_state(mask="padded")
    unseen = ~state.visible.any(-1).expand(2, 4, 12)
    assert unseen.any()
    nan = {name: getattr(state, name).masked_fill(unseen[..., None], math.nan) for name in ("weights", "out")}
    verdict = get_detector("finite").check(replaced(state, **nan))
    assert not verdict.fired
    assert verdict.rows_checked == 5 * 96 + 2 * int((~unseen).sum())
    for name in ("s@w", "q@o", "comb"):
        assert not get_detector(name).check(replaced(state, **nan)).fired


def test_positions_are_limited_but_counts_are_complete():
    state = random_state()
    verdict = get_detector("finite").check(replaced(state, out=torch.full_like(state.out, math.nan)))
    assert verdict.violations == 96
    assert len(verdict.positions) == MAX_POSITIONS


def test_the_detectors_tolerance_adds_to_the_proved_one():
    state = random_state()
    fault = replaced(state, weights=poked(state.weights, (0, 0, 7, 3), 8.0))
    assert get_detector("s@w").check(fault).fired
    margin = -get_detector("s@w").check(fault).smallest_margin
    assert get_detector("s@w", tolerance=0.9 * margin).check(fault).fired
    assert not get_detector("s@w", tolerance=1.1 * margin).check(fault).fired


# ------------------------------------------------------------------------------------------- the interface


def test_statistics_are_computed_once_for_all_detectors(monkeypatch):
    calls = []
    for module_name in ("compute_attention_bounds", "compute_query_output"):
        original = getattr(epsilon_statistics, module_name)
        spy = lambda *a, _f=original, _n=module_name, **k: calls.append(_n) or _f(*a, **k)  # noqa: E731
        monkeypatch.setattr(epsilon_statistics, module_name, spy)
    state = random_state()
    for name in ONLINE + ORACLES:
        detector = get_detector(name)
        detector.check(state, detector.reduce(state))
    assert sorted(calls) == ["compute_attention_bounds", "compute_query_output"]


def test_a_state_keeps_no_reference_cycle_that_would_hold_its_tensors():
    import gc
    import weakref

    gc.disable()
    try:
        state = random_state()
        for name in ONLINE + ORACLES:
            detector = get_detector(name)
            detector.check(state, detector.reduce(state))
        alive = weakref.ref(state)
        del state
        assert alive() is None
    finally:
        gc.enable()


def test_every_registered_detector_describes_itself():
    assert set(ONLINE + ORACLES) <= set(list_detectors())
    for name in list_detectors():
        detector = get_detector(name)
        assert detector.name == name
        states = dataclasses.fields(AttentionState) + dataclasses.fields(FusedState)
        assert detector.needs <= {field.name for field in states}
        assert detector.statement
        assert detector.cost
        assert detector.oracle is name.startswith("oracle_")


def test_F4_covers_operands_that_a_product_reads_as_zero():
    # A bfloat16 product on x86 reads subnormal numbers as zero; where it does not, nothing is shown.
    tiny = torch.full((2, 4, 12, 64), 1e-40, dtype=torch.bfloat16)
    huge = torch.full((2, 4, 12, 64), 1e30, dtype=torch.bfloat16)
    for query, key, value in ((tiny, huge, huge), (huge, tiny, tiny), (tiny, huge, tiny)):
        verdict = get_detector("q@o").check(attend(query, key, value, mask_of("causal", 12, 12)))
        assert verdict.applicable
        assert verdict.violations == 0, verdict


def test_oracles_need_a_matching_baseline_and_others_take_none():
    state, oracle = random_state(), get_detector("oracle_comb")
    with pytest.raises(ValueError, match=r"oracle_comb: baseline: got None, allowed what reduce\(\) returned"):
        oracle.check(state)
    with pytest.raises(ValueError, match="allowed EpsilonBaseline"):
        oracle.check(state, 3)
    with pytest.raises(ValueError, match=r"baseline: got rows \(2, 4, 5\), but this call has \(2, 4, 12\)"):
        oracle.check(state, oracle.reduce(random_state(rows=5)))
    with pytest.raises(ValueError, match="s@w: baseline: got one, allowed None"):
        get_detector("s@w").check(state, oracle.reduce(state))
    without = oracle.reduce(random_state(kv_equal=False, rows=12))
    with pytest.raises(ValueError, match="T6 did not apply to the fault-free pass"):
        oracle.check(state, dataclasses.replace(without, output=None))


def test_unknown_detectors_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"detector: got 'orcale_comb', allowed .*did you mean 'oracle_comb'\?"):
        get_detector("orcale_comb")
    with pytest.raises(ValueError, match="tolerance: got -1"):
        get_detector("s@w", tolerance=-1)


@pytest.fixture
def _registry():
    with registrations_undone():
        yield


def test_the_table_of_detectors_says_what_every_module_registers():
    for module, costs in registry.BUILT_IN.items():
        importlib.import_module(module)
        assert costs == {name: it.cost for name, it in registry._CLASSES.items() if it.__module__ == module}


@pytest.mark.usefixtures("_registry")
def test_a_new_detector_is_registered_once_and_says_what_it_misses():
    @register_detector
    class HiddenDetector(Detector):
        name, needs, statement, cost = "hidden", frozenset({"projected", "scores"}), "nothing", "1"

        def judge(self, state: AttentionState, baseline: Any) -> Verdict:
            return Verdict(self.name, rows_checked=1)

    detector = get_detector("hidden")
    state = random_state()
    assert "it reads projected, which" in detector.check(state).reason
    assert detector.check(replaced(state, projected={})).rows_checked == 1
    with pytest.raises(ValueError, match=r"the name 'hidden' is taken by .*HiddenDetector"):
        register_detector(HiddenDetector)
    with pytest.raises(ValueError, match="exactly the oracles' names start with 'oracle_'"):
        register_detector(type("Wrong", (HiddenDetector,), {"name": "oracle_hidden"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 12, 16)}, r"query: got shape \(2, 12, 16\), allowed four axes"),
        ({"weights": torch.zeros(2, 4, 12, 5)}, r"weights: got shape \(2, 4, 12, 5\), allowed \(2, 4, 12, 12\)"),
        ({"out": torch.zeros(2, 4, 11, 16)}, r"out: got shape \(2, 4, 11, 16\)"),
        ({"key": torch.zeros(2, 3, 12, 16)}, r"key: got shape .* a number of heads that divides 4"),
        ({"value": torch.zeros(2, 4, 9, 16)}, r"value: got shape \(2, 4, 9, 16\)"),
        ({"visible": torch.zeros(12, 12)}, r"visible: got dtype torch\.float32, allowed bool"),
    ],
)
def test_tensors_that_cannot_belong_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replaced(random_state(), **changes)


def test_bounds_of_a_state_are_those_of_the_plain_function():
    state = random_state()
    direct = compute_attention_bounds(state.logits, state.weights, 16, state.visible)
    assert torch.equal(direct.tolerance, state.derived(epsilon_statistics.epsilon_bounds).tolerance)
