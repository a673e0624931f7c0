"""Patching and undoing it: no trace is left, wrong use is refused, and a patch that alters a bit does not pass."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, ZooEntry, logits_of, zoo_parameters

from fault_injection import (
    OBSERVED,
    ElementIndex,
    Fault,
    FaultMissedError,
    FaultSpec,
    SiteSurvey,
    UncoveredArchitectureError,
    attention_cores,
    draw_fault,
    injected,
    instrumentation_of,
    is_patched,
    monkey_patch_model,
    patched,
    suspended,
    unpatch_model,
)
from fault_injection.attention import instrument
from fault_injection.attention import interface as attention_interface
from fault_injection.attention.probe import AttentionProbe
from fault_injection.numbers.model_outputs import bitwise_equal_outputs

BOTH_PATHS = ["gpt2", "llama-gqa", "gptj", "bloom"]


def forward(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Note everything a patch could leave behind, by identity where that is stricter."""
    notes: dict[str, Any] = {}
    for name, module in model.named_modules():
        # Qwen-VL keeps a tensor of its last forward pass.
        notes[name, "attributes"] = {
            key: None if isinstance(value, Tensor) else id(value)
            for key, value in module.__dict__.items()
            if key not in ("training", "rope_deltas")
        }
        notes[name, "training"] = module.training
        notes[name, "class"] = type(module)
        notes[name, "hooks"] = [
            list(hooks.items()) for key, hooks in sorted(module.__dict__.items()) if key.endswith("_hooks")
        ]
        if hasattr(module, "config"):
            notes[name, "config"] = copy.deepcopy(vars(module.config)), module.config._attn_implementation
    return notes


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Name the tensors that are not equal in both, and those that only one has."""
    both = left.keys() & right.keys()
    return sorted(left.keys() ^ right.keys()) + [
        name for name in left if name in both and not torch.equal(left[name], right[name])
    ]


class Unchanged:
    """Compares a model with what it was: attributes, hooks, flags, configurations, tensors and output."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, inputs
        training = {module: module.training for module in model.modules()}
        self.output = forward(model.eval(), inputs)
        for module, flag in training.items():
            module.training = flag
        self.notes, self.tensors = snapshot(model), state(model)

    def check(self) -> None:
        after = snapshot(self.model)
        assert {key: value for key, value in after.items() if self.notes[key] != value} == {}
        assert differing(state(self.model), self.tensors) == []
        assert not is_patched(self.model)
        assert bitwise_equal_outputs(forward(self.model.eval(), self.inputs), self.output)


def unchanged(name: str) -> tuple[Any, Unchanged]:
    model = ZOO[name].build()
    return model, Unchanged(model, ZOO[name].inputs(model))


# -------------------------------------------------------------------------------------------------------- restoring


@pytest.mark.parametrize("entry", zoo_parameters())
def test_unpatching_leaves_no_trace(entry: ZooEntry) -> None:
    model, before = unchanged(entry.name)
    with patched(model, example_inputs=before.inputs) as same_model:
        assert same_model is model
        assert is_patched(model)
        assert bitwise_equal_outputs(forward(model, before.inputs), before.output)
    before.check()


@pytest.mark.parametrize("name", BOTH_PATHS)
def test_an_exception_in_the_block_leaves_no_trace(name: str) -> None:
    model, before = unchanged(name)
    with pytest.raises(KeyboardInterrupt), patched(model):
        raise KeyboardInterrupt
    before.check()


@pytest.mark.parametrize("name", BOTH_PATHS)
def test_patching_again_after_unpatching_works(name: str) -> None:
    model, before = unchanged(name)
    for _ in range(3):
        assert monkey_patch_model(model) is model
        assert unpatch_model(model) is model
    before.check()


@pytest.mark.parametrize(
    "failure",
    [
        {"model_type": "llama2"},
        {"injection_layers": [0, 2]},
        {"injection_layers": [-1]},
        {"example_inputs": {"no_such_argument": 1}},
        {"example_inputs": {"input_ids": torch.full((1, 3), 10**6)}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BOTH_PATHS)
def test_patching_that_fails_leaves_no_trace(name: str, failure: dict[str, Any]) -> None:
    model, before = unchanged(name)
    with pytest.raises((ValueError, TypeError, IndexError)):
        monkey_patch_model(model, **failure)
    before.check()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *product(BOTH_PATHS, ["discover_cores", "register", "bitwise_equal_outputs"]),
        *product(["gptj", "bloom"], ["stated_scaling"]),
        *product(["gpt2", "llama-gqa"], ["eager_function"]),
    ],
)
def test_an_interruption_at_any_stage_leaves_no_trace(name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    model, before = unchanged(name)
    monkeypatch.setattr(instrument, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        monkey_patch_model(model)
    monkeypatch.undo()
    before.check()


@pytest.mark.parametrize("name", [*BOTH_PATHS, "bert", "whisper", "qwen2_vl"])
def test_training_flags_are_restored_one_by_one(name: str) -> None:
    model = ZOO[name].build()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    before = Unchanged(model, ZOO[name].inputs(model))
    with patched(model, example_inputs=before.inputs):
        assert {k: v for k, v in snapshot(model).items() if k[1] == "training" and v != before.notes[k]} == {}
    before.check()


def test_the_global_generator_is_not_moved() -> None:
    model = ZOO["whisper"].build().train()
    inputs = ZOO["whisper"].inputs(model)
    before = torch.get_rng_state()
    with patched(model, example_inputs=inputs):
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_forward_of_a_module_is_put_back() -> None:
    # As accelerate's hooks do: an instance attribute that wraps the class's forward.
    model, _ = unchanged("gptj")
    attention = model.transformer.h[0].attn
    calls: list[int] = []
    original = attention.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    attention.forward = own
    before = Unchanged(model, ZOO["gptj"].inputs(model))
    calls.clear()
    with patched(model):
        forward(model, before.inputs)
    assert calls
    assert attention.__dict__["forward"] is own
    before.check()


@pytest.mark.parametrize(
    "entry", [parameter for parameter in zoo_parameters("A") if parameter.id not in ("gemma2", "gpt_oss")]
)
def test_a_model_with_sdpa_computes_eager_while_patched_and_sdpa_again_afterwards(
    entry: ZooEntry, zoo_model: Any
) -> None:
    eager, model = zoo_model(entry.name), ZOO[entry.name].build()
    inputs = entry.inputs(model)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    before = Unchanged(model, inputs)
    with patched(model, example_inputs=inputs):
        assert bitwise_equal_outputs(forward(model, inputs), forward(eager, inputs))
        assert len(attention_cores(model)) == entry.cores
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}
    before.check()


def test_falcon_loaded_with_sdpa_computes_eager_while_patched(zoo_model: Any) -> None:
    eager = zoo_model("falcon-rotary")
    config = copy.deepcopy(eager.config)
    model = type(eager)._from_config(config, attn_implementation="sdpa").eval()
    model.load_state_dict(eager.state_dict())
    inputs = ZOO["falcon-rotary"].inputs(model)
    before = Unchanged(model, inputs)
    with patched(model):
        assert bitwise_equal_outputs(forward(model, inputs), forward(eager, inputs))
        assert [core.path for core in attention_cores(model)] == ["R", "R"]
    assert model.config._attn_implementation == "sdpa"
    before.check()


def test_nested_configurations_are_restored_one_by_one() -> None:
    model, _ = unchanged("qwen2_vl")
    inputs = ZOO["qwen2_vl"].inputs(model)
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before = Unchanged(model, inputs)
    chosen = (model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation)
    assert chosen == ("sdpa", "eager")
    with patched(model, example_inputs=inputs):
        pass
    assert chosen == (model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation)
    before.check()


@pytest.mark.parametrize("name", BOTH_PATHS)
def test_suspending_runs_the_models_own_code_and_comes_back(name: str, tensors_of: Any) -> None:
    model, before = unchanged(name)
    with patched(model):
        with suspended(model):
            assert not any("forward" in core.module.__dict__ for core in attention_cores(model))
            assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
            assert bitwise_equal_outputs(forward(model, before.inputs), before.output)
            assert tensors_of(model, before.inputs) == {}
        assert len(tensors_of(model, before.inputs)) == 2 * len(OBSERVED)
        with pytest.raises(ZeroDivisionError), suspended(model):
            raise ZeroDivisionError
        assert len(tensors_of(model, before.inputs)) == 2 * len(OBSERVED)
    before.check()


# ---------------------------------------------------------------------------------------------------------- refusals


def test_patching_twice_is_refused(zoo_model: Any) -> None:
    with patched(zoo_model("gpt2")) as model:
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel is already patched; call unpatch_model\(model\) first"):
            monkey_patch_model(model)
        assert is_patched(model)


@pytest.mark.parametrize(
    "undo", [unpatch_model, attention_cores, instrumentation_of, lambda m: suspended(m).__enter__()]
)
def test_a_model_that_is_not_patched_is_refused(undo: Callable[[nn.Module], Any], zoo_model: Any) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is not patched; call monkey_patch_model\(model\) first"):
        undo(zoo_model("gpt2"))


def test_another_model_type_is_refused(zoo_model: Any) -> None:
    with pytest.raises(ValueError, match=r"model_type: got 'llama', but the model's configuration says 'gpt2'"):
        monkey_patch_model(zoo_model("gpt2"), "llama")
    with patched(zoo_model("gpt2"), model_type="gpt2") as model:
        assert is_patched(model)


@pytest.mark.parametrize("layer", [2, -1])
def test_layers_that_do_not_exist_are_refused(layer: int, zoo_model: Any) -> None:
    with pytest.raises(ValueError, match=rf"injection_layers: got {layer}, allowed 0\.\.1"):
        monkey_patch_model(zoo_model("gpt2"), injection_layers=[0, layer])
    with patched(zoo_model("gpt2"), injection_layers=[1]) as model:
        assert instrumentation_of(model).injection_layers == (1,)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "llama-gqa",
        "mistral",
        "gemma2",
        "gpt_oss",
        "bert",
        "t5",
        "gpt2-upcast",
        "gptj",
        "gpt_neo",
        "falcon-rotary",
        "mpt",
    ],
)
def test_a_boolean_mask_of_four_dimensions_is_refused(name: str, zoo_model: Any) -> None:
    model = zoo_model(name)
    mask = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
    inputs = {**ZOO[name].inputs(model), "attention_mask": mask}
    # Eager attention adds its mask (MPT fills where it is True): nothing would be hidden, or the wrong keys.
    with patched(model), pytest.raises(ValueError, match="boolean"):
        forward(model, inputs)


@pytest.mark.parametrize("name", BOTH_PATHS)
def test_a_part_of_a_patched_model_is_refused_or_leaves_the_patch_alone(name: str, tensors_of: Any) -> None:
    model, before = unchanged(name)
    with patched(model):
        try:
            with patched(next(iter(model.children()))):
                pass
        except ValueError as refusal:
            assert "patched" in str(refusal)  # noqa: PT017
        assert bitwise_equal_outputs(forward(model, before.inputs), before.output)
        assert len(tensors_of(model, before.inputs)) == 2 * len(OBSERVED)
    before.check()


def test_an_input_that_reaches_unknown_attention_is_refused(zoo_model: Any) -> None:
    model = zoo_model("qwen2_vl")
    inputs = ZOO["qwen2_vl"].inputs(model)
    with patched(model):
        assert len(attention_cores(model)) == 2
        with pytest.raises(UncoveredArchitectureError, match=r"was not reached by the dry run .* pass example_inputs="):
            forward(model, inputs)


# ---------------------------------------------------------------------------------------------- copies and companions


@pytest.mark.parametrize("name", [*BOTH_PATHS, "falcon-new", "mpt", "gpt_neo", "gpt2-upcast", "t5"])
def test_a_copy_of_a_patched_model_says_that_it_must_be_patched(name: str, zoo_model: Any) -> None:
    # A copied wrapper would go on evaluating the original's modules, with the original's weights.
    with patched(zoo_model(name)) as model:
        inputs = ZOO[name].inputs(model)
        clone = copy.deepcopy(model)
        with pytest.raises(UncoveredArchitectureError, match="copy"):
            forward(clone, inputs)


@pytest.mark.parametrize("name", BOTH_PATHS)
def test_a_copy_made_before_patching_is_not_patched(name: str, zoo_model: Any, tensors_of: Any) -> None:
    model = zoo_model(name)
    clone, inputs = copy.deepcopy(model), ZOO[name].inputs(model)
    expected = forward(model, inputs)
    with patched(model):
        assert not is_patched(clone)
        assert bitwise_equal_outputs(forward(clone, inputs), expected)


@pytest.mark.parametrize("last_first", [True, False], ids=["last first", "first first"])
@pytest.mark.parametrize("name", BOTH_PATHS)
def test_models_that_share_a_configuration_are_both_restored(name: str, last_first: bool) -> None:
    first = ZOO[name].build()
    second = type(first)(first.config).eval()  # type: ignore[call-arg, arg-type]
    inputs = ZOO[name].inputs(first)
    checks = [Unchanged(first, inputs), Unchanged(second, inputs)]
    monkey_patch_model(first)
    try:
        monkey_patch_model(second)
    except ValueError as refusal:
        assert "config" in str(refusal)  # noqa: PT017
    else:
        for model in (first, second):
            assert bitwise_equal_outputs(forward(model, inputs), checks[model is second].output)
    for model in [second, first] if last_first else [first, second]:
        if is_patched(model):
            unpatch_model(model)
    for check in checks:
        check.check()


@pytest.mark.parametrize("name", BOTH_PATHS)
@pytest.mark.parametrize("unpatch", [True, False], ids=["unpatched", "dropped while patched"])
def test_a_model_that_is_dropped_is_freed(name: str, unpatch: bool) -> None:
    model = monkey_patch_model(ZOO[name].build())
    held = [weakref.ref(model), *(weakref.ref(core.module) for core in attention_cores(model))]
    if unpatch:
        unpatch_model(model)
    del model
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


# ---------------------------------------------------------------------------------------------------- broken patches


def nudged(tensor: Tensor) -> Tensor:
    """Change the last bit of one element."""
    changed = tensor.clone()
    changed.view(torch.int32)[(0,) * changed.dim()] ^= 1
    return changed


def break_registered_function(monkeypatch: pytest.MonkeyPatch) -> None:
    original = instrument._instrumented_attention

    def altered(*args: Any, **kwargs: Any) -> Any:
        out, weights = original(*args, **kwargs)
        return nudged(out), weights

    monkeypatch.setattr(instrument, "_instrumented_attention", altered)


def break_probe(method: str) -> Callable[[pytest.MonkeyPatch], None]:
    def broken(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(AttentionProbe, method)
        monkeypatch.setattr(AttentionProbe, method, lambda *args, **kwargs: nudged(original(*args, **kwargs)))

    return broken


def break_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_masks(function: Any) -> None:
        attention_interface.AttentionInterface.register(attention_interface.IMPLEMENTATION, function)
        attention_interface.AttentionMaskInterface.register(attention_interface.IMPLEMENTATION, lambda *_, **__: None)

    monkeypatch.setattr(instrument, "register", without_masks)


def skip_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwatched(module, *args, **kwargs):  # type: ignore[no-untyped-def]
        return type(module).forward(module, *args, **kwargs)

    monkeypatch.setattr(instrument, "_wrapped_forward", unwatched)


@pytest.mark.parametrize(
    ("name", "breaking", "message"),
    [
        ("gpt2", break_registered_function, "not bitwise equal"),
        ("llama-gqa", break_registered_function, "not bitwise equal"),
        ("llama-gqa", break_masks, "not bitwise equal"),
        ("gpt2", break_probe("_out"), "not bitwise equal"),
        ("gptj", break_probe("_out"), "not bitwise equal"),
        ("bloom", break_probe("_softmax"), "not bitwise equal"),
        ("gptj", skip_wrapping, r"these attention cores were not reached: \['transformer\.h\.0\.attn', 'transformer"),
    ],
)
def test_a_patch_that_alters_a_bit_is_refused_and_undone(
    name: str, breaking: Callable[[pytest.MonkeyPatch], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = unchanged(name)
    breaking(monkeypatch)
    with pytest.raises(UncoveredArchitectureError, match=message):
        monkey_patch_model(model)
    monkeypatch.undo()
    before.check()
    with patched(model):  # The registration is made anew.
        assert bitwise_equal_outputs(forward(model, before.inputs), before.output)


def test_an_eager_function_that_changes_after_the_expected_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = unchanged("llama-gqa")
    original = instrument.eager_function

    def altered(module: nn.Module) -> Any:
        function: Any = original(module)

        def upcast(*args: Any, **kwargs: Any) -> Any:
            out, weights = function(*args, **kwargs)
            return nudged(out), weights

        return upcast

    monkeypatch.setattr(instrument, "eager_function", altered)
    with pytest.raises(UncoveredArchitectureError, match="not bitwise equal"):
        monkey_patch_model(model)
    before.check()


# -------------------------------------------------------------------------------------------------- options of a pass


@pytest.mark.parametrize("entry", zoo_parameters())
def test_attentions_hidden_states_and_the_cache_are_as_unpatched(entry: ZooEntry, zoo_model: Any) -> None:
    model = zoo_model(entry.name)
    inputs = entry.inputs(model)
    options = {"output_attentions": True, "output_hidden_states": True}
    expected = forward(model, inputs, **options)
    with patched(model, example_inputs=inputs):
        got = forward(model, inputs, **options)
    assert bitwise_equal_outputs(got, expected)
    for left, right in zip(cached(got), cached(expected), strict=True):
        assert torch.equal(left, right)


def cached(output: Any) -> list[Tensor]:
    cache = output.get("past_key_values")
    parts = [getattr(cache, name, cache) for name in ("self_attention_cache", "cross_attention_cache")]
    layers = [layer for part in parts for layer in getattr(part, "layers", ())]
    return [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gptj", "mpt", "gpt_oss"])
def test_decoding_through_the_cache_is_as_unpatched(name: str, zoo_model: Any) -> None:
    model = zoo_model(name)
    tokens = ZOO[name].inputs(model)["input_ids"]

    def decode() -> list[Tensor]:
        first = forward(model, {"input_ids": tokens[:, :8]}, use_cache=True)
        rest = forward(model, {"input_ids": tokens[:, 8:9]}, past_key_values=first.past_key_values, use_cache=True)
        return [logits_of(first), logits_of(rest)]

    expected = decode()
    with patched(model):
        assert bitwise_equal_outputs(decode(), expected)


# ----------------------------------------------------------------------------------------------------------- training


def flips(survey: SiteSurvey, location: str, seed: int = 0) -> Fault:
    spec = FaultSpec(location, bits=(22,), index=ElementIndex(row=8))
    return draw_fault(spec, survey.site(0, location), np.random.Generator(np.random.Philox(key=seed)))


def without_effect(fault: Fault) -> Fault:
    return dataclasses.replace(fault, elements=tuple(dataclasses.replace(e, toggle=0) for e in fault.elements))


def gradients(model: Any, inputs: dict[str, Tensor], faults: list[Fault]) -> dict[str, Tensor]:
    model.zero_grad()
    with injected(model, faults) as injector:
        logits: Tensor = model(**inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten()).backward()
    assert {record.fault for record in injector.records} == set(faults)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", BOTH_PATHS)
@pytest.mark.parametrize("location", OBSERVED)
def test_gradients_flow_through_faults(name: str, location: str, zoo_model: Any, survey_of: Any) -> None:
    model = zoo_model(name)
    inputs = ZOO[name].inputs(model)
    unpatched = gradients_unpatched(model, inputs)
    with patched(model):
        survey = survey_of(model, inputs)
        faults = [flips(survey, location, seed) for seed in range(3)]
        clean, faulty = gradients(model, inputs, []), gradients(model, inputs, faults)
        no_effect = gradients(model, inputs, [without_effect(fault) for fault in faults])
    assert differing(clean, unpatched) == []
    assert differing(no_effect, clean) == []
    assert faulty.keys() == clean.keys() == dict(model.named_parameters()).keys()
    assert all(bool(torch.isfinite(gradient).all()) for gradient in faulty.values())
    assert differing(faulty, clean)


def gradients_unpatched(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    logits: Tensor = model(**inputs, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.fixture(params=BOTH_PATHS)
def trained(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A patched model in training mode without dropout."""
    model = ZOO[request.param].build().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with patched(model):
        yield model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputed_activations_are_as_faulty_as_the_first(trained: Any, reentrant: bool, survey_of: Any) -> None:
    inputs = ZOO["gpt2"].inputs(trained)
    faults = [flips(survey_of(trained, inputs), "weights")]
    clean, expected = gradients(trained, inputs, []), gradients(trained, inputs, faults)
    assert differing(clean, expected)
    trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert differing(gradients(trained, inputs, []), clean) == [], "checkpointing alone changes the gradients"
    assert differing(gradients(trained, inputs, faults), expected) == [], "the recomputed pass was clean"


def test_a_miss_in_training_is_an_error_too(trained: Any, survey_of: Any) -> None:
    inputs = ZOO["gpt2"].inputs(trained)
    missed = dataclasses.replace(flips(survey_of(trained, inputs), "out"), layer=5)
    with pytest.raises(FaultMissedError, match="never reached out of layer 5"):
        gradients(trained, inputs, [missed])
