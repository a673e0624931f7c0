"""Checksums of the projections: exact against an oracle, silent on every architecture, blind to what is not theirs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from attention_states import DTYPES, flipped, poked, random_state, replaced
from hypothesis import given, settings
from hypothesis import strategies as st
from projected_states import states_of
from torch import Tensor, nn
from zoo import ZOO

import bounds.projections.projection_detectors
from bounds import AttentionState, get_detector
from bounds.core.attention_state import ProjectedOperand
from bounds.core.row_check import RowCheck, judged
from bounds.projections.projection_sums import ProjectionTables, WideHidden, row_sums, tail_check, worst
from fault_injection.operands.finding import operand_sources
from fault_injection.operands.operand_tails import RotaryLayout, Tail

ON = {"q": "query", "k": "key", "v": "value"}
HEADS = [f"P_{operand}" for operand in ON]
GROUPS = [f"P4_{operand}" for operand in ON]


def projection(
    dtype: torch.dtype, *, depth: int = 96, heads: int = 3, channels: int = 10, bias: bool = True, gain: float = 1.0
) -> tuple[ProjectedOperand, Tensor, Tensor | None]:
    """A linear layer of PyTorch on random data of one format: operand, weight and bias."""
    generator = torch.Generator().manual_seed(depth + channels)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden = (draw(2, 7, depth) * gain).to(dtype)
    weight = (draw(heads * channels, depth) / depth**0.5).to(dtype)
    vector = draw(heads * channels).to(dtype) if bias else None
    out = nn.functional.linear(hidden, weight, vector).view(2, 7, heads, channels).transpose(1, 2)
    return ProjectedOperand(hidden, out), weight, vector


def fires(check: RowCheck) -> Tensor:
    return ~(check.residual <= check.tolerance) | ~torch.isfinite(check.tolerance)


# --- F15: the checksum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [None, 4, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_F15_residual_and_tolerance_against_an_oracle(dtype: torch.dtype, group: int | None, bias: bool) -> None:
    operand, weight, vector = projection(dtype, bias=bias)
    check = row_sums(operand, ProjectionTables.of(weight, vector, 3, group))
    x, w = operand.hidden.double().numpy(), weight.double().numpy().reshape(3, 10, -1)
    b = np.zeros((3, 10)) if vector is None else vector.double().numpy().reshape(3, 10)
    out = operand.projected.double().numpy()
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    stored = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    starts = range(0, 10, group or 10)
    for place, start in enumerate(starts):
        part = slice(start, start + (group or 10))
        exact = np.einsum("btd,hd->bht", x, w[:, part].sum(1)) + b[:, part].sum(1)[None, :, None]
        found = out[..., part].sum(-1)
        # The least that F15 may allow: the exact magnitudes, which the norms of the implementation only enlarge.
        magnitude = np.einsum("btd,hd->bht", abs(x), abs(w[:, part]).sum(1)) + abs(b[:, part]).sum(1)[None, :, None]
        # In float64 the checker's own sums (96 products, and twice 10 channels) round as coarsely as the projection.
        roundings = 98 + (116 if dtype == torch.float64 else 0)
        least = roundings * unit * magnitude + stored * abs(out[..., part]).sum(-1)
        residual = check.residual if group is None else check.residual[..., place]
        tolerance = check.tolerance if group is None else check.tolerance[..., place]
        np.testing.assert_allclose(residual.numpy(), abs(found - exact), atol=1e-12)
        assert (tolerance.numpy() >= least).all()
        assert (tolerance.numpy() <= 3 * least + 1e-6).all()
    assert check.residual.shape == ((2, 3, 7) if group is None else (2, 3, 7, len(starts)))
    assert not fires(check).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [1e-30, 1e-6, 1.0, 1e3])
@pytest.mark.parametrize("depth", [1, 2, 768])
def test_F15_no_correct_projection_fires(dtype: torch.dtype, gain: float, depth: int) -> None:
    for contiguous, bias in ((True, True), (False, True), (True, False)):
        operand, weight, vector = projection(dtype, depth=depth, gain=gain, bias=bias)
        if not contiguous:
            hidden = operand.hidden.mT.contiguous().mT
            out = nn.functional.linear(hidden, weight, vector).view(2, 7, 3, 10).transpose(1, 2)
            operand = ProjectedOperand(hidden, out)
        for group in (None, 4):
            assert not fires(row_sums(operand, ProjectionTables.of(weight, vector, 3, group))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_F15_contains_the_worst_rounding_and_is_nearly_attained(dtype: torch.dtype, apart: bool) -> None:
    """Every product just above the middle between two numbers: all roundings go the same way."""
    half = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    weight = torch.tensor([1.0, half * (1 + 4 * half)], dtype=torch.float64).to(dtype).repeat(8, 1)
    hidden = torch.ones(1, 1, 2, dtype=dtype)
    bias = torch.full((8,), -1.0, dtype=dtype) if apart else None
    product = (hidden @ weight.T).to(dtype)
    out = (product if bias is None else product + bias).view(1, 1, 2, 4).transpose(1, 2)
    check = row_sums(ProjectedOperand(hidden, out), ProjectionTables.of(weight, bias, 2, bias_apart=apart))
    ratio = float((check.residual / check.tolerance).max())
    assert 0.9 < ratio <= 1


def test_F15_a_bias_that_is_added_apart_needs_the_second_rounding() -> None:
    half = 2.0**-8
    weight = torch.tensor([[1.0, half * (1 + 4 * half)]], dtype=torch.float64).to(torch.bfloat16)
    hidden, bias = torch.ones(1, 1, 2, dtype=torch.bfloat16), torch.tensor([-1.0 + 2 * half], dtype=torch.bfloat16)
    out = (hidden @ weight.T + bias).view(1, 1, 1, 1)
    checks = [
        row_sums(ProjectedOperand(hidden, out), ProjectionTables.of(weight, bias, 1, bias_apart=apart))
        for apart in (False, True)
    ]
    assert [bool(fires(check).any()) for check in checks] == [True, False]


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([None, 4]),
    index=st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 6), st.integers(0, 9)),
    times=st.floats(2.1, 1e6),
    sign=st.sampled_from([-1, 1]),
)
def test_F15_a_change_above_twice_the_tolerance_is_always_seen(
    dtype: torch.dtype, group: int | None, index: tuple[int, ...], times: float, sign: int
) -> None:
    operand, weight, vector = projection(dtype)
    tables = ProjectionTables.of(weight, vector, 3, group)
    tolerance = row_sums(operand, tables).tolerance
    row = index[:3] if group is None else (*index[:3], index[3] // 4)
    before = float(operand.projected[index])
    changed = poked(operand.projected, index, before + sign * times * float(tolerance[row]))
    # The change as it is stored; storing rounds it, and the tolerance of a half format grows with it.
    if abs(float(changed[index]) - before) * (1 - 2.0**-7) > 2 * float(tolerance[row]):
        found = fires(row_sums(dataclasses.replace(operand, projected=changed), tables))
        assert bool(found[row])
        assert int(found.sum()) == 1


def test_features_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="heads: got 3, allowed a divisor of the 8 features"):
        ProjectionTables.of(torch.ones(8, 4), None, 3)


def test_the_float64_copy_is_shared() -> None:
    wide, hidden = WideHidden(), torch.randn(1, 3, 4)
    assert wide.of(hidden)[0] is wide.of(hidden.view(1, 3, 4))[0]
    assert wide.of(hidden)[0] is not wide.of(hidden.clone())[0]
    torch.testing.assert_close(wide.of(hidden)[1], hidden.double().norm(dim=-1))


# --- F16: the tail -------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    group=st.sampled_from([None, 4]),
    index=st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 6), st.integers(0, 9)),
    times=st.floats(2.1, 1e6),
)
def test_F16_a_change_above_twice_the_tolerance_is_always_seen(
    dtype: torch.dtype, group: int | None, index: tuple[int, ...], times: float
) -> None:
    operand, _, _ = projection(dtype)
    angles = torch.linspace(0.5, 8, 21, dtype=torch.float64).view(1, 7, 3)
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    operand = dataclasses.replace(operand, rotation=rotation)
    tail = Tail(rotation=RotaryLayout(4, 6, False, "single"))
    expected = tail.expected(operand.projected, rotation, dtype)
    read = operand.projected.clone()
    x, y = read[..., 4:7].clone(), read[..., 7:].clone()
    cos, sin = (table[:, None] for table in rotation)
    read[..., 4:7], read[..., 7:] = x * cos - y * sin, y * cos + x * sin
    clean = tail_check(tail, operand, read, group)
    assert not fires(clean).any()
    assert clean.residual.shape == ((2, 3, 7) if group is None else (2, 3, 7, 3))
    changed = poked(read, index, float(read[index]) + times * float(expected.tolerance[index]))
    found = fires(tail_check(tail, operand, changed, group))
    moved = abs(float(changed[index]) - float(read[index])) > 2 * float(expected.tolerance[index])
    assert bool(found.any()) == moved
    if moved:
        assert found.nonzero().tolist() == [list(index[:3] if group is None else (*index[:3], index[3] // 4))]


def test_F16_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    operand, _, _ = projection(torch.float32)
    tail = Tail(factor=0.25)
    read = operand.projected * 0.25
    whole = tail_check(tail, operand, read)
    blocks = bounds.projections.projection_sums.row_blocks
    monkeypatch.setattr(bounds.projections.projection_sums, "row_blocks", lambda shape, width: blocks(shape, width, 60))
    parts = tail_check(tail, operand, read)
    assert torch.equal(whole.residual, parts.residual)
    assert torch.equal(whole.tolerance, parts.tolerance)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("first", [(0.5, 1), (3, 1), (NAN, 1), (1, INF), (0, 0), (1, NAN)])
@pytest.mark.parametrize("second", [(0.5, 1), (4, 1), (NAN, 1), (1, INF), (0, 0), (1, NAN)])
@pytest.mark.parametrize("allowance", [0.0, 2.5])
def test_the_worse_of_two_checks_fires_where_either_does(
    first: tuple[float, float], second: tuple[float, float], allowance: float
) -> None:
    checks = [RowCheck(*(torch.tensor([float(n)], dtype=torch.float64) for n in pair)) for pair in (first, second)]
    either = any(judged("x", check, allowance=allowance).fired for check in checks)
    assert judged("x", worst(*checks), allowance=allowance).fired == either


# --- the detectors on real models ----------------------------------------------------------------------------------


def prepared(names: list[str], model: nn.Module) -> list[Any]:
    detectors = [get_detector(name) for name in names]
    for detector in detectors:
        detector.prepare(model)
    return detectors


class Flip:
    """Flips a bit of one element of one location, in one layer."""

    layers = frozenset({1})

    def __init__(self, location: str, index: tuple[int, ...], bit: int) -> None:
        self.locations = frozenset({location})
        self.index, self.bit = index, bit

    def on(self, location: str, tensor: Tensor, call: Any) -> Tensor:
        return flipped(tensor, self.index, self.bit)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "opt", "qwen3", "gpt_neox", "falcon-new", "t5", "bloom"])
@pytest.mark.parametrize("location", ["q", "k", "v", "scores", "weights", "out"])
def test_blindness_a_fault_is_seen_by_its_own_projection_only(name: str, location: str, zoo_model: Any) -> None:
    model = zoo_model(name)
    inputs = ZOO[name].inputs(model)
    operand_sources(model, inputs)
    detectors = prepared([*HEADS, *GROUPS], model)
    for bit in (31, 29):
        states = states_of(model, inputs, Flip(location, (1, 1, 2, 3), bit))
        fired = {d.name for state in states[:2] for d in detectors if d.check(state).fired}
        assert fired == ({f"P_{location}", f"P4_{location}"} if location in ON else set())


def test_a_weight_that_changes_after_preparing_is_seen() -> None:
    for name in ("gpt2", "qwen3"):
        model = ZOO[name].build()
        inputs = ZOO[name].inputs(model)
        operand_sources(model, inputs)
        detectors = prepared(HEADS, model)
        core = model.transformer.h[1].attn if name == "gpt2" else model.model.layers[1].self_attn
        weight = core.c_attn.weight if name == "gpt2" else core.q_norm.weight
        with torch.no_grad():
            weight.view(-1)[3] += 0.5
        fired = {(state.layer, d.name) for state in states_of(model, inputs) for d in detectors if d.check(state).fired}
        assert fired == {(1, "P_q")}
        for detector in detectors:
            detector.prepare(model)
        assert not any(d.check(state).fired for state in states_of(model, inputs) for d in detectors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_fires(value: float, zoo_model: Any) -> None:
    model = zoo_model("llama")
    inputs = ZOO["llama"].inputs(model)
    detectors = prepared([*HEADS, *GROUPS], model)
    state = states_of(model, inputs)[0]
    for detector in detectors:
        attribute = ON[detector.operand]
        verdict = detector.check(replaced(state, **{attribute: poked(getattr(state, attribute), (0, 1, 2, 3), value)}))
        assert verdict.fired
        assert verdict.nonfinite == 1


def test_reasons(zoo_model: Any) -> None:
    model = zoo_model("llama")
    state = states_of(model, ZOO["llama"].inputs(model))[0]
    detector = get_detector("P_k")
    assert detector.check(state).reason == "it was not prepared for this model (prepare)"
    detector.prepare(model)
    assert detector.check(state).applicable
    assert state.projected is not None

    def reason(**changes: Any) -> str:
        return str(detector.check(replaced(state, **changes)).reason)

    def with_record(**changes: Any) -> str:
        assert state.projected is not None
        return reason(projected={"k": dataclasses.replace(state.projected["k"], **changes)})

    assert "was not there when it was prepared" in reason(name="elsewhere")
    assert "its keys were not projected in this call" in reason(projected=None)
    assert "its keys were not projected in this call" in reason(projected={"q": state.projected["q"]})
    assert "have 12 rows and their projection 5" in with_record(projected=state.projected["k"].projected[:, :, :5])
    assert "rotation of its keys was not given" in with_record(rotation=None)
    assert "autocast" in with_record(hidden=state.projected["k"].hidden.bfloat16())


def test_a_detector_refuses_rows_it_does_not_apply_to() -> None:
    detector = bounds.projections.projection_detectors.QueryProjection()
    detector._prepared[""] = "no reason"
    with pytest.raises(ValueError, match="P_q: got a call it does not apply to"):
        detector.check_rows(random_state())


def test_allowance_is_added(zoo_model: Any) -> None:
    model = zoo_model("gpt2")
    state: AttentionState = states_of(model, ZOO["gpt2"].inputs(model))[0]
    faulty = replaced(state, query=poked(state.query, (0, 0, 0, 0), float(state.query[0, 0, 0, 0]) + 1))
    for tolerance, fired in ((0.0, True), (2.0, False)):
        detector = get_detector("P_q", tolerance)
        detector.prepare(model)
        assert detector.check(faulty).fired == fired
