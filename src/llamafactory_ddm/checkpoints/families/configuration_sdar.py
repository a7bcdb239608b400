"""Configuration of SDAR: that of Qwen3, under SDAR's model type.

`llamafactory-ddm convert --published sdar` copies this file beside config.json, whose auto_map names it. Inference
engines read the configuration through it, with `trust_remote_code`, and compute the model with code of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Qwen3's configuration with SDAR's further keys, such as block_size and mask_token_id, as attributes."""

    model_type = "sdar"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # transformers 5 keeps the base in rope_parameters alone, but engines read this attribute.
        parameters = getattr(self, "rope_parameters", None)
        if parameters:
            self.rope_theta = parameters["rope_theta"]
