"""Sequences judged together, each on its own, and groups of heads as sequences: number for number the whole call's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from attention_states import flipped, poked, random_state, replaced
from hypothesis import given, settings
from hypothesis import strategies as st
from projected_states import states_of
from zoo import ZOO

from bounds import AttentionState, Detector, Verdict, get_detector, list_detectors
from bounds.core.attention_state import ProjectedOperand
from bounds.core.row_check import RowCheck, judged, judged_each
from bounds.core.sequences import by_group, gathered, merged, sequence_of
from bounds.numerics.chain import chain_bounds
from bounds.numerics.fixed_order import folded, inner_products, wide
from bounds.projections.projection_sums import ProjectionTables, row_sums
from bounds.suites import expand

JUDGED = expand(["full", "full-g4", "full-g1", "epsilon", "oracles", "s@w_tight", "W_kl", "S_cs", "O_norm"])
BY_GROUP = tuple(name for name in JUDGED if not name.startswith("P"))
ORIGINS = tuple(name for name in JUDGED if name[:3] in ("rng", "s_s") or name.startswith("P"))
RECORDED = ("detector", "rows_checked", "violations", "nonfinite", "largest_ratio", "smallest_margin", "reason")


def recorded(verdict: Verdict) -> tuple[Any, ...]:
    """What a result table keeps of a verdict; every NaN as one object, so that == finds it equal to itself."""
    values = [getattr(verdict, name) for name in RECORDED]
    told = [*values, *(verdict.tightest or ())]
    return tuple(math.nan if isinstance(value, float) and math.isnan(value) else value for value in told)


def checked(detector: Detector, state: AttentionState, clean: AttentionState) -> Verdict:
    return detector.check(state, detector.reduce(clean) if applies_to(detector, clean) else None)


def checked_each(detector: Detector, state: AttentionState, clean: AttentionState) -> list[Verdict]:
    return detector.check_each(state, detector.reduce(clean) if applies_to(detector, clean) else None)


def applies_to(detector: Detector, clean: AttentionState) -> bool:
    return detector.oracle and detector.applicable(clean) is None


def fresh(state: AttentionState) -> AttentionState:
    return dataclasses.replace(state)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in the layout in which models have them: (B, T, H, d)."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def call(seed: int, **options: Any) -> AttentionState:
    state = random_state(seed, **options)
    return replaced(state, query=strided(state.query), key=strided(state.key), out=strided(state.out))


def faulty(state: AttentionState, number: int) -> AttentionState:
    """The state with one of 28 faults, in its second sequence and its second group of heads, if it has one."""
    names = ("scores", "logits", "weights", "out", "query", "key", "value")
    name, kind = names[number % 7], number // 7 % 4
    tensor, groups = getattr(state, name), state.key.shape[1]
    head = min(1, groups - 1) * (tensor.shape[1] // groups)
    index = (1, head, tensor.shape[2] - 1, number % min(tensor.shape[2:]))
    if kind < 2:
        changed = flipped(tensor, index, tensor.element_size() * 8 - (2 if kind else 5))
    else:
        changed = poked(tensor, index, math.nan if kind == 2 else math.inf)
    fault = {name: changed}
    if name == "weights" and state.mass is state.weights:
        fault["mass"] = changed
    return replaced(state, **fault)


OPTIONS = [
    {"rows": 16, "keys": 16, "kv_heads": 4, "mask": "causal"},
    {"rows": 40, "keys": 40, "kv_heads": 2, "mask": "causal", "channels": 24},
    {"rows": 64, "keys": 64, "kv_heads": 4, "mask": "causal", "channels": 64},
    {"rows": 40, "keys": 40, "kv_heads": 2, "mask": "padded", "heads": 8},
    {"rows": 33, "keys": 35, "kv_heads": 2, "mask": "all", "channels": 5, "cap": 20.0},
    {"rows": 1, "keys": 9, "kv_heads": 4, "mask": "all"},
    {"rows": 5, "keys": 9, "kv_heads": 1, "mask": "all"},
    {"rows": 16, "keys": 16, "kv_heads": 4, "mask": "window", "kv_equal": True},
    {"rows": 16, "keys": 16, "kv_heads": 2, "mask": "causal", "sinks": torch.tensor([0.3, -1.0, 2.0, 0.5])},
]


def assert_groups_agree(detector: Detector, state: AttentionState, clean: AttentionState, fault: Any) -> None:
    whole = checked(detector, fresh(state), fresh(clean))
    parts = checked_each(detector, by_group(fresh(state)), by_group(fresh(clean)))
    assert len(parts) == state.rows[0] * state.key.shape[1]
    assert recorded(merged(*parts)) == recorded(whole), (detector.name, fault)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_the_verdict_on_a_call_is_that_of_its_groups_of_heads_merged(number, dtype):
    clean = call(number, dtype=dtype, **OPTIONS[number])
    for fault in [None, *range(28)]:
        state = clean if fault is None else faulty(clean, fault)
        for name in BY_GROUP:
            assert_groups_agree(get_detector(name), state, clean, fault)


@pytest.mark.parametrize("threads", [1, 2])
def test_neither_the_size_of_a_call_nor_threads_change_that(threads):
    torch.set_num_threads(threads)
    clean = call(9, rows=300, keys=300, kv_heads=2, mask="causal", channels=16)
    state = faulty(clean, 9)
    for name in ("S_row", "S_col", "S_tile", "O_col", "O_elem", "q@o"):
        assert_groups_agree(get_detector(name), state, clean, 9)


def test_the_detectors_of_the_suites_say_whether_groups_of_heads_are_enough():
    assert [name for name in JUDGED if not get_detector(name).per_group] == [n for n in JUDGED if n.startswith("P")]
    assert not any(get_detector(name).per_group for name in expand(["competitors", "fused"]))


def origins(name: str, zoo_model: Any) -> AttentionState:
    model = zoo_model(name)
    return states_of(model, ZOO[name].inputs(model))[0]


def range_fault(state: AttentionState, number: int) -> AttentionState:
    """One value out of range, or in range because the norm's output is none."""
    site = ("query", "key", "value", "scores")[number % 4]
    changed: dict[str, Any] = {site: poked(getattr(state, site), (1, 1, 2, 3), (1e6, math.nan, -math.inf)[number % 3])}
    if number > 3:
        mean = {n: poked(o.hidden, (1, 2, 0), 1e9) for n, o in state.projected.items()}
        changed["projected"] = {
            n: dataclasses.replace(o, hidden=mean[n]) if number % 2 else o for n, o in state.projected.items()
        }
    return replaced(state, **changed)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "qwen3", "opt", "gpt_neox", "t5", "olmo2", "bloom"])
def test_tables_by_head_are_those_of_the_groups_own_heads(name, zoo_model):
    clean = origins(name, zoo_model)
    for detector in (get_detector(detector) for detector in ORIGINS):
        detector.prepare(zoo_model(name))
        for fault in [None, *range(8)]:
            state = clean if fault is None else range_fault(clean, fault)
            if detector.per_group:
                assert_groups_agree(detector, state, clean, fault)
            else:
                whole = [recorded(detector.check(sequence_of(state, number))) for number in range(state.rows[0])]
                assert [recorded(verdict) for verdict in detector.check_each(fresh(state))] == whole, detector.name
    groups = get_detector("P_q")
    groups.prepare(zoo_model(name))
    assert "tables are those of all heads" in str(groups.check(by_group(clean)).reason)


def test_sequences_may_be_rotated_differently(zoo_model):
    clean = origins("qwen3", zoo_model)
    turned = {
        name: dataclasses.replace(o, rotation=tuple(torch.cat([table, 3 * table]) for table in o.rotation))
        for name, o in clean.projected.items()
        if o.rotation is not None
    }
    state = replaced(clean, projected=dict(clean.projected) | turned)
    for name in ("P_q", "P4_k", "P1_q", "rng_q", "rng_k", "s_stat"):
        detector = get_detector(name)
        detector.prepare(zoo_model("qwen3"))
        alone = [recorded(detector.check(sequence_of(state, number))) for number in range(2)]
        assert alone[0] != alone[1]
        assert [recorded(verdict) for verdict in detector.check_each(fresh(state))] == alone
        if detector.per_group:
            assert_groups_agree(detector, state, clean, None)


@pytest.mark.parametrize("width", [37, 768])
def test_checksums_of_projections_have_the_same_bits_alone_and_beside_others(width):
    hidden, weight = torch.randn(3, 40, width), torch.randn(12 * 8, width)
    projected = (hidden @ weight.T).view(3, 40, 12, 8).transpose(1, 2)
    for group in (None, 1):
        tables = ProjectionTables.of(weight, None, heads=12, group=group)
        together = row_sums(ProjectedOperand(hidden, projected), tables)
        for n in range(3):
            alone = row_sums(ProjectedOperand(hidden[n : n + 1], projected[n : n + 1]), tables)
            assert torch.equal(alone.residual[0], together.residual[n])
            assert torch.equal(alone.tolerance[0], together.tolerance[n])


@pytest.mark.parametrize("site", ["query", "scores"])
def test_only_what_exceeds_its_bound_is_judged_once_more(site, zoo_model):
    clean = origins("llama-gqa", zoo_model)
    detector = get_detector({"query": "rng_q", "scores": "s_stat"}[site])
    detector.prepare(zoo_model("llama-gqa"))
    outside = {n: dataclasses.replace(o, hidden=poked(o.hidden, (1, 2, 0), 1e9)) for n, o in clean.projected.items()}
    bound = detector.check_rows(clean).tolerance.expand(detector.check_rows(clean).residual.shape)
    # In the row that no norm puts out, one head is above its bound and another just below.
    near = 0.99 * float(bound[1, 0, 2 if site == "scores" else 3])
    changed = poked(poked(getattr(clean, site), (1, 1, 2, 3), 1e6), (1, 0, 2, 3), near)
    state = replaced(clean, projected=outside, **{site: changed})
    assert detector.check(state).largest_ratio == pytest.approx(0.99)
    assert_groups_agree(detector, state, clean, None)


def test_projections_of_one_hidden_state_are_compared_with_the_operands_of_many_sequences(zoo_model):
    one = sequence_of(origins("llama-gqa", zoo_model), 1)
    many = gathered(one, torch.zeros(5, dtype=torch.int64))
    assert [len(o.hidden) for o in many.projected.values()] == [1, 1, 1]
    many = replaced(many, query=poked(many.query, (3, 1, 2, 3), 7.5))
    for name in ("P_q", "P4_q", "P1_q"):
        detector = get_detector(name)
        detector.prepare(zoo_model("llama-gqa"))
        alone = detector.check(replaced(one, query=many.query[3:4]))
        verdicts = detector.check_each(many)
        assert alone.fired
        assert [recorded(verdict) for verdict in verdicts] == [recorded(detector.check(one))] * 3 + [
            recorded(alone),
            recorded(detector.check(one)),
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "kv_heads"), [(16, 4), (40, 2), (64, 2)])
def test_faults_of_one_group_in_a_batch_give_the_verdicts_of_their_own_calls(rows, kv_heads, dtype):
    clean = call(5, rows=rows, keys=rows, kv_heads=kv_heads, dtype=dtype)
    wholes = [faulty(clean, fault) for fault in range(28)]
    number, groups = kv_heads + 1, by_group(clean)
    own = [gathered(by_group(whole), torch.tensor([number])) for whole in wholes]
    names = ("query", "key", "value", "scores", "logits", "weights", "out")
    changed = {name: torch.cat([getattr(part, name) for part in own]) for name in names}
    repeated = gathered(groups, torch.full((28,), number))
    batch = replaced(repeated, **changed, mass=changed["weights"])
    for name in BY_GROUP:
        detector = get_detector(name)
        statistics = detector.reduce(groups) if applies_to(detector, clean) else None
        others = detector.check_each(fresh(groups), statistics)
        del others[number]
        verdicts = detector.check_each(fresh(batch), gathered(statistics, torch.full((28,), number)))
        for fault, verdict in enumerate(verdicts):
            whole = checked(detector, fresh(wholes[fault]), fresh(clean))
            assert recorded(merged(verdict, *others)) == recorded(whole), (name, fault)
            assert verdict.detector == name


class Slow(Detector):
    """A user's detector, which knows nothing of sequences and reads the hidden state."""

    name, needs, statement, cost = "slow", frozenset({"out", "projected"}), "the outputs are small", "d"

    def applicable(self, state: AttentionState) -> str | None:
        return super().applicable(state) or ("it is negative" if float(state.out.sum()) < 0 else None)

    def judge(self, state: AttentionState, baseline: Any) -> Verdict:
        assert state.projected is not None
        hidden = state.projected["q"].hidden
        assert len(hidden) == state.rows[0]
        return Verdict(self.name, state.out.numel(), int((state.out > 1).sum()), largest_ratio=float(hidden.sum()))


def test_detectors_that_know_nothing_of_sequences_are_asked_one_by_one():
    state = call(1)
    hidden = torch.arange(4.0).view(2, 2, 1)
    state = replaced(state, projected={"q": ProjectedOperand(hidden, state.query)})
    expected = [Slow().check(replaced(sequence_of(state, number))) for number in range(2)]
    assert Slow().check_each(state) == expected
    assert [float(v.largest_ratio) for v in expected if v.applicable] or any(v.reason for v in expected)
    groups = by_group(state)
    assert groups.projected["q"].source.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    some = gathered(groups, torch.tensor([5, 2, 2]))
    assert some.projected["q"].hidden is hidden
    assert [float(sequence_of(some, n).projected["q"].hidden.sum()) for n in range(3)] == [5.0, 1.0, 1.0]
    assert Slow().check_each(some) == [Slow().check(sequence_of(some, number)) for number in range(3)]


@pytest.mark.parametrize("name", list_detectors())
def test_each_sequence_is_judged_as_it_is_alone(name):
    clean = call(3, mask="padded", kv_heads=2)
    state, detector = faulty(clean, 9), get_detector(name)
    for number, verdict in enumerate(checked_each(detector, fresh(state), fresh(clean))):
        alone = checked(detector, sequence_of(state, number), sequence_of(clean, number))
        assert recorded(verdict) == recorded(alone)


def test_every_broken_row_of_a_sequence_is_counted():
    state = call(2)
    broken = state.out.clone()
    broken[1, 0, 3:6, 2] = math.nan
    broken[1, 2, 7] = math.inf
    verdicts = get_detector("finite").check_each(replaced(state, out=broken))
    assert [(v.violations, v.nonfinite) for v in verdicts] == [(0, 0), (4, 4)]
    assert merged(*verdicts).rows_checked == get_detector("finite").check(state).rows_checked


def test_an_oracle_must_be_given_its_statistics_and_others_none():
    state, oracle = call(0), get_detector("oracle_comb")
    with pytest.raises(ValueError, match="oracle_comb: baseline: got None"):
        oracle.check_each(state)
    with pytest.raises(ValueError, match="S_row: baseline: got one, allowed None"):
        get_detector("S_row").check_each(state, oracle.reduce(state))
    with pytest.raises(ValueError, match=r"got rows \(8, 1, 12\), but this call has \(2, 4, 12\)"):
        oracle.check_each(state, oracle.reduce(by_group(state)))
    one = by_group(random_state(4, heads=1, kv_heads=1))
    statistics = gathered(oracle.reduce(sequence_of(one, 0)), torch.tensor([0, 0, 0]))
    repeated = gathered(sequence_of(one, 0), torch.tensor([0, 0, 0]))
    assert repeated.rows == (3, 1, 12)
    assert statistics.weights.lower.shape[0] == 1
    assert [v.violations for v in oracle.check_each(repeated, statistics)] == [0, 0, 0]


def test_by_group_views_what_it_can_and_keeps_what_is_shared():
    state = sequence_of(random_state(0, kv_heads=2), 0)
    groups = by_group(state)
    assert groups.query.data_ptr() == state.query.data_ptr()
    assert (groups.rows, groups.key.shape) == ((2, 2, 12), (2, 1, 12, 16))
    assert groups.visible.shape == (1, 1, 12, 12)
    assert groups.mass is groups.weights
    assert by_group(random_state(0, mask="padded", kv_heads=2)).visible.shape == (4, 1, 12, 12)
    by_head = torch.ones(1, 4, 1, 12)
    assert by_group(replaced(random_state(0, kv_heads=2), score_addend=by_head)).score_addend.shape == (4, 2, 1, 12)
    again = by_group(groups)
    assert again.heads.tolist() == [[0, 1], [2, 3]]
    separate = random_state(0, softmax_dtype=torch.float64, kv_heads=2)
    assert by_group(separate).mass is not by_group(separate).weights
    assert torch.equal(by_group(separate).mass.reshape(2, 4, 12, 12), separate.mass)


def test_a_projection_of_other_rows_stays_one_of_other_rows():
    state = call(0)
    cached = replaced(state, projected={"q": ProjectedOperand(torch.zeros(2, 3, 1), state.query[:, :, :3])})
    groups = gathered(by_group(cached), torch.tensor([0, 7]))
    assert groups.projected["q"].projected.shape == (2, 4, 3, 0)
    assert len(sequence_of(groups, 1).projected["q"].projected) == 1


NUMBERS = st.one_of(st.none(), st.floats(width=32))


@given(st.lists(st.tuples(st.integers(0, 3), NUMBERS, NUMBERS, st.booleans()), min_size=1, max_size=5))
def test_merged_adds_counts_and_keeps_what_is_furthest(parts: Sequence[tuple[int, float | None, float | None, bool]]):
    verdicts = [
        Verdict("x", 4, count, count, ((count,),) if count else (), ratio, margin, None if applies else "no")
        for count, ratio, margin, applies in parts
    ]
    found, told = merged(*verdicts), [verdict for verdict in verdicts if verdict.applicable]
    if not told:
        assert found is verdicts[0]
        return
    assert (found.rows_checked, found.violations) == (4 * len(told), sum(verdict.violations for verdict in told))
    assert found.positions == next((verdict.positions for verdict in told if verdict.fired), ())
    for reduce, name in ((torch.max, "largest_ratio"), (torch.min, "smallest_margin")):
        values = [value for verdict in told if (value := getattr(verdict, name)) is not None]
        expected = float(reduce(torch.tensor(values, dtype=torch.float64))) if values else None
        got = getattr(found, name)
        assert got == expected or (math.isnan(got) and math.isnan(expected))


def test_nothing_cannot_be_merged():
    with pytest.raises(ValueError, match="verdicts: got none, allowed at least one"):
        merged()


def test_an_outcome_without_rows_has_no_ratio():
    nothing = RowCheck(torch.zeros(2, 0, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    assert judged("x", nothing) == Verdict("x")
    assert judged_each("x", nothing) == [Verdict("x")] * 2


@settings(max_examples=60)
@given(st.data())
def test_judged_each_is_judged_on_each_sequence(data):
    rows = data.draw(st.integers(1, 4))
    number = st.floats(-2, 2) | st.sampled_from([0.0, math.nan, math.inf])
    numbers = st.lists(number, min_size=3 * rows, max_size=3 * rows)
    draw = lambda: torch.tensor(data.draw(numbers), dtype=torch.float64).view(3, rows)  # noqa: E731
    checked_rows = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    check = RowCheck(draw(), draw().abs(), checked_rows)
    each = judged_each("x", check, allowance=0.5)
    for number, verdict in enumerate(each):
        alone = RowCheck(check.residual[number], check.tolerance[number], checked_rows)
        assert recorded(judged("x", alone, allowance=0.5)) == recorded(verdict)
    assert recorded(merged(*each)) == recorded(judged("x", check, allowance=0.5))


def test_what_can_fire_behind_a_fault():
    silent = {name for name in list_detectors() if not get_detector(name).propagates}
    assert {"S_row", "s@w", "KV", "rng_q", "fused_sum"} <= silent
    assert not silent & {"finite", *expand(["oracles", "competitors"])}
    assert Slow().propagates is False


class Unproved(Slow):
    proved = False


def test_a_detector_without_a_proof_can_fire_behind_a_fault():
    assert Unproved().propagates


# --- sums and products whose bits are their own -------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(16, 5), (33, 70), (256, 256), (1, 9)])
def test_folded_sums_have_the_same_bits_alone_and_beside_others(shape, threads):
    torch.set_num_threads(threads)
    values = torch.randn(7, *shape, dtype=torch.float64)
    together = folded(values)
    for number in range(7):
        assert torch.equal(folded(values[number].clone()), together[number])
        assert torch.equal(folded(values[number].mT.contiguous().mT), together[number])
        assert torch.equal(folded(values[number, :, 1:4]), together[number, 1:4])
    torch.testing.assert_close(together, values.sum(-2), rtol=0, atol=1e-12)
    assert folded(values[:, :0]).tolist() == [[0.0] * shape[1]] * 7


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("lines", "rows", "length"), [(1, 64, 64), (3, 33, 70), (16, 64, 37), (70, 1, 9), (40, 300, 5)]
)
def test_inner_products_have_the_same_bits_alone_and_beside_others(lines, rows, length, turned, threads):
    torch.set_num_threads(threads)
    left, right = torch.randn(3, 2, lines, length).double(), torch.randn(3, 2, rows, length).double()
    given_rows = right.mT.contiguous() if turned else right
    together = inner_products(left, given_rows, turned=turned)
    for b, h in ((0, 0), (2, 1)):
        alone = inner_products(left[b : b + 1, h : h + 1], given_rows[b : b + 1, h : h + 1], turned=turned)
        assert torch.equal(alone[0, 0], together[b, h])
        buffer = torch.empty(given_rows[b, h].numel() + 3, dtype=torch.float64)[3:].view(given_rows[b, h].shape)
        moved = buffer.copy_(given_rows[b, h])[None, None]
        assert torch.equal(inner_products(left[b : b + 1, h : h + 1], moved, turned=turned)[0, 0], together[b, h])
    torch.testing.assert_close(together, left @ right.mT, rtol=0, atol=1e-12)


def test_the_bounds_of_a_row_have_the_same_bits_alone_and_beside_others():
    gamma = torch.rand(1000, dtype=torch.float64) * 20
    n, rest = torch.full((1000,), 9), (gamma + 1, gamma, torch.rand(1000, dtype=torch.float64))
    together = chain_bounds(*rest, torch.zeros(1000, dtype=torch.float64), n)
    for start, stop in ((0, 1), (3, 10), (990, 1000)):
        alone = chain_bounds(*(value[start:stop] for value in rest), torch.zeros(stop - start).double(), n[start:stop])
        assert all(torch.equal(one, other[start:stop]) for one, other in zip(alone, together, strict=True))


def test_wide_rows_lie_side_by_side():
    tensor = torch.randn(3, 4, 5)
    assert wide(tensor.mT).stride(-1) == 1
    assert torch.equal(wide(tensor.mT), tensor.mT.double())
    assert wide(tensor.double().transpose(0, 1)).stride(-1) == 1
