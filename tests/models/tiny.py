"""Tiny architectures of the families that are tested from training to the exported model."""

_SIZES = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
_ENCODER = _SIZES | {"intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_DECODER = (
    _SIZES | _TOKENS | {"intermediate_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2}
)
_GPT = {"vocab_size": 99, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 64} | _TOKENS
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# By task, then by model type: the settings of a teacher of 4 layers.
MASKED = {
    "bert": _ENCODER,
    "mpnet": _ENCODER,
    "deberta-v2": _ENCODER
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "modernbert": _ENCODER
    | _TOKENS
    | {
        "cls_token_id": 2,
        "sep_token_id": 3,
        "local_attention": 8,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "roberta": _ENCODER,
    "electra": _ENCODER | {"embedding_size": 24},
    "albert": _ENCODER | {"embedding_size": 24},
    "distilbert": {
        "vocab_size": 99,
        "dim": 48,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 40,
    },
}
CAUSAL = {
    "gpt2": _GPT,
    "bloom": _SIZES | _TOKENS,
    "falcon": _SIZES | _TOKENS | {"ffn_hidden_size": 64},
    "gpt_neo": _SIZES
    | _TOKENS
    | {"attention_types": [[["global", "local"], 2]], "window_size": 8, "intermediate_size": 64}
    | {"max_position_embeddings": 64},
    "gptj": _GPT | {"rotary_dim": 8},
    "opt": _SIZES | _TOKENS | {"ffn_dim": 64, "word_embed_proj_dim": 48, "max_position_embeddings": 64},
    "llama": _DECODER,
    "mistral": _DECODER | {"sliding_window": 8},
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 16},
    "qwen3_moe": _DECODER | _EXPERTS | {"head_dim": 16},
    "phi": _DECODER,
    "phi3": _DECODER,
    "gpt_neox": _SIZES | _TOKENS | {"intermediate_size": 64, "max_position_embeddings": 64},
    "stablelm": _DECODER | {"partial_rotary_factor": 0.5},
    "starcoder2": _DECODER,
    "olmo2": _DECODER,
    "smollm3": _DECODER,
    "gemma": _DECODER | {"head_dim": 16},
    "gemma2": _DECODER | {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": _DECODER | {"head_dim": 16, "sliding_window": 8},
    "gpt_oss": _DECODER
    | {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": _DECODER | {"logits_scaling": 8.0},
    "cohere": _DECODER,
    "cohere2": _DECODER | {"sliding_window": 8},
    "minicpm3": _DECODER
    | {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | {"num_key_value_heads": 4, "dim_model_base": 24},
    "deepseek_v3": _DECODER
    | {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_next": _DECODER
    | _LINEAR
    | _EXPERTS
    | {"head_dim": 16, "layer_types": _HYBRID}
    | {"shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DECODER | _LINEAR | {"head_dim": 16, "layer_types": _HYBRID},
    "lfm2": _DECODER | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "granitemoehybrid": _DECODER
    | _MAMBA
    | {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_local_experts": 0}
    | {"shared_intermediate_size": 64},
    "jamba": _DECODER
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bamba": _DECODER | _MAMBA | {"attn_layer_indices": [1, 3]},
    "falcon_h1": _DECODER | _MAMBA | {"head_dim": 12, "mamba_d_ssm": 96},
    "nemotron_h": _DECODER
    | {"layers_block_type": ["mamba", "attention", "mlp", "attention"], "head_dim": 16}
    | {"mamba_num_heads": 8, "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8},
}
# Composites of images and text; their text part is aligned.
_VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
COMPOSITES = {
    "gemma3": {
        "text_config": CAUSAL["gemma3_text"],
        "vision_config": _VISION | {"image_size": 28, "patch_size": 14},
    },
    "llama4": {
        "text_config": CAUSAL["llama"]
        | {
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "head_dim": 16,
        },
        "vision_config": _VISION | {"image_size": 28, "patch_size": 14, "vision_output_dim": 32},
    },
    "gemma4": {
        "text_config": CAUSAL["gemma3_text"] | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        "vision_config": None,
        "audio_config": None,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **CAUSAL["mistral"]},
        "vision_config": {"model_type": "pixtral", **_VISION},
    },
    "qwen3_5": {"text_config": CAUSAL["qwen3_5_text"], "vision_config": {"depth": 1, "hidden_size": 32}},
}

# Layers for a cut student of two layers: in hybrids one without attention and one with it, in this order.
_FIRST_AND_LAST = "modernbert deepseek_v3 jamba bamba nemotron_h gpt_neo granitemoehybrid lfm2"
_FIRST_AND_LAST += " qwen3_next qwen3_5_text qwen3_5 llama4"
CUT = dict.fromkeys((*MASKED, *CAUSAL, *COMPOSITES), (2, 4)) | dict.fromkeys(_FIRST_AND_LAST.split(), (1, 4))
# Settings with which a cut student's layers compute the same as in the teacher.
CONFIG = {"minicpm3": {"scale_depth": 1.4 / 2**0.5}}
# Families of every test run; `-m families` adds the others.
ALWAYS = (
    "mpnet",
    "deberta-v2",
    "bloom",
    "falcon",
    "gpt_neo",
    "gptj",
    "gpt_oss",
    "qwen3",
    "qwen3_next",
    "lfm2",
)
ALWAYS += ("gemma2", "granite")
