"""Projections that are not what they look like are recognised, never judged (findings of a fresh reader)."""

import pytest
import torch
from attention_states import random_state
from micro_campaign import micro_gpt2
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
)
from zoo import ZOO

from bounds import get_detector
from experiments.errors import CheckRefusedError
from experiments.passes.taps.corrector import Corrector
from fault_injection import SiteSurvey, patched, tapped
from fault_injection.operands.finding import operand_sources


class Clipped(nn.Linear):
    """Computes something else than its weight says."""

    def forward(self, hidden):
        return super().forward(hidden).clamp(-0.01, 0.01)


def small_llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 50}
    config = LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager")
    return LlamaForCausalLM(config).eval()


def test_a_linear_subclass_that_computes_something_else_is_not_judged():
    model = small_llama()
    attention = model.model.layers[0].self_attn
    clipped = Clipped(16, attention.v_proj.out_features, bias=False)
    clipped.weight = attention.v_proj.weight
    attention.v_proj = clipped
    reasons = {}
    with patched(model):
        for name in ("P_v", "P_k"):
            detector = get_detector(name)
            detector.prepare(model)
            reasons[name] = detector._prepared["model.layers.0.self_attn"]
    assert "does not compute x.W + b" in reasons["P_v"] or "not recognised" in reasons["P_v"]
    assert not isinstance(reasons["P_k"], str)


def test_a_scale_that_depends_on_the_row_of_a_long_sequence_is_not_judged():
    # Layers without rotation scale their queries by log(row / floor_scale + 1) + 1: 1 in short sequences.
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Llama4TextConfig(**size, **heads, **tokens, floor_scale=64, attn_implementation="eager")
    sources = operand_sources(Llama4ForCausalLM(config).eval())
    unrotated = [f"model.layers.{i}.self_attn" for i, rotated in enumerate(config.no_rope_layers) if not rotated]
    assert unrotated
    for name in unrotated:
        assert isinstance(sources[name]["q"], str)
        assert "scaled by their row" in sources[name]["q"]
        assert not isinstance(sources[name]["v"], str)


def test_a_scale_that_depends_on_positions_is_found_far_from_the_beginning():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 1024}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}
    rotation = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64}
    scale = {"llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = Ministral3Config(**size, **heads, **tokens, rope_parameters=rotation | scale)
    sources = operand_sources(Ministral3ForCausalLM(config).eval())["model.layers.0.self_attn"]
    assert isinstance(sources["q"], str)
    assert not isinstance(sources["k"], str)


@pytest.mark.parametrize("name", ["S_row", "S_col", "O_row", "O_hull", "q@o"])
def test_under_autocast_products_are_not_judged(name):
    state = random_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in get_detector(name).check(state).reason
    assert get_detector(name).check(state).applicable


def test_under_autocast_nothing_is_corrected():
    model = micro_gpt2()
    inputs = {"input_ids": torch.randint(3, 300, (1, 8))}
    with patched(model), torch.no_grad():
        survey = SiteSurvey(torch.float32)
        with tapped(model, survey):
            model(**inputs)
        corrector = Corrector(survey.visible)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
        with autocast, tapped(model, corrector), pytest.raises(CheckRefusedError, match="autocast"):
            model(**inputs)


def test_a_survey_works_in_inference_mode(zoo_model):
    model = zoo_model("falcon-rotary")
    inputs = ZOO["falcon-rotary"].inputs(model)
    with patched(model, example_inputs=inputs), torch.inference_mode():
        survey = SiteSurvey(torch.float32)
        with tapped(model, survey):
            model(**inputs)
    assert survey.overwritten
