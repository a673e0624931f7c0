"""Detectors of fused kernels, on PyTorch's own flash kernel for the CPU and on an oracle in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attention_states import DTYPES, flipped, mask_of, poked, random_state

from bounds import get_detector
from bounds.fused.fused_attention import fused_attention, sum_columns, sum_of_columns
from bounds.fused.fused_detectors import FusedHull, FusedKeyValue, FusedNorm, FusedSum, LseBounds, LseKey
from bounds.fused.fused_statistics import (
    _EXP_ERROR,
    kernel,
    key_value,
    lse_bounds,
    lse_key,
    output_hull,
    output_norm,
    output_sum,
)
from bounds.softmax.softmax_detectors import WeightElements, WeightSum

ALL = (LseBounds, LseKey, FusedNorm, FusedHull, FusedSum, FusedKeyValue)
MASKS = ["all", "causal", "window", "padded"]


def call(seed=0, *, dtype=torch.float32, rows=24, keys=24, channels=16, mask="causal", gain=1.0, **options):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query = (draw(2, 4, rows, channels) * gain).to(dtype)
    key = draw(2, 2, keys, channels).to(dtype)
    value = key if options.get("kv_equal") else (draw(2, 2, keys, options.pop("values", channels)) + 0.5).to(dtype)
    visible = mask_of(mask, rows, keys) if mask in ("window", "padded") else None
    return fused_attention(query, key, value, causal=mask == "causal", visible=visible, **options)


def exact(state):
    """lse, weights and output of the stored operands, float64."""
    query, key, value = state.query.double(), state.key.double(), state.value.double()
    logits = state.scaling * query @ state.per_query_head(key).mT
    rows, keys = logits.shape[-2:]
    visible = torch.ones(rows, keys, dtype=torch.bool).tril() if state.causal else state.visible
    if visible is not None:
        logits = logits.masked_fill(~visible, -math.inf)
    weights = torch.softmax(logits, -1)
    return torch.logsumexp(logits, -1), weights, weights @ state.per_query_head(value), logits


def changed(state, **tensors):
    return dataclasses.replace(state, **tensors)


def fired(state):
    return {detector.name for detector in ALL if detector().check(state).fired}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_no_correct_call_raises_an_alarm(mask, dtype):
    for rows, channels in ((1, 16), (2, 64), (3, 16), (17, 128), (70, 40), (300, 32)):
        for gain in (1e-3, 1.0, 50.0):
            for equal in (False, True):
                state = call(rows, dtype=dtype, rows=rows, keys=rows, channels=channels, mask=mask, gain=gain,
                             kv_equal=equal)  # fmt: skip
                for detector in ALL:
                    verdict = detector().check(state)
                    assert verdict.applicable == (equal or detector is not FusedKeyValue)
                    assert not verdict.fired, (detector.name, rows, channels, gain, verdict)
                    assert not verdict.applicable or verdict.rows_checked > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["all", "causal"])
def test_no_alarm_on_a_thousand_keys_and_several_blocks(mask, dtype):
    state = call(1, dtype=dtype, rows=1024, keys=1024, channels=64, mask=mask, kv_equal=True)
    assert not fired(state)
    wide = call(1, dtype=dtype, rows=600, keys=1024, mask="all", gain=4.0)
    assert not fired(wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_alarm_on_adversarial_rows(dtype):
    largest = 60.0 if dtype == torch.float16 else 1e8
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 2, 40, 16, generator=generator)
    operands = {
        "ties": (torch.zeros_like(base), base, base),
        "all keys equal": (base, base[:, :, :1].expand_as(base), base),
        "huge": (base * largest, base * largest, base * largest),
        "tiny": (base * 1e-7, base * 1e-7, base * 1e-7),
        "subnormal": (base * 1e-40, base, base * 1e-40),
        "zeros": (base * 0, base * 0, base * 0),
        "far from zero": (base, base, base * 1e-3 + 100.0),
    }
    for name, (query, key, value) in operands.items():
        for equal in (False, True):
            values = key if equal else value
            tensors = (query.to(dtype), key.to(dtype), values.to(dtype).contiguous())
            state = fused_attention(*tensors, causal=True, kv_equal=equal)
            assert bool(torch.isfinite(state.out).all())
            assert not fired(state), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_the_kernel_computes_attention_and_its_padding_changes_nothing(mask, dtype):
    for channels, values in ((16, 16), (16, 40), (33, 7)):
        state = call(3, dtype=dtype, channels=channels, values=values, mask=mask)
        lse, _, out, _ = exact(state)
        seen = torch.isfinite(lse)
        unit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        assert torch.allclose(state.lse.double()[seen], lse[seen], atol=1e-3 if unit > 1e-5 else unit)
        assert torch.allclose(state.out.double()[seen], out[seen], atol=unit, rtol=unit)
        assert state.scaling == channels**-0.5
        plain = call(3, dtype=dtype, channels=channels, values=values, mask=mask, augment=False)
        assert torch.allclose(state.out, plain.out, atol=unit)
        assert plain.appended is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T10_T11_T12_T14_hold_in_real_numbers(dtype):
    """The residuals of an exact evaluation are not positive, whatever the tolerance."""
    for gain in (0.0, 0.1, 1.0, 20.0):
        for mask in MASKS:
            state = call(2, dtype=dtype, gain=gain, mask=mask, kv_equal=True)
            lse, _, out, logits = exact(state)
            ideal = changed(state, lse=lse, out=out)
            for check in (lse_bounds(ideal), lse_key(ideal), output_norm(ideal), output_hull(ideal), key_value(ideal)):
                seen = check.checked.expand(check.residual.shape)
                # Ties sit on the bounds: float64 leaves them by its own rounding.
                assert float(check.residual[seen].max()) <= 1e-9
            chosen = torch.arange(24).expand(lse.shape)
            if state.visible is not None:
                chosen = 23 - torch.isfinite(logits).flip(-1).int().argmax(-1)
            last = logits.gather(-1, chosen.unsqueeze(-1))[..., 0]
            found = lse_key(ideal).residual
            assert torch.allclose(found[torch.isfinite(lse)], (last - lse)[torch.isfinite(lse)], atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_F17_bounds_the_error_of_lse_and_the_fast_exponential(dtype):
    """Two logits, the smaller at every distance: lse - max = ln(1 + (S - 1) e^-delta)."""
    keys = 512
    query = torch.zeros(1, 1, 2000, 16, dtype=dtype)
    query[..., 0] = torch.linspace(0.01, 8, 2000).to(dtype)
    key = torch.zeros(1, 1, keys, 16, dtype=dtype)
    key[:, :, 1:, 0] = -1
    constructed = 0.0
    for alpha in (0.05, 0.2117, 0.5013, 0.9, 1.0):
        state = fused_attention(query, key, torch.ones_like(key), causal=False, scaling=alpha)
        lse, _, _, logits = exact(state)
        off = (state.lse.double() - lse).abs()
        assert bool((off <= lse_bounds(state).tolerance).all())
        # How good a kernel's exponential is depends on the processor. One that errs by all it may needs most of F17.
        others = (keys - 1) * torch.exp(logits[..., 1] - logits[..., 0])
        off = torch.log1p(others * (1 + _EXP_ERROR[dtype])) - torch.log1p(others)
        assert bool((off <= kernel(state).total).all())
        constructed = max(constructed, float((off / kernel(state).total).max()))
    assert constructed > (0.3 if torch.finfo(dtype).bits == 16 else 0.0), "F17 is wider than the exponential needs"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_F20_split_sums_represent_the_channel_sum(dtype):
    generator = torch.Generator().manual_seed(0)
    value = (torch.randn(1, 1, 50, 96, generator=generator).abs() * 600 + 500).to(dtype)
    columns = sum_columns(value)
    assert bool(torch.isfinite(columns).all()), "the sum of 96 channels would overflow float16"
    total = value.double().sum(-1)
    size = {torch.float64: 2.0**-50, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-23, torch.float16: 2.0**-30}[dtype]
    floor = 128 * 2.0**-25 if dtype == torch.float16 else 0.0
    assert bool(((sum_of_columns(columns, value) - total).abs() <= size * total.abs() + floor).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_F19_needs_the_cast_of_the_exponentials(dtype):
    """511 equal exponentials just above a midpoint of the format, and values that are rounded the same way."""
    keys, unit = 512, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    key = torch.zeros(1, 1, keys, 16, dtype=dtype)
    key[:, :, 1:, 0] = -1
    query = torch.zeros(1, 1, 1, 16, dtype=dtype)
    query[..., 0] = 1
    # One value in every channel: each output is it, times the sum of the weights.
    value = torch.linspace(1.0, 1.99, 16).to(dtype).expand(1, 1, keys, 16).contiguous()
    worst, ratio = 0.0, 0.0
    for step in torch.linspace(0.6, 1.4, 41).tolist():
        alpha = -math.log(0.5 + step * unit / 2)
        state = fused_attention(query, key, value, causal=False, scaling=alpha)
        assert bool((output_hull(state).residual <= 1).all()), "whichever kernel this is"
        # A kernel that casts its exponentials and sums them before the cast:
        p = torch.tensor(math.exp(-alpha), dtype=torch.float64)
        cast = (1 + (keys - 1) * p.to(dtype).double()) / (1 + (keys - 1) * p)
        state = changed(state, out=(cast * value[:, :, :1].double()).to(dtype).expand_as(state.out))
        off = (state.out.double() / value[:, :, :1].double() - 1).abs()
        worst, ratio = max(worst, float(off.max()) / unit), max(ratio, float(output_hull(state).residual.max()))
    assert worst > 1.2, "a tolerance of one storage rounding would have raised an alarm"
    assert 0.5 < ratio <= 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_F20_contains_the_worst_storage_rounding_of_out_and_is_nearly_attained(dtype, sign):
    """Every stored output just above, every column just below what was computed."""
    channels = 4
    spacing = torch.finfo(dtype).eps
    state = call(0, dtype=dtype, channels=channels, rows=1, keys=1)
    value = torch.full_like(state.value, 1 + spacing)
    columns = torch.cat([sum_columns(value), torch.ones_like(value[..., :1])], -1)
    computed = value.double()[:, [0, 0, 1, 1]] - sign * spacing / 2 * 0.999
    assert bool((computed.float().to(dtype).double() - computed).abs().max() <= spacing / 2)
    worst = changed(state, value=value, out=value[:, [0, 0, 1, 1]], appended=columns[:, [0, 0, 1, 1]])
    shift = sum_of_columns(columns[..., :-1], value)[:, [0, 0, 1, 1]] * (1 - sign * spacing / 2 * 0.999)
    residual = (value.double().sum(-1)[:, [0, 0, 1, 1]] - shift).abs()
    check = output_sum(worst)
    assert bool((check.residual <= 1).all())
    allowed = spacing / 2 * (worst.out.double().abs().sum(-1) + shift.abs())
    assert bool((residual <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_change_of_an_output_beyond_twice_F20_is_seen_by_the_sum(dtype):
    state = call(4, dtype=dtype)
    clean = output_sum(state)
    size = float((state.out.double().abs().sum(-1)).max())
    step = {torch.float64: 1e-12, torch.float32: 2e-4, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype] * size
    for index in ((0, 0, 5, 3), (1, 3, 23, 15)):
        wrong = changed(state, out=poked(state.out, index, float(state.out[index]) + step))
        assert FusedSum().check(wrong).positions == (index[:3],)
    assert bool((clean.residual <= 1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T13_faults_in_the_appended_columns_are_seen(dtype):
    state = call(4, dtype=dtype)
    bits = torch.finfo(dtype).bits
    for column in (0, state.appended.shape[-1] - 1):
        wrong = changed(state, appended=flipped(state.appended, (0, 1, 7, column), bits - 2))
        assert FusedSum().check(wrong).positions == ((0, 1, 7),)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exponent_flips_of_out_are_seen_by_sum_and_hull_and_norm(dtype):
    state = call(5, dtype=dtype, kv_equal=True)
    bits = torch.finfo(dtype).bits
    wrong = changed(state, out=poked(state.out, (0, 1, 7, 3), -1e4))
    assert {"fused_sum", "fused_hull", "fused_norm"} <= fired(wrong)
    flip = changed(state, out=flipped(state.out, (0, 1, 7, 3), bits - 2))
    assert {"fused_sum", "fused_hull"} <= fired(flip)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T10_T11_faults_in_lse_are_seen_beyond_the_bounds(dtype):
    state = call(6, dtype=dtype)
    check = lse_bounds(state)
    row = (1, 2, 9)
    width = float(kernel(state).reach[row]) * 2 + math.log(10) + 2 * float(check.tolerance[row])
    for sign in (1, -1):
        wrong = changed(state, lse=poked(state.lse, row, float(state.lse[row]) + sign * width))
        assert LseBounds().check(wrong).positions == (row,)
        assert LseKey().check(wrong).fired == (sign == -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T10_T11_T14_one_key_determines_lse(dtype):
    """One visible key: lse is its logit, and with K = V it is alpha q.o; nothing but rounding is allowed."""
    state = call(6, dtype=dtype, rows=1, keys=1, kv_equal=True)
    below = changed(state, lse=state.lse - 2.1 * lse_bounds(state).tolerance.to(state.lse.dtype))
    assert LseBounds().check(below).violations == LseKey().check(below).violations == 8
    # Cauchy-Schwarz leaves room above the logit of a key that is not parallel to the query; K = V leaves none.
    for sign in (1, -1):
        wrong = changed(state, lse=state.lse + sign * 2.1 * key_value(state).tolerance.to(state.lse.dtype))
        assert FusedKeyValue().check(wrong).violations == 8


@pytest.mark.parametrize("detector", ALL)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_fire(detector, value):
    state = call(7, kv_equal=True)
    tensor = "lse" if detector in (LseBounds, LseKey) else "out"
    index = (0, 1, 7) if tensor == "lse" else (0, 1, 7, 3)
    wrong = changed(state, **{tensor: poked(getattr(state, tensor), index, value)})
    if not (detector is LseKey and value == math.inf):
        assert detector().check(wrong).positions == ((0, 1, 7),)


@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_T9_an_operand_that_was_wrong_before_the_kernel_is_seen_by_none(operand):
    state = call(8)
    tensors = {name: getattr(state, name) for name in ("query", "key", "value")}
    tensors[operand] = poked(tensors[operand], (0, 1, 5, 3), 40.0)
    wrong = fused_attention(tensors["query"], tensors["key"], tensors["value"], causal=True)
    assert not torch.equal(wrong.out, state.out)
    assert not fired(wrong)


def test_T14_a_key_that_differs_from_its_value_is_seen_where_they_must_be_equal():
    state = call(9, kv_equal=True)
    key = poked(state.key, (0, 1, 3, 3), 400.0)
    wrong = fused_attention(state.query, key, state.value, causal=True, kv_equal=True)
    assert fired(wrong) == {"fused_kv"}


def test_each_kind_of_detector_names_what_the_other_kind_of_state_does_not_carry():
    eager, state = random_state(0), call(0)
    for detector in ALL:
        assert "lse, which this state does not carry" in str(detector().check(eager).reason)
        detector().derive(eager)
    assert "it reads appended" in str(FusedSum().check(call(0, augment=False)).reason)
    for detector in (WeightSum(), WeightElements(), get_detector("s@w"), get_detector("finite")):
        assert "which this state does not carry" in str(detector.check(state).reason)
    with pytest.raises(ValueError, match="appended: got None"):
        output_sum(call(0, augment=False))


def test_reduced_precision_is_refused():
    state = call(0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert "reduced precision" in str(LseBounds().check(state).reason)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(1, 2, 3, 5)}, "key: got shape .* which does not fit"),
        ({"key": torch.zeros(1, 3, 3, 4)}, "key: got shape .* which does not fit"),
        ({"value": torch.zeros(1, 2, 4, 4)}, "value: got shape"),
        ({"value": torch.zeros(1, 2, 3, 4).half()}, "value: got torch.float16"),
        ({"query": torch.zeros(2, 3, 4)}, "allowed four axes"),
        ({"visible": torch.ones(3, 3, dtype=torch.bool)}, "together with causal=True"),
        ({"visible": torch.ones(3, 3), "causal": False}, "visible: got dtype"),
    ],
)
def test_operands_that_do_not_belong_together_are_refused(change, message):
    options = {name: torch.zeros(1, 2, 3, 4) for name in ("query", "key", "value")} | {"causal": True} | change
    with pytest.raises(ValueError, match=message):
        fused_attention(options.pop("query"), options.pop("key"), options.pop("value"), **options)
