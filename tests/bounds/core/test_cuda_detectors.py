"""The same claims on a GPU: no false alarm on its kernels, and a flip is seen. Skipped where there is none."""

import dataclasses

import pytest
import torch
from attention_states import DTYPES, flipped, random_state, replaced
from torch import Tensor

from bounds import get_detector
from bounds.fused.fused_attention import fused_attention
from bounds.suites import expand
from experiments.machine.environment import set_determinism

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EAGER = [name for name in expand(["full-g4", "full-g1", "epsilon"]) if not name.startswith(("P", "rng", "s_stat"))]


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    set_determinism(1)


def on_gpu(state):
    moved = {
        field.name: getattr(state, field.name).cuda()
        for field in dataclasses.fields(state)
        if field.init and isinstance(getattr(state, field.name), Tensor)
    }
    query, key, value, visible = moved["query"], moved["key"], moved["value"], moved.get("visible")
    scores = query @ key.mT
    logits = scores * state.scaling
    if visible is not None:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    weights = torch.softmax(logits, -1)
    computed = {"scores": scores, "logits": logits, "weights": weights, "mass": weights, "out": weights @ value}
    return replaced(state, **moved | computed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 12, 130, 1024])
def test_no_false_alarm_on_gpu_kernels(rows, dtype):
    state = on_gpu(random_state(rows=rows, keys=rows, channels=64, dtype=dtype, gain=2.0))
    for name in EAGER:
        verdict = get_detector(name).check(state)
        assert verdict.violations == 0, verdict


def test_a_flip_is_seen_on_a_gpu():
    state = on_gpu(random_state(rows=64, keys=64))
    assert get_detector("S_row").check(replaced(state, scores=flipped(state.scores, (0, 1, 20, 3), 30))).fired
    assert get_detector("O_row").check(replaced(state, out=flipped(state.out, (1, 2, 5, 3), 31))).fired


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_false_alarm_on_the_fused_gpu_kernel(dtype):
    draw = lambda: torch.randn(2, 4, 256, 64, device="cuda").to(dtype)  # noqa: E731
    state = fused_attention(draw(), draw(), draw(), causal=True)
    for name in expand(["fused"]):
        verdict = get_detector(name).check(state)
        assert verdict.violations == 0, verdict
