"""Tiny random models of transformers' own causal language model classes, each from its configuration class."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCAB_SIZE = 96

# Sizes by the names configurations have for them; each class takes those it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input", "byte_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"), 32
    ),
    **dict.fromkeys(("embedding_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    "word_embed_proj_dim": 32,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_inner", "dff", "ffn_hidden_size", "dim_ff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "decoder_max_length"), 64),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("depth", "vision_layers", "num_channels_in", "encoder_layers"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_ssm": 64,
    "image_size": 28,
    "patch_size": 14,
    "head_dim_global": 8,
    "global_head_dim": 8,
    "dim_head": 8,
    "hidden_size_per_layer_input": 16,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "is_decoder": True,
    "tie_word_embeddings": False,
}

# What single classes need besides.
NEEDED: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}


def config(model_type: str, **overrides: Any) -> Any:
    """A tiny configuration; `overrides` of nested parts as dictionaries."""
    kind = config_class(model_type)
    return kind(**_settings(kind, {**NEEDED.get(model_type, {}), **overrides}))


def model(model_type: str, model_class: Any = None, dtype: torch.dtype | None = None, **overrides: Any) -> Any:
    """A tiny model with random weights large enough that its logits differ, in eval mode."""
    torch.manual_seed(0)
    settings = config(model_type, **overrides)
    model_class = model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
    if not isinstance(settings, model_class.config_class):
        settings = settings.get_text_config()  # the language model of an image model
    built = model_class(settings)
    return built.to(dtype).eval() if dtype else built.eval()


def config_class(model_type: str) -> Any:
    return type(AutoConfig.for_model(model_type))


def _settings(kind: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    known = kind().to_dict()
    settings = {name: value for name, value in SIZES.items() if name in known or name == "is_decoder"}
    for name, value in known.items():
        if isinstance(value, dict) and value.get("model_type"):
            part = config_class(value["model_type"])
            settings[name] = {**_settings(part, overrides.get(name, {})), "model_type": value["model_type"]}
    return {**settings, **{name: value for name, value in overrides.items() if name not in settings or name in SIZES}}
