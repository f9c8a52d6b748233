"""What makes any transformers configuration tiny and unusual: tables of field names, and what few models need besides.

A rule belongs to a field's name, never to a model, unless a model cannot be built with the rules alone.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

VOCABULARY = 96
FREE_TOKENS = (3, 80)  # what inputs are drawn from: no special token, no placeholder of an image
_SPECIAL = {"pad": 0, "eod": 0, "bos": 1, "decoder_start": 1, "eos": 2, "forced_eos": 2, "sep": 2, "cls": 1}

_BY_VALUE: dict[Any, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input "
    "encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base",
    32: "hidden_size d_model n_embd emb_dim embedding_size lru_width mamba_d_ssm attention_hidden_size out_hidden_size "
    "pronunciation_embed_dim shape_embed_dim mm_embed_dim mm_posemb_size position_embedding_size "
    "adapter_in_dim adapter_out_dim adapter_input_size hidden_size_global input_embedding_size output_embedding_size "
    "embedding_dim word_embed_proj_dim linear_num_heads",
    48: "intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim dim_ff dff d_inner n_inner ffn_hidden_size d_ff "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim "
    "shared_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size prefix_dense_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks num_key_value_heads num_kv_heads linear_num_key_heads linear_num_value_heads "
    "num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts topk_group n_group index_n_heads mamba_n_groups "
    "n_groups num_codebooks o_groups swa_num_key_value_heads conf_num_hidden_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts conf_num_attention_heads mamba_num_heads "
    "zero_expert_num index_topk mamba_n_heads rotary_dim",
    1: "first_k_dense_replace moe_layer_start_index num_dense_layers n_shared_experts num_shared_experts "
    "moe_num_shared_experts",
    8: "head_dim global_head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim d_head dim_head swa_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim kv_channels attention_head_size "
    "mamba_head_dim hidden_size_per_layer_input query_pre_attn_scalar attention_head_dim "
    "mamba_d_state state_size ssm_state_size chunk_size mamba_chunk_size time_step_rank mamba_dt_rank "
    "router_hidden_size adapter_rank o_lora_rank hc_lowrank block_multiple_of dim_model_base image_seq_length",
    16: "kv_lora_rank q_lora_rank sliding_window sliding_window_size attention_window_size window_size block_size "
    "image_size patch_size rel_extent",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "max_source_positions num_position_embeddings original_max_position_embeddings",
}
SMALL: dict[str, Any] = {name: value for value, names in _BY_VALUE.items() for name in names.split()}

# Every number that scales or caps something, and every bias that may be left out.
_FACTOR = re.compile(r"scal(e|ing)|multiplier|soft_?cap|mup|(^|_)factor|_alpha$")
_NO_FACTOR = re.compile(r"init|rope|rotary|jitter|feature|n_floor|time_step|downsample|swiglu")
_BIAS = re.compile(r"bias$")
UNUSUAL: dict[str, Any] = {
    "final_logit_softcapping": 3.5,
    "logits_soft_cap": 3.5,
    "output_logit_soft_cap": 3.5,
    "attn_logit_softcapping": 5.5,
    "logit_scale": 0.37,
    "logits_scaling": 1.9,
    "lm_head_multiplier": 0.6,
    "output_router_logits": True,
    "scale_embedding": True,
    "mup_enabled": True,
    "rescale_embeddings": True,
    "is_decoder": True,
    "unpadded_vocab_size": VOCABULARY - 5,
    "no_bias": False,
    "initializer_range": 0.2,
    "init_std": 0.2,
}
_OFF = re.compile(r"dropout|pdrop|layerdrop|jitter")

# What hybrid models have four or eight layers for by default.
_BOTH = ["linear_attention", "full_attention"]

# model type -> field values; a dotted name reaches into a nested configuration
OVERRIDES: dict[str, dict[str, Any]] = {
    # Patterns of layers that the defaults write for the full depth only.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [3, 4],  # their product is the length of a training row
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 1,
        "num_buckets": 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4, "n_mamba_heads": 4},
    "dots3_note": {"vision_config.mlp_layer_types": ["dense", "sparse"]},
    "flint": {"mlp_only_layers": [0]},
    "bailing_hybrid": {"layer_types": _BOTH},
    "kimi_linear": {"layer_types": _BOTH},
    "qwen3_5_text": {"layer_types": _BOTH},
    "qwen3_5_moe_text": {"layer_types": _BOTH},
    "qwen3_next": {"layer_types": _BOTH},
    "qwen4_exp_text": {
        "layer_types": _BOTH,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": _BOTH},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # All layers are full by default.
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 2},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "gemma4_unified_assistant": {
        "text_config.num_hidden_layers": 4,
        "text_config.num_kv_shared_layers": 2,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # Numbers that have to fit one another.
    "mamba2": {"head_dim": 16},
    # Its checkpoints have all three, its defaults have none.
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.kv_n_heads": 2, "attn_config.clip_qkv": 8.0},
    "falcon_h1": {"mlp_multipliers": [0.7, 1.3], "ssm_multipliers": [0.6, 0.8, 1.2, 1.4, 1.6]},
    "dots3_note_text": {"head_dim": 16},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 2.0, "hidden_size": 64, "embedding_dim": 64},
    "zaya": {"num_experts_per_tok": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "xmod": {"default_language": "en_XX"},
}


def _small(name: str, kind: str, default: Any, text: bool) -> Any:
    """The value of field `name`, annotated `kind`; `...` to leave it alone."""
    if name in UNUSUAL and text:
        return UNUSUAL[name]
    if name in SMALL:
        return SMALL[name]
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if _OFF.search(name) and number:
        return type(default)(0)
    if re.search(r"_(token_)?(id|index)$", name) and number:
        return _SPECIAL.get(re.sub(r"_(token_)?(id|index)$", "", name), VOCABULARY - 1)
    if not text:
        return ...
    if _BIAS.search(name) and default is False:
        return True
    if _FACTOR.search(name) and not _NO_FACTOR.search(name) and "float" in kind and (number or default is None):
        return round(1.3 * (default or 0), 6) or 0.7
    return ...


def shrunk_fields(config_class: type[PreTrainedConfig], changes: dict[str, Any], text: bool = True) -> dict[str, Any]:
    """What to give this configuration class to be tiny and unusual; `changes` win over the rules."""
    own = {name: value for name, value in changes.items() if "." not in name}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name in config_class.sub_configs or not field.init:
            continue
        default = None if field.default is dataclasses.MISSING else field.default
        value = _small(field.name, str(field.type), default, text)
        if value is not ...:
            values[field.name] = value
    if "kv_lora_rank" in values:  # latent attention keeps a key for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, sub_class in config_class.sub_configs.items():
        if name in own:
            continue
        nested = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{name}.")}
        nested_text = text and not re.search("vision|audio|vq|encoder", name)
        if nested_text and "tie_word_embeddings" in own:
            nested["tie_word_embeddings"] = own["tie_word_embeddings"]
        model_type = None
        if sub_class is AutoConfig and not hasattr(config_class, "sub_configs_defaults"):
            continue  # an older release, whose configuration makes its own
        if sub_class is AutoConfig:
            model_type = config_class.sub_configs_defaults[name].model_type
            sub_class = CONFIG_MAPPING[model_type]
        known = OVERRIDES.get(sub_class.model_type, {})
        values[name] = shrunk_fields(sub_class, {**known, **nested}, nested_text)
        if model_type is not None:
            values[name]["model_type"] = model_type
    return {**values, **own}


def shrink(model_type: str, tied: bool) -> PreTrainedConfig:
    """A tiny, unusual configuration of this model type."""
    config_class = CONFIG_MAPPING[model_type]
    changes = {"tie_word_embeddings": tied, **OVERRIDES.get(model_type, {})}
    return config_class(**shrunk_fields(config_class, changes))
