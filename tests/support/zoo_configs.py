"""Configurations of the zoo: one tiny model of every attention architecture that the harness covers.

The comments say what transformers 5.23 does between QK^T and PV with ``attn_implementation="eager"``. There
"fp32 softmax" means ``softmax(logits, dtype=float32).to(query.dtype)``, and "native softmax" that the weights
are computed in the dtype of the logits.

>>> SPECIES["gpt2"].model
'GPT2LMHeadModel'
>>> sum(species.path == "R" for species in SPECIES.values())
12
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 96
LENGTH = 12
MEL_BINS = 8
IMAGE_TOKEN = VOCABULARY - 1
VISION_START_TOKEN = VOCABULARY - 2

# Identifiers 0 to 2 are special everywhere; the inputs are drawn above them.
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    **_SPECIAL,
}
_DENSE: dict[str, Any] = {**_BASE, "intermediate_size": 48}
_GROUPED: dict[str, Any] = {**_DENSE, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class Species:
    """One row of the zoo: how to build a model, which inputs it takes, and what the harness must find in it.

    ``options`` are the arguments of the configuration class ``config``, ``sub_configs`` those of its parts;
    ``inputs`` names one of the input builders of ``zoo.py``; ``cores`` counts the modules that evaluate
    attention and ``calls`` the evaluations of one forward (None: as many as cores); ``gain`` scales the
    weight matrices.
    """

    model: str
    config: str
    options: Mapping[str, Any]
    path: str = "A"
    kind: str = "decoder"
    inputs: str = "tokens"
    cores: int = 2
    calls: int | None = None
    gain: float = 1.5
    sub_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# One row of sizes for each architecture that names them in its own way.
# fmt: off
_INTERNLM3: dict[str, Any] = {**_GROUPED, "head_dim": 8, "attention_bias": True, "mlp_bias": True}
_GPT2: dict[str, Any] = {**_BASE, "n_inner": 48}
_BERT: dict[str, Any] = {**_DENSE, "type_vocab_size": 2}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 32,
}
_LATENT: dict[str, Any] = {
    **_DENSE, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1,
}
_GEMMA: dict[str, Any] = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": _ALTERNATING}
_GEMMA4: dict[str, Any] = {
    **_GEMMA, "global_head_dim": 10,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}
_VISION_TEXT: dict[str, Any] = {
    **_GROUPED,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
}
_TOWER: dict[str, Any] = {
    "depth": 2, "num_heads": 4, "in_channels": 3, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_TOWER2: dict[str, Any] = {**_TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
_TOWER2_5: dict[str, Any] = {
    **_TOWER, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "window_size": 16,
    "fullatt_block_indexes": [1],
}
_VISION_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN, "vision_start_token_id": VISION_START_TOKEN,
    "video_token_id": VOCABULARY - 3, "vision_end_token_id": VOCABULARY - 4,
}
_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0,
}
_WHISPER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "num_mel_bins": MEL_BINS, "max_source_positions": LENGTH,
    "max_target_positions": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
    "suppress_tokens": None, "begin_suppress_tokens": None, **_SPECIAL,
}
_VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 12, "patch_size": 4, "num_channels": 3,
}
_GPT_OSS: dict[str, Any] = {
    **_GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
    "layer_types": _ALTERNATING,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
    },
}
_MODERNBERT: dict[str, Any] = {
    **_DENSE, "local_attention": 6, "layer_types": _ALTERNATING, "cls_token_id": 1, "sep_token_id": 2,
}
_GPT_NEO: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "window_size": 4,
    **_SPECIAL,
}
_GPTJ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "rotary_dim": 4,
    "n_positions": 32, **_SPECIAL,
}
_BLOOM: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL}
_FALCON: dict[str, Any] = {
    **_BASE, "ffn_hidden_size": 48, "alibi": False, "new_decoder_architecture": False, "bias": False,
}
_MPT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32,
    "expansion_ratio": 2, **_SPECIAL,
}
# fmt: on


def _gpt2(**changes: Any) -> Species:
    options = {**_GPT2, **changes.pop("options", {})}
    return Species("GPT2LMHeadModel", "GPT2Config", options, gain=2.0, **changes)


def _bert(**changes: Any) -> Species:
    return Species("BertForMaskedLM", "BertConfig", _BERT, kind="encoder", **changes)


def _llama(options: Mapping[str, Any], **changes: Any) -> Species:
    return Species("LlamaForCausalLM", "LlamaConfig", options, **changes)


def _falcon(inputs: str = "tokens", **options: Any) -> Species:
    return Species("FalconForCausalLM", "FalconConfig", {**_FALCON, **options}, path="R", inputs=inputs)


def _t5(inputs: str) -> Species:
    model, config = "T5ForConditionalGeneration", "T5Config"
    return Species(model, config, _T5, kind="encoder-decoder", inputs=inputs, cores=6, gain=1.0)


def _qwen(name: str, tower: Mapping[str, Any], calls: int) -> Species:
    return Species(
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        _VISION_TOKENS,
        kind="vision-language",
        inputs="image_and_tokens",
        cores=4,
        calls=calls,
        sub_configs={"text_config": _VISION_TEXT, "vision_config": tower},
    )


SPECIES: dict[str, Species] = {
    # Native softmax, then cast to value.dtype; learned positions; fused c_attn (Conv1D).
    "gpt2": _gpt2(),
    "gpt2-padded": _gpt2(inputs="tokens_right_padded"),
    # scaling is divided by layer_idx + 1 before the call.
    "gpt2-inverse-layer": _gpt2(options={"scale_attn_by_inverse_layer_idx": True}),
    # Dispatches only when the implementation is not named "eager": with eager its own method runs
    # torch.baddbmm over (B*H, T, D) in fp32 with alpha=scaling, and an fp32 softmax. Hence path R.
    "gpt2-upcast": _gpt2(path="R", options={"reorder_and_upcast_attn": True}),
    "gpt2-upcast-inverse-layer": _gpt2(
        path="R", options={"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}
    ),
    # Native softmax; the mask is None without padding; modules without layer_idx.
    "distilbert": Species("DistilBertForMaskedLM", "DistilBertConfig", _DISTILBERT, kind="encoder"),
    # Native softmax; the mask is None without padding.
    "bert": _bert(),
    "bert-padded": _bert(inputs="tokens_right_padded"),
    "roberta": Species("RobertaForMaskedLM", "RobertaConfig", _BERT, kind="encoder"),
    # fp32 softmax; the query is scaled before, scaling=1.
    "opt": Species("OPTForCausalLM", "OPTConfig", {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    # fp32 softmax; partial rotary; fused query_key_value per head.
    "gpt_neox": Species("GPTNeoXForCausalLM", "GPTNeoXConfig", _DENSE),
    # fp32 softmax; k and v repeated inside the eager function.
    "llama": _llama({**_DENSE, "num_key_value_heads": 4}),
    "llama-gqa": _llama(_GROUPED),
    "llama-left-padded": _llama(_GROUPED, inputs="tokens_left_padded"),
    # In 5.23 a configuration only: the model is LlamaForCausalLM.
    "internlm3": Species("LlamaForCausalLM", "InternLM3Config", _INTERNLM3),
    # As llama; the window is in the mask, so whole bands of keys are invisible.
    "mistral": Species("MistralForCausalLM", "MistralConfig", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "qwen2": Species("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    # RMSNorm over each head of q and k before the rotation.
    "qwen3": Species("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "gemma": Species("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 8}),
    # softcap: logits / cap, tanh, * cap between the scaling and the mask.
    "gemma2": Species(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GEMMA, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
    ),
    "gemma3": Species("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA, "query_pre_attn_scalar": 8}),
    # scaling=1 (q and k are normed), head_dim 8 in the sliding and 10 in the full layer.
    "gemma4": Species("Gemma4ForCausalLM", "Gemma4TextConfig", _GEMMA4),
    # The last two layers reuse the very k and v tensors of the first two.
    "gemma4-shared-kv": Species(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {**_GEMMA4, "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2, "num_kv_shared_layers": 2},
        cores=4,
    ),
    "phi": Species("PhiForCausalLM", "PhiConfig", _GROUPED),
    # Fused qkv_proj in blocks (H, H_kv, H_kv).
    "phi3": Species("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    # RMSNorm over the whole projection of q and k.
    "olmo2": Species("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "starcoder2": Species("Starcoder2ForCausalLM", "Starcoder2Config", _GROUPED),
    # MLA: k, v per head, D = 10, D_v = 6; layer 1 is a mixture of experts, its router has a softmax too.
    "deepseek_v2": Species("DeepseekV2ForCausalLM", "DeepseekV2Config", {**_LATENT, "topk_method": "greedy"}),
    # MLA; the router is a sigmoid.
    "deepseek_v3": Species("DeepseekV3ForCausalLM", "DeepseekV3Config", _LATENT),
    # Native softmax, scaling=1, position_bias added before the mask; encoder, decoder and cross attention.
    "t5": _t5("tokens_pair"),
    "t5-padded": _t5("tokens_pair_padded"),
    # Native softmax, the query is scaled before, scaling=1; mask None in the encoder and in cross attention.
    "whisper": Species(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _WHISPER,
        kind="encoder-decoder",
        inputs="audio",
        cores=6,
    ),
    # fp32 softmax, mask None; modules without layer_idx.
    "vit": Species("ViTModel", "ViTConfig", _VIT, kind="vision", inputs="image"),
    # Vision: one call per image, batch 1, mask None, no layer_idx; text as llama.
    "qwen2_vl": _qwen("Qwen2VL", _TOWER2, calls=6),
    # Vision: layer 0 one call per window (1 + 2), layer 1 one per image.
    "qwen2_5_vl": _qwen("Qwen2_5_VL", _TOWER2_5, calls=7),
    # A sink column is concatenated to the logits, the row maximum subtracted, softmax in the logits' dtype.
    "gpt_oss": Species("GptOssForCausalLM", "GptOssConfig", _GPT_OSS),
    # fp32 softmax; bidirectional window in the mask of the sliding layer.
    "modernbert": Species("ModernBertForMaskedLM", "ModernBertConfig", _MODERNBERT, kind="encoder"),
    # q and k cast to fp32, torch.where with the buffer `bias` (layer 1: window 4), the mask added on top (so
    # masked logits are -inf), native (so fp32) softmax.
    "gpt_neo": Species("GPTNeoForCausalLM", "GPTNeoConfig", _GPT_NEO, path="R", gain=1.0),
    # q and k cast to fp32, scores divided by sqrt(D), native (so fp32) softmax.
    "gptj": Species("GPTJForCausalLM", "GPTJConfig", _GPTJ, path="R"),
    # alibi.baddbmm over (B*H, T, D), fp32 softmax, torch.bmm.
    "bloom": Species("BloomForCausalLM", "BloomConfig", _BLOOM, path="R"),
    "bloom-padded": Species("BloomForCausalLM", "BloomConfig", _BLOOM, path="R", inputs="tokens_left_padded"),
    # Scores divided in place, softmax in the dtype of the hidden states; one key and value head.
    "falcon-rotary": _falcon(multi_query=True),
    # Scores cast to fp32, alibi added, then the scale in place; softmax in the dtype of the hidden states. The
    # mask is (B, H, T, S) and holds the scaled alibi of the visible keys, which is thus added twice.
    "falcon-alibi": _falcon(alibi=True, multi_query=False, bias=True),
    "falcon-alibi-padded": _falcon(inputs="tokens_left_padded", alibi=True, multi_query=False, bias=True),
    # Grouped keys and values, broadcast to all heads before the cache.
    "falcon-new": _falcon(new_decoder_architecture=True, num_kv_heads=2),
    # scores * scale + alibi, masked_fill with a boolean mask, softmax(x.float()) cast to value.dtype.
    "mpt": Species("MptForCausalLM", "MptConfig", _MPT, path="R"),
    "mpt-padded": Species("MptForCausalLM", "MptConfig", _MPT, path="R", inputs="tokens_right_padded"),
}
