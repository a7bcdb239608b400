"""Dream: a Qwen2 with bidirectional attention, whose weights have Qwen2's names.

Source: Dream (arXiv 2508.15487) and the configuration that it was published with.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast  # type: ignore[attr-defined]

from ...modeling.diffusion_config import DiffusionConfig
from .base import ModelFamily, register_family, rope_theta


@register_family
class Dream(ModelFamily):
    """A family whose logits at i predict token i + 1, as in Qwen2."""

    name = "Dream"
    title = "Dream"
    model_class = Qwen2ForCausalLM
    shift = True
    tokenizer_class = Qwen2TokenizerFast

    @classmethod
    def standard_config(cls, raw: dict[str, Any]) -> Qwen2Config:
        """Return Qwen2's config: the published config, without the keys of the published code."""
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "mask_token_id"):
            raw[key]
        dropped = ("model_type", "architectures", "auto_map", "mask_token_id", "transformers_version")
        config_class: Any = Qwen2Config
        settings = {key: value for key, value in raw.items() if key not in dropped}
        return config_class(**settings, architectures=["Qwen2ForCausalLM"])  # type: ignore[no-any-return]

    @classmethod
    def published_config(cls, config: Any, diffusion_config: DiffusionConfig) -> dict[str, Any]:
        """Return Dream's config.json."""
        settings = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
        return {
            **settings,
            "rope_theta": rope_theta(config),
            "model_type": cls.name,
            "architectures": ["DreamModel"],
            "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
            "mask_token_id": diffusion_config.mask_token_id,
        }
