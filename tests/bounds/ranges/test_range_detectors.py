"""Bounds from the weights alone: never exceeded by any input, nearly attained by the worst, exceeded by faults."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from attention_states import DTYPES, flipped, poked, random_state, replaced
from projected_states import states_of
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo import ZOO

import bounds.ranges.range_detectors
from bounds import AttentionState, get_detector
from bounds.core.attention_state import ProjectedOperand
from bounds.ranges.range_bounds import MAX_WIDTH, Ellipsoid, OperandRange, reason_without_range, score_bound
from fault_injection.operands.norms import Norm
from fault_injection.operands.operand_source import OperandSource
from fault_injection.operands.operand_tails import RotaryLayout, Tail
from fault_injection.operands.sparse_code import Projection

WIDTH, HEADS, CHANNELS = 48, 2, 6
NORMS = {"layer": nn.LayerNorm, "rms": LlamaRMSNorm, "one plus": GemmaRMSNorm}


def a_norm(kind: str, dtype: torch.dtype, width: int = WIDTH) -> Norm:
    torch.manual_seed(5)
    module = NORMS[kind](width, eps=1e-6).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return Norm(module, width, kind == "layer", 1.0 if kind == "one plus" else 0.0, 1e-6)


def a_source(kind: str, dtype: torch.dtype, seed: int = 0, tail: Tail | None = None, **sizes: int) -> OperandSource:
    heads, channels = sizes.get("heads", HEADS), sizes.get("channels", CHANNELS)
    torch.manual_seed(seed)
    linear = nn.Linear(WIDTH, heads * channels).to(dtype)
    return OperandSource(Projection(linear, torch.arange(heads * channels)), heads, tail or Tail(), a_norm(kind, dtype))


def outputs(source: OperandSource, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the norm and the projection make of x (B, T, D): hidden, and (B, H, T, d)."""
    assert isinstance(source.norm, Norm)
    with torch.no_grad():
        hidden = source.norm.module(x)
        out = source.projection.module(hidden)
    return hidden, out.view(*x.shape[:2], source.heads, -1).transpose(1, 2)


def worst_inputs(source: OperandSource, dtype: torch.dtype) -> Tensor:
    """Inputs whose normalised vectors point along the rows of W g, both ways: Cauchy-Schwarz is an equality there."""
    assert isinstance(source.norm, Norm)
    rows = source.projection.weight().double() * source.norm.gain()
    return torch.cat([rows, -rows]).unsqueeze(0).mul(30).to(dtype)


def varied_inputs(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 40, WIDTH, generator=generator)
    x[0] *= 1e-4
    x[1] *= 3e3
    x[2, :, 1:] *= 1e-3
    x[3, :5] = 0
    x[3, 5:10] = 1
    return x.to(dtype)


# --- T16: channels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_T16_no_output_of_a_norm_is_above_the_bound_and_the_worst_nearly_attains_it(
    kind: str, dtype: torch.dtype
) -> None:
    source = a_source(kind, dtype)
    found = OperandRange.of(source, dtype)
    assert found.ellipsoid is not None
    ratios = []
    for x in (worst_inputs(source, dtype), varied_inputs(dtype)):
        hidden, out = outputs(source, x)
        ratios.append(float((out.abs().double() / found.channel.unsqueeze(1)).max()))
        lengths = out.double().norm(dim=-1)
        assert bool((lengths <= (found.exact + found.error).unsqueeze(-1)).all())
        assert not found.ellipsoid.outside(hidden).any()
    assert 0.85 < max(ratios) <= 1


@pytest.mark.parametrize("kind", NORMS)
def test_T16_against_an_oracle(kind: str) -> None:
    source = a_source(kind, torch.float64)
    assert isinstance(source.norm, Norm)
    weight = source.projection.weight().numpy()
    bias = source.projection.bias()
    assert bias is not None
    gain, offset = source.norm.gain().numpy(), source.norm.offset().numpy()
    exact = np.sqrt(WIDTH) * np.linalg.norm(weight * gain, axis=1) + abs(weight @ offset + bias.numpy())
    found = OperandRange.of(source, torch.float64).channel.flatten().numpy()
    assert (found >= exact).all()
    assert (found <= exact * 1.01).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_T16_holds_behind_a_factor_and_a_rotation(dtype: torch.dtype) -> None:
    layout = RotaryLayout(2, 4, False, "single")
    source = a_source("rms", dtype, tail=Tail(factor=0.3, rotation=layout))
    found = OperandRange.of(source, dtype)
    assert found.rotated.tolist() == [False, False, True, True, True, True]
    angles = torch.linspace(0, 6, 80, dtype=torch.float64).view(1, 40, 2)
    rotation = (1.5 * angles.cos()).to(dtype), (1.5 * angles.sin()).to(dtype)
    amplitude = layout.amplitude(rotation)
    assert amplitude == pytest.approx(1.5, rel=0.02)
    bound = torch.where(found.rotated, found.channel * amplitude, found.channel).unsqueeze(1)
    for x in (worst_inputs(source, dtype)[:, :1].expand(1, 40, WIDTH), varied_inputs(dtype)):
        _, out = outputs(source, x)
        read = out * 0.3
        a, b = read[..., 2:4].clone(), read[..., 4:].clone()
        cos, sin = (table[:, None] for table in rotation)
        read[..., 2:4], read[..., 4:] = a * cos - b * sin, b * cos + a * sin
        assert bool((read.abs().double() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_T16_behind_a_norm_of_its_own(dtype: torch.dtype, whole: bool) -> None:
    width = HEADS * CHANNELS if whole else CHANNELS
    norm = a_norm("rms", dtype, width)
    source = a_source("rms", dtype, tail=Tail(norm=norm))
    found = OperandRange.of(source, dtype)
    x = torch.eye(width).repeat(1, 3, 1) * 7 + 1e-5 * torch.randn(1, 3 * width, width)
    with torch.no_grad():
        out = norm.module(x.to(dtype)).double().abs()
    bound = found.channel.flatten() if whole else found.channel[0]
    assert 0.95 < float((out / bound).max()) <= 1
    length = found.exact[0] + found.error[0]
    assert bool((out[..., :CHANNELS].norm(dim=-1) <= length).all())


def test_T16_a_badly_conditioned_row_is_outside_and_a_nan_is_not() -> None:
    norm = a_norm("layer", torch.float32)
    ellipsoid = Ellipsoid.of(norm, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, WIDTH, generator=generator) * 1e-3 + 3e4
    with torch.no_grad():
        hidden = norm.module(x)
    assert not ellipsoid.outside(hidden[:0]).any()
    assert not ellipsoid.outside(torch.full((1, WIDTH), float("nan"))).any()
    assert bool(ellipsoid.outside(torch.full((1, WIDTH), 1e3)).all())
    z = torch.nn.functional.normalize(torch.randn(50, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    surface = ellipsoid.gain * z * WIDTH**0.5 + ellipsoid.offset
    assert not ellipsoid.outside(surface).any()
    assert bool(ellipsoid.outside(ellipsoid.gain * z * WIDTH**0.5 * 1.01 + ellipsoid.offset).all())


def test_T16_a_channel_without_gain_has_its_offset() -> None:
    ellipsoid = Ellipsoid(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double(), 1.5, 1e-6, 1e-30)
    hidden = torch.tensor([[1.0, 2.0], [1.0, 2.1]])
    assert ellipsoid.outside(hidden).tolist() == [False, True]


# --- T17: scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kinds", [("rms", "rms"), ("layer", "layer"), ("one plus", "layer")])
def test_T17_no_score_is_above_the_bound_and_the_worst_nearly_attains_it(kinds: Any, dtype: torch.dtype) -> None:
    query, key = a_source(kinds[0], dtype, heads=4), a_source(kinds[1], dtype, seed=1)
    sides = OperandRange.of(query, dtype), OperandRange.of(key, dtype)
    bound = score_bound(*sides)
    assert bound.shape == (4,)
    assert isinstance(query.norm, Norm)
    assert isinstance(key.norm, Norm)
    maps = [
        (s.projection.weight().double() * n.gain()).view(s.heads, CHANNELS, -1)
        for s, n in ((query, query.norm), (key, key.norm))
    ]
    ratios = []
    for head in range(4):
        left, _, right = torch.linalg.svd(maps[0][head].T @ maps[1][head // 2])
        for x, y in (
            (left[:, 0], right[0]),
            (left[:, 0], -right[0]),
            (maps[0][head].T @ torch.randn(CHANNELS).double(), torch.randn(WIDTH).double()),
        ):
            q = outputs(query, (x * 50).view(1, 1, -1).to(dtype))[1]
            k = outputs(key, (y * 50).view(1, 1, -1).to(dtype))[1]
            score = (q[:, head] @ k[:, head // 2].mT).abs().double()
            ratios.append(float(score / bound[head]))
    assert 0.6 < max(ratios) <= 1


def test_T17_the_joint_bound_against_an_oracle() -> None:
    query, key = a_source("layer", torch.float64), a_source("layer", torch.float64, seed=1)
    found = score_bound(OperandRange.of(query, torch.float64), OperandRange.of(key, torch.float64)).numpy()
    assert isinstance(query.norm, Norm)
    gain, offset = query.norm.gain().numpy(), query.norm.offset().numpy()
    for head in range(HEADS):
        parts = []
        for source in (query, key):
            weight, bias = source.projection.weight().numpy(), source.projection.bias()
            assert bias is not None
            mine = slice(head * CHANNELS, (head + 1) * CHANNELS)
            parts.append((weight[mine] * gain, weight[mine] @ offset + bias.numpy()[mine]))
        (a, c), (b, e) = parts
        lengths = np.linalg.norm(a.T @ e) + np.linalg.norm(b.T @ c)
        exact = WIDTH * np.linalg.norm(a.T @ b, 2) + np.sqrt(WIDTH) * lengths + abs(c @ e)
        assert exact <= found[head] <= exact * 1.02


def test_T17_rotated_scores_are_bounded_by_the_lengths() -> None:
    layout = RotaryLayout(0, CHANNELS, False, "single")
    plain = [a_source("rms", torch.float32, seed=seed) for seed in (0, 1)]
    turned = [a_source("rms", torch.float32, seed=seed, tail=Tail(rotation=layout)) for seed in (0, 1)]
    joint = score_bound(*(OperandRange.of(s, torch.float32) for s in plain))
    product = score_bound(*(OperandRange.of(s, torch.float32) for s in turned))
    assert bool((joint < product).all())
    # Query head h reads key head h // 2; the second key head is three times as large.
    query = OperandRange.of(a_source("rms", torch.float32, heads=4, tail=Tail(rotation=layout)), torch.float32)
    with torch.no_grad():
        turned[1].projection.module.weight[CHANNELS:] *= 3  # type: ignore[index]
    key = OperandRange.of(turned[1], torch.float32)
    expected = query.exact * key.exact[[0, 0, 1, 1]]
    grouped = score_bound(query, key)
    assert bool((grouped >= expected).all())
    assert bool((grouped <= expected * 1.02).all())


# --- the detectors -------------------------------------------------------------------------------------------------


def prepared(model: nn.Module) -> dict[str, Any]:
    detectors = {name: get_detector(name) for name in ("rng_q", "rng_k", "rng_v", "s_stat")}
    for detector in detectors.values():
        detector.prepare(model)
    return detectors


def state_of(name: str, zoo_model: Any, layer: int = 0) -> tuple[AttentionState, dict[str, Any]]:
    model = zoo_model(name)
    state = states_of(model, ZOO[name].inputs(model))[layer]
    return state, prepared(model)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "qwen3", "opt", "gpt_neox", "olmo2", "falcon-new", "t5"])
def test_faults_above_the_bound_are_seen_where_they_are(name: str, zoo_model: Any) -> None:
    state, detectors = state_of(name, zoo_model)
    sites = {"rng_q": "query", "rng_k": "key", "rng_v": "value", "s_stat": "scores"}
    index = (1, 1, 2, 3)
    for detector, site in sites.items():
        if name == "olmo2" and detector == "rng_v":
            assert "not the output of a norm" in str(detectors[detector].check(state).reason)
            continue
        tensor = getattr(state, site)
        assert tensor is not None
        for value in (1e6, -1e6, float("inf"), float("nan")):
            fired = {n: d.check(replaced(state, **{site: poked(tensor, index, value)})) for n, d in detectors.items()}
            assert [n for n, verdict in fired.items() if verdict.fired] == [detector]
            row = (1, 1, 2) if site == "scores" else (1, 1, 3)
            assert fired[detector].positions == (row,)
        # The highest exponent bit of a number below 2 makes it at least 2^64.
        small = poked(tensor, index, 0.5)
        assert detectors[detector].check(replaced(state, **{site: flipped(small, index, 30)})).fired


def test_scores_are_judged_by_the_factor_of_their_product(zoo_model: Any) -> None:
    state, detectors = state_of("gpt2-upcast", zoo_model)
    verdict = detectors["s_stat"].check(state)
    assert verdict.applicable
    halved = detectors["s_stat"].check(replaced(state, score_factor=state.score_factor / 2))
    assert halved.largest_ratio == pytest.approx(2 * verdict.largest_ratio, rel=1e-6)


def test_reasons(zoo_model: Any) -> None:
    state, detectors = state_of("bloom", zoo_model)
    assert detectors["s_stat"].check(state).reason == "its score product adds a position bias"
    assert detectors["rng_q"].check(state).applicable
    assert "does not carry" in str(detectors["s_stat"].check(replaced(state, scores=None, score_addend=None)).reason)
    assert "was not there when it was prepared" in str(detectors["rng_q"].check(replaced(state, name="x")).reason)
    assert "not prepared" in str(get_detector("rng_v").check(state).reason)
    assert "not prepared" in str(get_detector("s_stat").check(state).reason)
    assert "not projected in this call" in str(detectors["rng_k"].check(replaced(state, projected=None)).reason)
    state, detectors = state_of("gptj", zoo_model)
    for name in ("rng_q", "s_stat"):
        assert "q has no bound: its queries pass through something" in str(detectors[name].check(state).reason)
    wide = a_source("rms", torch.float32)
    assert isinstance(wide.norm, Norm)
    source = OperandSource(wide.projection, HEADS, Tail(), Norm(wide.norm.module, 2 * MAX_WIDTH, False, 0.0, 1e-6))
    assert f"its norm has {2 * MAX_WIDTH} channels" in str(reason_without_range(source))
    with pytest.raises(ValueError, match="source: got one without a norm"):
        OperandRange.of(source, torch.float32)
    for detector in (bounds.ranges.range_detectors.QueryRange(), bounds.ranges.range_detectors.ScoreRange()):
        detector._prepared[""] = "no reason"
        with pytest.raises(ValueError, match="does not apply to; ask applicable"):
            detector.check_rows(random_state())


def test_a_row_that_no_norm_put_out_is_passed_and_only_that_row(zoo_model: Any) -> None:
    state, detectors = state_of("gpt2", zoo_model)
    assert state.projected is not None
    assert state.scores is not None
    strange = {
        name: ProjectedOperand(poked(record.hidden, (0, 4, 2), 1e5), record.projected)
        for name, record in state.projected.items()
    }
    huge = {"query": state.query, "key": state.key, "value": state.value}
    huge = {site: poked(tensor, (0, 1, 4, 3), 1e6) for site, tensor in huge.items()}
    both = poked(poked(state.scores, (0, 1, 4, 2), 1e9), (0, 1, 2, 4), 1e9)
    normal = replaced(state, scores=both, **huge)
    excused = replaced(state, scores=both, projected=strange, **huge)
    for detector in detectors.values():
        assert detector.check(normal).fired
        assert not detector.check(excused).fired
    elsewhere = replaced(excused, query=poked(huge["query"], (0, 1, 5, 3), 1e6), scores=poked(both, (0, 1, 5, 2), 1e9))
    assert detectors["rng_q"].check(elsewhere).positions == ((0, 1, 3),)
    assert detectors["s_stat"].check(elsewhere).positions == ((0, 1, 5),)


def test_a_rotation_that_is_nan_fires(zoo_model: Any) -> None:
    state, detectors = state_of("llama", zoo_model)
    assert state.projected is not None
    broken = {}
    for name, record in state.projected.items():
        assert record.rotation is not None
        cos, sin = record.rotation
        broken[name] = ProjectedOperand(record.hidden, record.projected, (poked(cos, (0, 2, 1), float("nan")), sin))
    faulty = replaced(state, projected=broken)
    assert [name for name, d in detectors.items() if d.check(faulty).fired] == ["rng_q", "rng_k", "s_stat"]
