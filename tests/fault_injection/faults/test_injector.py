"""Injection: faults hit what their record says, do what the same change by hand does, and never miss in silence."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, logits_of

from fault_injection import (
    OBSERVED,
    ElementIndex,
    Fault,
    FaultMissedError,
    FaultSpec,
    Site,
    SiteSurvey,
    attention_cores,
    bit_patterns,
    draw_fault,
    injected,
    patched,
    tapped,
)

NO_CHANGE = 0


def key(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def forward(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return logits_of(model(**inputs, **options))


def forward_with(model: nn.Module, inputs: dict[str, Tensor], *faults: Fault) -> tuple[Tensor, Any]:
    with injected(model, faults) as injector:
        logits = forward(model, inputs)
    return logits, injector.records


def flips(survey: SiteSurvey, location: str, layer: int = 0, bits: Any = (28,), seed: int = 0, **index: int) -> Fault:
    spec = FaultSpec(location, bits=bits, index=ElementIndex(**index))
    return draw_fault(spec, survey.site(layer, location), key(seed))


def without_effect(fault: Fault) -> Fault:
    return dataclasses.replace(fault, elements=tuple(dataclasses.replace(e, toggle=NO_CHANGE) for e in fault.elements))


@pytest.fixture
def gpt2(zoo_model: Any, inputs: Any) -> Iterator[nn.Module]:
    with patched(zoo_model("gpt2")) as model:
        yield model


@pytest.fixture
def inputs(zoo_model: Any) -> dict[str, Tensor]:
    return ZOO["gpt2"].inputs(zoo_model("gpt2"))


# ----------------------------------------------------------------- the same change by hand, on an unpatched GPT-2


def flip(tensor: Tensor, index: tuple[int, ...], bit: int) -> Tensor:
    """Flip one bit of a float32 tensor in NumPy."""
    patterns = tensor.detach().contiguous().numpy().view(np.uint32).copy()
    patterns[index] ^= np.uint32(1 << bit)
    return torch.from_numpy(patterns.view(np.float32)).reshape(tensor.shape)


def head_to_channel(index: tuple[int, ...], block: int = 0) -> tuple[int, int, int]:
    """Translate (batch, head, position, channel) to the heads side by side; GPT-2's c_attn has the blocks q, k, v."""
    batch, head, position, channel = index
    return batch, position, block * 32 + head * 8 + channel


@contextmanager
def nth_call_flipped(
    owner: Any, name: str, n: int, index: tuple[int, ...], bit: int, *, argument: bool = False
) -> Iterator[None]:
    """Flip one bit of what a function returns in its n-th call, or of its first argument."""
    original, calls = getattr(owner, name), [0]

    def replacement(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        chosen = calls[0] == n + 1
        result = original(*((flip(args[0], index, bit), *args[1:]) if chosen and argument else args), **kwargs)
        return flip(result, index, bit) if chosen and not argument else result

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def by_hand(model: Any, fault: Fault) -> Iterator[None]:
    """Make the change of ``fault`` with hooks on the projections, or in the functions that GPT-2's attention calls."""
    attention, index, bit = model.transformer.h[fault.layer].attn, fault.index, fault.bits[0]
    assert index is not None
    with ExitStack() as stack:
        if fault.location in ("q", "k", "v"):
            where = head_to_channel(index, block="qkv".index(fault.location))
            handle = attention.c_attn.register_forward_hook(lambda _m, _i, output: flip(output, where, bit))
            stack.callback(handle.remove)
        elif fault.location == "out":
            where = head_to_channel(index)
            handle = attention.c_proj.register_forward_pre_hook(lambda _m, args: (flip(args[0], where, bit),))
            stack.callback(handle.remove)
        elif fault.location == "scores":
            stack.enter_context(nth_call_flipped(torch, "matmul", 2 * fault.layer, index, bit))
        elif fault.location == "mass":
            stack.enter_context(nth_call_flipped(torch, "matmul", 2 * fault.layer + 1, index, bit, argument=True))
        else:
            argument = fault.location == "logits"
            stack.enter_context(nth_call_flipped(nn.functional, "softmax", fault.layer, index, bit, argument=argument))
        yield


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("location", OBSERVED)
def test_injection_does_what_the_same_change_by_hand_does(
    location: str, layer: int, zoo_model: Any, inputs: Any, survey_of: Any
) -> None:
    model = zoo_model("gpt2")
    clean = forward(model, inputs)
    with patched(model):
        survey = survey_of(model, inputs)
        faults = [flips(survey, location, layer, (bit,), seed) for seed, bit in enumerate((31, 28, 22, 26, 30, 3))]
        results = [forward_with(model, inputs, fault)[0] for fault in faults]
    assert any(not torch.equal(result, clean) for result in results)
    for fault, result in zip(faults, results, strict=True):
        with by_hand(model, fault):
            expected = forward(model, inputs)
        assert bit_patterns(result) == bit_patterns(expected), fault


def test_a_fault_in_out_changes_one_channel_before_the_output_projection(
    gpt2: Any, inputs: Any, survey_of: Any
) -> None:
    seen: list[Tensor] = []
    handle = gpt2.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    fault = flips(survey_of(gpt2, inputs), "out", layer=1)
    seen.clear()
    try:
        forward(gpt2, inputs)
        forward_with(gpt2, inputs, fault)
    finally:
        handle.remove()
    assert fault.index is not None
    assert (seen[0] != seen[1]).nonzero().tolist() == [list(head_to_channel(fault.index))]


# ------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("location", OBSERVED)
@pytest.mark.parametrize("name", ["llama-gqa", "gptj", "gpt_oss", "bloom"])
def test_records_agree_with_the_tensors_of_a_clean_pass(
    name: str, location: str, dtype: torch.dtype, zoo_model: Any, survey_of: Any, tensors_of: Any
) -> None:
    model = zoo_model(name, dtype)
    inputs = ZOO[name].inputs(model)
    with patched(model):
        clean, survey = tensors_of(model, inputs)[1, 0, location], survey_of(model, inputs)
        fault = flips(survey, location, layer=1, bits=(1, 13), seed=3)
        _, (record,) = forward_with(model, inputs, fault)
    before = bit_patterns(clean[fault.index])[0]
    assert (record.fault, record.changed) == (fault, 1)
    assert (record.bits_before, record.bits_after) == (before, before ^ (1 << 1 | 1 << 13))
    assert record.value_before == float(clean[fault.index])
    assert bit_patterns(torch.tensor([record.value_after]).to(clean.dtype)) == [record.bits_after]


def test_a_rewrite_that_changes_nothing_is_recorded_as_such(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean = forward(gpt2, inputs)
    fault = without_effect(flips(survey_of(gpt2, inputs), "scores"))
    logits, (record,) = forward_with(gpt2, inputs, fault)
    assert (record.changed, record.bits_before) == (0, record.bits_after)
    assert torch.equal(logits, clean)


def test_a_value_that_becomes_nan_is_recorded_with_its_payload(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = flips(survey_of(gpt2, inputs), "v")
    nan = dataclasses.replace(fault, elements=(dataclasses.replace(fault.elements[0], keep=0, toggle=0xFFC0_0123),))
    _, (record,) = forward_with(gpt2, inputs, nan)
    assert record.value_after is not None
    assert math.isnan(record.value_after)
    assert record.bits_after == 0xFFC0_0123


def test_a_fault_on_a_hidden_key_is_applied_and_recorded(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean = forward(gpt2, inputs)
    fault = flips(survey_of(gpt2, inputs), "scores", bits=(22,), batch=0, head=1, row=2, col=9)
    logits, (record,) = forward_with(gpt2, inputs, fault)
    assert (fault.masked_position, record.changed) == (True, 1)
    assert torch.equal(logits, clean)


def test_a_bit_error_rate_changes_what_its_elements_say(
    gpt2: Any, inputs: Any, survey_of: Any, tensors_of: Any
) -> None:
    clean = tensors_of(gpt2, inputs)[0, 0, "weights"]
    spec = FaultSpec("weights", kind="bit_error_rate", rate=0.01)
    fault = draw_fault(spec, survey_of(gpt2, inputs).site(0, "weights"), key(1))
    with injected(gpt2, [fault]) as injector:
        faulty = tensors_of(gpt2, inputs)[0, 0, "weights"]
    expected = bit_patterns(clean)
    for element in fault.elements:
        expected[element.flat] ^= element.toggle
    assert bit_patterns(faulty) == expected
    (record,) = injector.records
    assert record.changed == len(fault.elements) > 5
    assert (record.bits_before, record.value_before) == (
        bit_patterns(clean)[fault.elements[0].flat],
        clean[fault.index],
    )


def test_a_bit_error_rate_that_hits_nothing_is_recorded(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean = forward(gpt2, inputs)
    spec = FaultSpec("weights", kind="bit_error_rate", rate=1e-12)
    fault = draw_fault(spec, survey_of(gpt2, inputs).site(0, "weights"), key(1))
    logits, (record,) = forward_with(gpt2, inputs, fault)
    assert torch.equal(logits, clean)
    assert (record.changed, record.value_before, record.bits_before, record.bits_after) == (0, None, None, None)


# ------------------------------------------------------------------------------------------------------ locality


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gptj", "bloom", "mistral", "falcon-rotary"])
@pytest.mark.parametrize("location", OBSERVED)
def test_a_finite_fault_reaches_only_its_sequence_and_later_positions(
    name: str, location: str, zoo_model: Any, survey_of: Any
) -> None:
    model = zoo_model(name)
    inputs = ZOO[name].inputs(model)
    with patched(model):
        clean, survey = forward(model, inputs), survey_of(model, inputs)
        faults = [flips(survey, location, bits=(31,), seed=seed, batch=1, row=5) for seed in range(4)]
        results = [forward_with(model, inputs, fault)[0] for fault in faults]
    for result in results:
        assert torch.equal(result[0], clean[0])
        assert torch.equal(result[1, :5], clean[1, :5])
    assert any(not torch.equal(result[1, 5:], clean[1, 5:]) for result in results)


@pytest.mark.parametrize("location", ["k", "v"])
def test_a_transient_fault_leaves_the_cache_as_it_was(location: str, zoo_model: Any, survey_of: Any) -> None:
    for name in ("gpt2", "llama-gqa", "gptj", "falcon-new"):
        model = zoo_model(name)
        inputs = ZOO[name].inputs(model)
        with torch.no_grad(), patched(model):
            clean = model(**inputs, use_cache=True)
            fault = flips(survey_of(model, inputs), location, bits=(31,))
            with injected(model, [fault]):
                faulty = model(**inputs, use_cache=True)
        before, after = (out.past_key_values.layers[0] for out in (clean, faulty))
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)


# ------------------------------------------------------------------------------------------------- several faults


def test_faults_on_different_elements_of_one_tensor_are_all_applied(
    gpt2: Any, inputs: Any, survey_of: Any, tensors_of: Any
) -> None:
    survey = survey_of(gpt2, inputs)
    clean = tensors_of(gpt2, inputs)[0, 0, "q"]
    faults = [flips(survey, "q", bits=(31,), batch=0, head=head, row=3, col=head) for head in range(4)]
    with injected(gpt2, faults) as injector:
        faulty = tensors_of(gpt2, inputs)[0, 0, "q"]
    assert (clean != faulty).nonzero().tolist() == [[0, head, 3, head] for head in range(4)]
    assert [record.fault for record in injector.records] == faults


def test_faults_on_one_element_are_applied_in_order(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    survey = survey_of(gpt2, inputs)
    where = {"batch": 1, "head": 2, "row": 3, "col": 4}
    fault = flips(survey, "out", **where)
    clean = forward(gpt2, inputs)
    logits, (first, second) = forward_with(gpt2, inputs, fault, fault)
    assert torch.equal(logits, clean)
    assert (first.bits_after, first.bits_before) == (second.bits_before, second.bits_after)
    zero = draw_fault(FaultSpec("out", kind="zero", index=ElementIndex(**where)), survey.site(0, "out"), key(0))
    _, records = forward_with(gpt2, inputs, zero, fault)
    assert [record.bits_after for record in records] == [0, 1 << 28]


def test_faults_on_several_layers_and_locations_are_all_applied(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    survey = survey_of(gpt2, inputs)
    faults = [flips(survey, location, layer) for layer in (1, 0) for location in OBSERVED]
    _, records = forward_with(gpt2, inputs, *faults)
    # In the order of evaluation, whatever the order they were given in.
    order = ("q", "k", "v", "scores", "logits", "weights", "mass", "out")
    evaluated = [(layer, location) for layer in (0, 1) for location in order]
    assert [(record.fault.layer, record.fault.location) for record in records] == evaluated


def test_no_fault_is_no_change(gpt2: Any, inputs: Any) -> None:
    clean = forward(gpt2, inputs)
    logits, records = forward_with(gpt2, inputs)
    assert (records, torch.equal(logits, clean)) == ([], True)


# ------------------------------------------------------------------------------------------------------- misses


def test_a_fault_on_a_layer_that_does_not_exist_is_an_error(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = dataclasses.replace(flips(survey_of(gpt2, inputs), "scores"), layer=7)
    with pytest.raises(FaultMissedError, match=r"never reached scores of layer 7 \(transformer\.h\.0\.attn\); nothing"):
        forward_with(gpt2, inputs, fault)


def test_every_missed_fault_is_named_and_the_others_are_applied(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    survey = survey_of(gpt2, inputs)
    missed = [dataclasses.replace(flips(survey, location), layer=9) for location in ("q", "out")]
    with (
        pytest.raises(FaultMissedError, match=r"q of layer 9 .*, out of layer 9"),
        injected(gpt2, [*missed, flips(survey, "v")]) as injector,
    ):
        forward(gpt2, inputs)
    assert [record.fault.location for record in injector.records] == ["v"]


def test_a_block_without_a_forward_pass_is_an_error(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = flips(survey_of(gpt2, inputs), "scores")
    with pytest.raises(FaultMissedError, match="never reached"), injected(gpt2, [fault]):
        pass


def test_a_layer_that_this_input_does_not_reach_is_an_error(zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model("qwen2_vl")
    inputs = ZOO["qwen2_vl"].inputs(model)
    with patched(model, example_inputs=inputs):
        fault = flips(survey_of(model, inputs), "scores", layer=0)
        assert "visual" in fault.module
        with pytest.raises(FaultMissedError, match=r"never reached scores of layer 0 \(model\.visual"):
            forward_with(model, {"input_ids": torch.arange(3, 10)[None]}, fault)


@pytest.mark.parametrize("location", OBSERVED)
def test_a_tensor_of_another_shape_is_an_error(location: str, gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = flips(survey_of(gpt2, inputs), location)
    shorter = {"input_ids": inputs["input_ids"][:, :9]}
    message = (
        rf"drawn for {location} of transformer\.h\.0\.attn with shape \(2, 4, 12, .*\), but met .* shape \(2, 4, 9, "
    )
    with pytest.raises(FaultMissedError, match=message):
        forward_with(gpt2, shorter, fault)


def test_a_module_of_another_name_is_an_error(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = dataclasses.replace(flips(survey_of(gpt2, inputs), "scores"), module="model.layers.0.self_attn")
    with pytest.raises(FaultMissedError, match=r"scores of model\.layers\.0\.self_attn .* but met transformer\.h\.0"):
        forward_with(gpt2, inputs, fault)


@pytest.mark.parametrize(("drawn", "met"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")])
def test_a_fault_drawn_for_another_dtype_is_an_error(
    drawn: str, met: str, zoo_model: Any, inputs: Any, survey_of: Any
) -> None:
    # The masks of a 16-bit fault would clear the upper half of a float32 number.
    with patched(zoo_model("gpt2", getattr(torch, drawn))) as model:
        fault = flips(survey_of(model, inputs), "scores", bits=(9,))
    with patched(zoo_model("gpt2", getattr(torch, met))) as model, pytest.raises(FaultMissedError, match=met):
        forward_with(model, inputs, fault)


def test_a_model_that_is_not_patched_is_refused(zoo_model: Any) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is not patched; call monkey_patch_model\(model\) first"):
        injected(zoo_model("gpt2"), []).__enter__()


# --------------------------------------------------------------------------------------------------- call numbers


def test_a_fault_hits_only_the_first_evaluation_by_default(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean, fault = forward(gpt2, inputs), flips(survey_of(gpt2, inputs), "weights", bits=(30,))
    with injected(gpt2, [fault]) as injector:
        first, second = forward(gpt2, inputs), forward(gpt2, inputs)
    assert not torch.equal(first, clean)
    assert torch.equal(second, clean)
    assert len(injector.records) == 1


def test_a_call_number_chooses_the_forward_pass(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean, fault = forward(gpt2, inputs), flips(survey_of(gpt2, inputs), "weights", bits=(30,))
    with injected(gpt2, [dataclasses.replace(fault, call=2)]):
        changed = [not torch.equal(forward(gpt2, inputs), clean) for _ in range(4)]
    assert changed == [False, False, True, False]


def test_a_call_that_is_never_made_is_an_error(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = dataclasses.replace(flips(survey_of(gpt2, inputs), "scores"), call=1)
    with pytest.raises(FaultMissedError, match="never reached scores of layer 0"):
        forward_with(gpt2, inputs, fault)


def test_each_image_is_one_call_of_a_vision_core(zoo_model: Any, survey_of: Any, tensors_of: Any) -> None:
    model = zoo_model("qwen2_vl")
    inputs = ZOO["qwen2_vl"].inputs(model)
    with patched(model, example_inputs=inputs):
        clean = tensors_of(model, inputs)
        fault = flips(survey_of(model, inputs), "v", layer=0, row=3, bits=(31,))
        second = dataclasses.replace(fault, call=1, shape=(1, 4, 24, 8))
        with injected(model, [fault, second]) as injector:
            faulty = tensors_of(model, inputs)
    assert [record.fault.call for record in injector.records] == [0, 1]
    for call, shape in enumerate([(1, 4, 16, 8), (1, 4, 24, 8)]):
        before, after = clean[0, call, "v"], faulty[0, call, "v"]
        assert before.shape == shape
        assert int((before != after).sum()) == 1
        changed = int((before != after).flatten().nonzero())
        assert changed == fault.elements[0].flat


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gptj", "bloom"])
def test_a_step_of_generate_is_one_call(name: str, zoo_model: Any) -> None:
    model: Any = zoo_model(name)
    prompt = {
        "input_ids": ZOO[name].inputs(model)["input_ids"][:1],
        "attention_mask": torch.ones(1, 12, dtype=torch.int64),
    }
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}

    def steps() -> list[Tensor]:
        return list(model.generate(**prompt, **options, return_dict_in_generate=True).logits)

    unpatched = steps()
    with patched(model):
        plain = steps()
        # The prompt is call 0; a later step has one query.
        site = Site(1, attention_cores(model)[1].name, "out", (1, 4, 1, 8), 8, torch.float32)
        fault = draw_fault(FaultSpec("out", bits=(30,)), site, key(0))
        with injected(model, [dataclasses.replace(fault, call=2)]) as injector:
            faulty = steps()
    assert [torch.equal(a, b) for a, b in zip(unpatched, plain, strict=True)] == [True] * 4
    assert [torch.equal(a, b) for a, b in zip(plain[:3], faulty[:3], strict=True)] == [True, True, False]
    assert len(injector.records) == 1


# ------------------------------------------------------------------------------------------------------- sessions


def test_an_exception_in_the_block_takes_the_faults_away(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean, survey = forward(gpt2, inputs), survey_of(gpt2, inputs)
    with pytest.raises(ZeroDivisionError), injected(gpt2, [flips(survey, "out", layer=1), flips(survey, "q")]):
        raise ZeroDivisionError
    assert torch.equal(forward(gpt2, inputs), clean)


def test_an_exception_in_the_forward_pass_takes_the_faults_away(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean, survey = forward(gpt2, inputs), survey_of(gpt2, inputs)
    wrong = dataclasses.replace(flips(survey, "weights"), shape=(1, 1, 1, 1))
    with pytest.raises(FaultMissedError):
        forward_with(gpt2, inputs, wrong, flips(survey, "out", layer=1))
    assert torch.equal(forward(gpt2, inputs), clean)


def test_taps_are_called_in_order_and_outer_sessions_first(
    gpt2: Any, inputs: Any, survey_of: Any, tensors_of: Any
) -> None:
    survey = survey_of(gpt2, inputs)
    where = {"batch": 0, "head": 0, "row": 0, "col": 0}
    fault = flips(survey, "q", **where)
    zero = draw_fault(FaultSpec("q", kind="zero", index=ElementIndex(**where)), survey.site(0, "q"), key(0))
    with injected(gpt2, [zero]), injected(gpt2, [fault]):
        inner_last = tensors_of(gpt2, inputs)[0, 0, "q"][0, 0, 0, 0]
    with injected(gpt2, [fault]), injected(gpt2, [zero]):
        zero_last = tensors_of(gpt2, inputs)[0, 0, "q"][0, 0, 0, 0]
    assert bit_patterns(inner_last) == [1 << 28]
    assert bit_patterns(zero_last) == [0]


def test_a_session_inside_another_does_not_restart_its_call_numbers(
    gpt2: Any, inputs: Any, survey_of: Any, tensors_of: Any
) -> None:
    fault = dataclasses.replace(flips(survey_of(gpt2, inputs), "q", bits=(31,)), call=1)
    clean = tensors_of(gpt2, inputs)[0, 0, "q"]
    with injected(gpt2, [fault]):
        first, second = (tensors_of(gpt2, inputs)[0, 0, "q"] for _ in range(2))
    assert torch.equal(first, clean)
    assert not torch.equal(second, clean)


def test_taps_see_only_the_layers_and_locations_they_ask_for(gpt2: Any, inputs: Any) -> None:
    class Narrow:
        locations = frozenset({"weights"})
        layers = frozenset({1})
        seen: list[tuple[int, str]] = []  # noqa: RUF012

        def on(self, location: str, tensor: Tensor, call: Any) -> None:
            self.seen.append((call.core.index, location))

    with tapped(gpt2, Narrow()):
        forward(gpt2, inputs)
    assert Narrow.seen == [(1, "weights")]


def test_faults_reach_a_forward_pass_in_another_thread(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean, fault = forward(gpt2, inputs), flips(survey_of(gpt2, inputs), "weights", bits=(30,))
    results: list[Tensor] = []
    with injected(gpt2, [fault]) as injector:
        worker = threading.Thread(target=lambda: results.append(forward(gpt2, inputs)))
        worker.start()
        worker.join()
    assert len(injector.records) == 1
    assert not torch.equal(results[0], clean)


def test_inference_mode_gives_the_same_bits(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    fault = flips(survey_of(gpt2, inputs), "k", bits=(30,))
    expected, _ = forward_with(gpt2, inputs, fault)
    with torch.inference_mode(), injected(gpt2, [fault]):
        logits = gpt2(**inputs).logits
    assert bit_patterns(logits) == bit_patterns(expected)


def test_two_patched_models_do_not_share_faults(gpt2: Any, inputs: Any, survey_of: Any) -> None:
    clean = forward(gpt2, inputs)
    fault = flips(survey_of(gpt2, inputs), "weights", bits=(30,))
    with patched(ZOO["gpt2"].build()) as other, injected(other, [fault]):
        assert torch.equal(forward(gpt2, inputs), clean)
        assert not torch.equal(forward(other, inputs), clean)
