"""What a model says about its attention, and which models cannot have it made bidirectional."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SUCH_AS = "such as GPT-2, Llama, Qwen2, Qwen3, Mistral or Gemma"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_KNOWN_ATTENTION = ("eager", "sdpa")


class NotBidirectionalError(RuntimeError):
    """The model's attention is causal and cannot be made, or was not made, bidirectional."""


def refuse_unfit(model: nn.Module, modules: list[Any]) -> None:
    """Refuse a model that switching its attention `modules` would not make bidirectional, or not as it should be.

    Raises:
        NotBidirectionalError: naming the model, its part that does not fit and the cure.
    """
    config = text_config(model)
    kind = f"{type(model).__name__} (model_type {getattr(config, 'model_type', '?')})"
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise NotBidirectionalError(
            f"{kind} has layers of type {', '.join(sorted(unknown))}, which cannot be made bidirectional; "
            f"use a model with full or sliding-window attention, {SUCH_AS}"
        )
    if implementation(model) not in _KNOWN_ATTENTION and not is_flash(implementation(model)):
        raise NotBidirectionalError(
            f"{kind} runs attention by {implementation(model)!r}; choose flash_attn: sdpa (or fa2 or fa3, or disabled "
            "for eager)"
        )
    if not modules:
        raise NotBidirectionalError(
            f"{kind} has no attention module with an is_causal switch, so it cannot be made bidirectional; "
            f"use a model {SUCH_AS}"
        )
    recurrent = next((type(module).__name__ for module in model.modules() if _is_recurrent(module)), None)
    if recurrent is not None:
        raise NotBidirectionalError(
            f"{kind} mixes tokens by {recurrent}, which only looks back and cannot be made bidirectional; "
            f"use a model with attention alone, {SUCH_AS}"
        )
    if any((triangle := causal_triangle(module)) is not None and not triangle[..., -1, :].all() for module in modules):
        raise NotBidirectionalError(
            f"{kind} builds a local window into its attention, for which this package has no mask; "
            f"use a model {SUCH_AS}"
        )
    if getattr(config, "alibi", False):
        raise NotBidirectionalError(
            f"{kind} uses ALiBi, which would favour the tokens furthest ahead under full attention; "
            f"use a model with other positions, {SUCH_AS}"
        )


def attention_modules(model: nn.Module) -> list[Any]:
    """Return the modules that carry the switch between causal and full attention."""
    return [module for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]


def causal_triangle(module: Any) -> Tensor | None:
    """Return the boolean buffer [1, 1, positions, positions] in which an attention module keeps its causality."""
    buffer = getattr(module, "bias", None)
    return buffer if isinstance(buffer, Tensor) and buffer.dtype == torch.bool else None


def _is_recurrent(module: nn.Module) -> bool:
    """Tell whether `module` carries a state along the sequence; all kinds of it hold a depthwise convolution."""
    return any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1 for child in module.children())


def text_config(model: nn.Module) -> Any:
    """Return the part of the config that describes the decoder."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def implementation(model: nn.Module) -> str:
    """Return what computes attention, as transformers spells it."""
    return getattr(text_config(model), "_attn_implementation", None) or "eager"


def is_flash(name: str) -> bool:
    """Tell whether an implementation is a kind of flash attention, which takes no mask between queries and keys.

    transformers has it under several names: flash_attention_2, flash_attention_3, kernels-community/vllm-flash-attn3.
    """
    return "flash" in name


def window_of(model: nn.Module) -> int | None:
    """Return the sliding window in effect, or None."""
    config = text_config(model)
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
    """Return the longest sequence a model of this config was built for, or None where it does not say."""
    config = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
