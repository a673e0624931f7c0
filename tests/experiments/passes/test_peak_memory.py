"""An instrumented, injected and watched pass needs hardly more memory than a plain eager one."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bounds import get_detector
from experiments.config.sections import DetectConfig
from experiments.passes.baseline import compute_baseline
from experiments.passes.subject import Subject
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import FaultSpec, Injector, draw_fault, suspended
from monitoring.performance.memory import tensor_peak

HEADS, LENGTH = 8, 384
LAYER_ATTENTION = 2 * HEADS * LENGTH * LENGTH * 4  # scores and weights of one layer, float32


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=3, n_embd=256, n_head=HEADS, n_positions=LENGTH, vocab_size=512)
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval().requires_grad_(False)


@pytest.mark.parametrize("location", ["q", "scores", "weights", "out"])
def test_injected_pass_stays_within_a_fifth_and_one_layer_of_a_plain_one(model, location):
    with Subject(model) as subject:
        batch = subject.to_device(torch.randint(0, 512, (1, LENGTH), generator=torch.Generator().manual_seed(1)))
        detectors = [get_detector(name) for name in DetectConfig().names()]
        for detector in detectors:
            detector.prepare(model)
        baseline = compute_baseline(subject, batch, detectors)
        fault = draw_fault(FaultSpec(location, bits=(28,)), baseline.sites[1, location], np.random.default_rng(0))
        with suspended(model):
            plain = tensor_peak(lambda: subject.forward(batch))
        with recorded_origins(model, detectors) as origins:
            watcher = Watcher(detectors, baseline.situation, origins=origins)
            injected = tensor_peak(lambda: subject.forward(batch, Injector([fault]), watcher))
    assert injected <= 1.2 * plain + LAYER_ATTENTION
    print(f"peak of the injected pass: {injected / plain:.3f} of a plain eager one ({plain / 2**20:.1f} MB)")
