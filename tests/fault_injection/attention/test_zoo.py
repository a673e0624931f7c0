"""The instrumented attention on every architecture of the zoo: bit-exact without a fault, effective with one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, ZooEntry, logits_of, zoo_parameters

from fault_injection import (
    OBSERVED,
    Fault,
    FaultSpec,
    Site,
    SiteSurvey,
    attention_cores,
    draw_fault,
    injected,
    patched,
    tapped,
)
from fault_injection.attention.call_tensors import CallTensors
from fault_injection.numbers.model_outputs import bitwise_equal, bitwise_equal_outputs

DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float16")]
# The highest exponent bit of each native dtype: sets it on every number below 2, and attention's weights are.
HIGH_BIT = {torch.float32: 30, torch.bfloat16: 14, torch.float16: 14}
ATTEMPTS = 6


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model(**inputs)


def forward_with(model: nn.Module, inputs: dict[str, Tensor], fault: Fault) -> Tensor:
    with injected(model, [fault]):
        return logits_of(forward(model, inputs))


def high_flip(site: Site, seed: int) -> Fault:
    spec = FaultSpec(site.location, bits=(HIGH_BIT[site.dtype],))
    return draw_fault(spec, site, np.random.Generator(np.random.Philox(key=seed)))


def without_effect(fault: Fault) -> Fault:
    return replace(fault, elements=tuple(replace(element, toggle=0) for element in fault.elements))


@contextmanager
def instrumented(entry: ZooEntry, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    inputs = entry.inputs(model)
    with patched(model, example_inputs=inputs):
        yield inputs


every_entry = pytest.mark.parametrize("entry", zoo_parameters())
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@every_dtype
@every_entry
def test_without_a_fault_the_output_is_bitwise_that_of_eager_attention(
    entry: ZooEntry, dtype: torch.dtype, zoo_model: Any, tensors_of: Any
) -> None:
    model = zoo_model(entry.name, dtype)
    expected = forward(model, entry.inputs(model))
    assert logits_of(expected).dtype == dtype
    with instrumented(entry, model) as inputs:
        assert bitwise_equal_outputs(forward(model, inputs), expected)
        observed = Observer()
        with tapped(model, observed):
            assert bitwise_equal_outputs(forward(model, inputs), expected)
        assert bitwise_equal_outputs(forward(model, inputs), expected)
    assert observed.calls == entry.calls
    assert bitwise_equal_outputs(forward(model, entry.inputs(model)), expected)


class Observer:
    """Looks at everything, and counts the evaluations that were seen to their end."""

    locations = frozenset(OBSERVED)
    layers = None

    def __init__(self) -> None:
        self.calls = 0
        self.kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: Any) -> None:
        self.calls += location == "out"
        self.kept.keep(call, location, tensor)


@every_entry
def test_cores_and_paths_are_as_the_entry_says(entry: ZooEntry, zoo_model: Any, tensors_of: Any) -> None:
    model = zoo_model(entry.name)
    with instrumented(entry, model) as inputs:
        cores = attention_cores(model)
        seen = tensors_of(model, inputs)
    assert len(cores) == entry.cores
    assert {core.path for core in cores} == {entry.path}
    assert [core.index for core in cores] == list(range(entry.cores))
    modules = dict(model.named_modules())
    assert all(modules[core.name] is core.module for core in cores)
    assert len({core.name for core in cores}) == entry.cores
    # Every location of every evaluation of every core, once.
    evaluations = {(layer, call) for layer, call, _ in seen}
    assert {layer for layer, _ in evaluations} == set(range(entry.cores))
    assert len(evaluations) == entry.calls
    assert set(seen) == {(*evaluation, location) for evaluation in evaluations for location in OBSERVED}


@every_dtype
@every_entry
def test_every_location_of_every_core_can_be_hit_and_a_rewrite_without_effect_changes_nothing(
    entry: ZooEntry, dtype: torch.dtype, zoo_model: Any, survey_of: Any
) -> None:
    model = zoo_model(entry.name, dtype)
    with instrumented(entry, model) as inputs:
        expected, survey = forward(model, inputs), survey_of(model, inputs)
        sites = survey.sites()
        assert set(sites) == {(layer, location) for layer in range(entry.cores) for location in OBSERVED}
        faults = [without_effect(high_flip(site, 0)) for site in sites.values()]
        # One at a time in float32, all together in the narrow dtypes.
        for group in [[fault] for fault in faults] if dtype == torch.float32 else [faults]:
            with injected(model, group) as injector:
                output = forward(model, inputs)
            assert [record.changed for record in injector.records] == [0] * len(group), group
            assert bitwise_equal_outputs(output, expected), group


@every_dtype
@every_entry
def test_a_high_bit_at_every_location_of_every_core_changes_the_output(
    entry: ZooEntry, dtype: torch.dtype, zoo_model: Any, survey_of: Any
) -> None:
    model = zoo_model(entry.name, dtype)
    with instrumented(entry, model) as inputs:
        clean, survey = logits_of(forward(model, inputs)), survey_of(model, inputs)
        for site in survey.sites().values():
            results = (forward_with(model, inputs, high_flip(site, seed)) for seed in range(ATTEMPTS))
            assert any(not bitwise_equal(result, clean) for result in results), site
        assert bitwise_equal(logits_of(forward(model, inputs)), clean)


@every_dtype
@every_entry
def test_hidden_keys_have_no_weight_and_visible_ones_have_some(
    entry: ZooEntry, dtype: torch.dtype, zoo_model: Any, survey_of: Any, tensors_of: Any
) -> None:
    model = zoo_model(entry.name, dtype)
    with instrumented(entry, model) as inputs:
        survey, seen = survey_of(model, inputs), tensors_of(model, inputs)
    for (layer, call), mask in survey.visible.items():
        weights = seen[layer, call, "weights"]
        visible = mask.expand_as(weights)
        # A padding query of a left-padded sequence sees nothing; its weights mean nothing.
        some = visible.any(-1, keepdim=True)
        assert not bool(weights[some & ~visible].any())
        if dtype == torch.float32:
            assert bool((weights > 0)[visible].all())


# -------------------------------------------------------------------------------- the tensors are what they are called


def repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor.double().repeat_interleave(heads // tensor.shape[1], dim=1)


@every_entry
def test_tensors_satisfy_the_equations_of_attention(entry: ZooEntry, zoo_model: Any, tensors_of: Any) -> None:
    model = zoo_model(entry.name)
    with instrumented(entry, model) as inputs:
        seen = tensors_of(model, inputs)
    for layer, call in {(layer, call) for layer, call, _ in seen}:
        q, k, v, scores, logits, weights, out = (
            seen[layer, call, location] for location in ("q", "k", "v", "scores", "logits", "weights", "out")
        )
        heads, keys = q.shape[1], v.shape[2]
        assert q.shape[:3] == out.shape[:3] == scores.shape[:3] == weights.shape[:3] == logits.shape[:3]
        assert (k.shape[2], v.shape[3], q.shape[3]) == (keys, out.shape[3], k.shape[3])
        torch.testing.assert_close(torch.softmax(logits.double(), -1), weights.double(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            weights[..., :keys].double() @ repeated(v, heads), out.double(), atol=2e-5, rtol=2e-5
        )
        products = q.double() @ repeated(k, heads).mT
        # The product of these two is one with the scaling (and, in Bloom, with alibi).
        if not entry.name.startswith(("bloom", "gpt2-upcast")):
            torch.testing.assert_close(products, scores.double(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("entry", [p for p in zoo_parameters() if "padded" not in p.id and p.id != "gemma2"])
def test_the_stated_scaling_is_the_one_that_was_used(entry: ZooEntry, zoo_model: Any, survey_of: Any) -> None:
    """Logits are scaling times q·k plus what depends on positions alone: the same for both sequences of a batch."""
    model, biases = zoo_model(entry.name), Biases()
    with instrumented(entry, model) as inputs:
        survey = survey_of(model, inputs)
        with torch.no_grad(), tapped(model, biases):
            model(**inputs)
    assert len(biases.seen) == entry.calls
    for call, bias in biases.seen.items():
        if entry.name == "gpt_oss":  # It subtracts the maximum of each row: compare with the diagonal.
            bias = bias - bias.diagonal(dim1=-2, dim2=-1)[..., None]
        visible = survey.visible[call][..., : bias.shape[-1]].expand_as(bias)
        # An image of Qwen-VL is a batch of its own, without any bias.
        other = bias[-1] if len(bias) > 1 else torch.zeros_like(bias[0])
        both = visible[0] & visible[-1]
        torch.testing.assert_close(bias[0][both], other[both], atol=2e-5, rtol=1e-5)


class Biases:
    """Keeps what the logits hold beyond the scaled products, in float64."""

    locations = frozenset({"q", "k", "logits"})
    layers = None

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], Tensor] = {}
        self.kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: Any) -> None:
        self.kept.keep(call, location, tensor.double())
        if location == "logits":
            assert call.scaling is not None, call.core.name
            kept = self.kept.take(call)
            q, k = kept["q"], kept["k"]
            products = q @ repeated(k, q.shape[1]).mT
            logits = kept["logits"][..., : products.shape[-1]]
            self.seen[call.core.index, call.number] = logits - call.scaling * products


# ------------------------------------------------------------------------------------------------------------- sinks


@every_dtype
def test_a_sink_is_never_hit(dtype: torch.dtype, zoo_model: Any, survey_of: Any) -> None:
    entry = ZOO["gpt_oss"]
    model = zoo_model(entry.name, dtype)
    with instrumented(entry, model) as inputs:
        survey: SiteSurvey = survey_of(model, inputs)
    site = survey.site(0, "weights")
    faults = [high_flip(site, seed) for seed in range(200)]
    rates = [
        draw_fault(
            FaultSpec("weights", kind="bit_error_rate", rate=0.01, include_masked=True),
            site,
            np.random.Generator(np.random.Philox(key=seed)),
        )
        for seed in range(5)
    ]
    columns = {element.flat % 13 for fault in (*faults, *rates) for element in fault.elements}
    assert columns == set(range(12))
