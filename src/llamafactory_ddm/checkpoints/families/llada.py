"""LLaDA: a Llama without biases and with bidirectional attention, whose weights have names of their own.

Source: LLaDA (arXiv 2502.09992) and the configuration that it was published with.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ...modeling.diffusion_config import DiffusionConfig
from .base import ModelFamily, WeightNames, register_family, rope_theta

_BLOCK, _LAYER = "model.transformer.blocks.{n}.", "model.layers.{n}."
WEIGHT_NAMES = WeightNames(
    "LLaDA",
    (
        ("model.transformer.wte.", "model.embed_tokens."),
        ("model.transformer.ln_f.", "model.norm."),
        ("model.transformer.ff_out.", "lm_head."),
        (_BLOCK + "attn_norm.", _LAYER + "input_layernorm."),
        (_BLOCK + "ff_norm.", _LAYER + "post_attention_layernorm."),
        (_BLOCK + "q_proj.", _LAYER + "self_attn.q_proj."),
        (_BLOCK + "k_proj.", _LAYER + "self_attn.k_proj."),
        (_BLOCK + "v_proj.", _LAYER + "self_attn.v_proj."),
        (_BLOCK + "attn_out.", _LAYER + "self_attn.o_proj."),
        (_BLOCK + "ff_proj.", _LAYER + "mlp.gate_proj."),
        (_BLOCK + "up_proj.", _LAYER + "mlp.up_proj."),
        (_BLOCK + "ff_out.", _LAYER + "mlp.down_proj."),
    ),
)
# Settings of LLaDA that Llama also has; Llama does not support other values.
_REQUIRED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "rope": True,
    "scale_logits": False,
}


@register_family
class Llada(ModelFamily):
    """A family whose logits at i predict token i."""

    name = "llada"
    title = "LLaDA"
    model_class = LlamaForCausalLM
    shift = False
    weight_names = WEIGHT_NAMES
    tokenizer_class = PreTrainedTokenizerFast

    @classmethod
    def standard_config(cls, raw: dict[str, Any]) -> LlamaConfig:
        """Return Llama's config for LLaDA's settings."""
        unsupported = {key: raw[key] for key, value in _REQUIRED.items() if raw.get(key, value) != value}
        if unsupported:
            settings = ", ".join(f"{key}: {value!r}" for key, value in unsupported.items())
            raise ValueError(
                f"config.json of this LLaDA model has {settings}, which Llama does not support; "
                f"it must be {', '.join(f'{key}: {_REQUIRED[key]!r}' for key in unsupported)}"
            )
        heads = int(raw["n_heads"])
        config_class: Any = LlamaConfig
        return config_class(  # type: ignore[no-any-return]
            vocab_size=int(raw.get("embedding_size") or raw["vocab_size"]),
            hidden_size=int(raw["d_model"]),
            intermediate_size=int(raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"]),
            num_hidden_layers=int(raw["n_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=1 if raw.get("multi_query_attention") else int(raw.get("n_kv_heads") or heads),
            max_position_embeddings=int(raw["max_sequence_length"]),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=float(raw["rope_theta"]),
            tie_word_embeddings=bool(raw.get("weight_tying", False)),
            attention_bias=False,
            mlp_bias=False,
            hidden_act="silu",
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=raw["eos_token_id"],
            pad_token_id=raw.get("pad_token_id"),
            architectures=["LlamaForCausalLM"],
            **{key: raw[key] for key in ("quantization_config",) if key in raw},
        )

    @classmethod
    def published_config(cls, config: Any, diffusion_config: DiffusionConfig) -> dict[str, Any]:
        """Return LLaDA's config.json."""
        names = ("AutoModel", "AutoModelForCausalLM")
        code = {"AutoConfig": "configuration_llada.LLaDAConfig", **dict.fromkeys(names, "modeling_llada.LLaDAModelLM")}
        return {
            **_REQUIRED,
            "alibi_bias_max": 8.0,
            "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0,
            "attention_layer_norm_with_affine": True,
            "auto_map": code,
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "d_model": config.hidden_size,
            "embedding_dropout": 0.0,
            "embedding_size": config.vocab_size,
            "eos_token_id": config.eos_token_id,
            "flash_attention": False,
            "init_cutoff_factor": None,
            "init_device": "meta",
            "init_fn": "mitchell",
            "init_std": config.initializer_range,
            "layer_norm_with_affine": True,
            "mask_token_id": diffusion_config.mask_token_id,
            "max_sequence_length": config.max_position_embeddings,
            "mlp_hidden_size": config.intermediate_size,
            "mlp_ratio": 4,
            "model_type": cls.name,
            "multi_query_attention": None,
            "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads,
            "n_layers": config.num_hidden_layers,
            "pad_token_id": config.pad_token_id,
            "precision": "amp_bf16",
            "residual_dropout": 0.0,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_full_precision": True,
            "rope_theta": rope_theta(config),
            "use_cache": False,
            "vocab_size": config.vocab_size,
            "weight_tying": bool(config.tie_word_embeddings),
        }
