"""Facts about a model, from its config: attention implementation, sliding window, dtype, positions."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def text_config(model: nn.Module) -> Any:
    """Return the part of the config that describes the decoder."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def implementation(model: nn.Module) -> str:
    """Return the attention implementation as transformers names it, such as eager or sdpa."""
    return getattr(text_config(model), "_attn_implementation", None) or "eager"


def is_flash(name: str) -> bool:
    """Tell whether an implementation is flash attention, which takes no mask of [query, key].

    transformers has several names for it: flash_attention_2, flash_attention_3, kernels-community/vllm-flash-attn3.
    """
    return "flash" in name


def window_of(model: nn.Module) -> int | None:
    """Return the sliding window in effect, or None."""
    return window_of_config(text_config(model))


def window_of_config(config: Any) -> int | None:
    """Return the sliding window of a model with this config, or None."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(config, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        return None
    if not layers and getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the model's weights."""
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    return dtype


def max_positions(config: Any) -> int | None:
    """Return the largest number of positions of a model with this config, or None if the config has no limit."""
    config = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def rotary_limit(model: nn.Module) -> int | None:
    """Return the length from which on a model with longrope embeddings (Phi-3) takes other frequencies, else None.

    The model decides by the largest position of a forward pass.
    """
    config = text_config(model)
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    limit: int | None = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return limit


def weights_digest(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that identify the weights: of SHA-256 of each one's name, type, shape and bytes."""
    whole = hashlib.sha256()
    for name, value in model.named_parameters():
        content = value.detach().reshape(-1).contiguous().cpu()
        whole.update(json.dumps([name, str(content.dtype), list(value.shape)]).encode())
        whole.update(content.view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]
