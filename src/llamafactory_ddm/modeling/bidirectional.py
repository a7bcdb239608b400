"""Full attention for a causal language model, with no copied forward: a switch, the masks it needs, and a proof.

Switching `is_causal` off in the config and in every attention module is enough on transformers >= 5.5 without a mask.
Older versions, sliding windows, padding and annealing get an explicit mask: additive float, with the smallest finite
number, as a boolean one is silently wrong under eager attention. A sliding window becomes symmetric: |query - key| <
window.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..diffusion.attention import additive_mask

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_KNOWN_ATTENTION = ("eager", "sdpa", "flash_attention_2")
_READS_CONFIG = Version(transformers.__version__) >= Version("5.5.0")
_PROBE_LENGTH = 8


class NotBidirectionalError(RuntimeError):
    """The model's attention is causal and cannot be made, or was not made, bidirectional."""


def make_bidirectional(model: nn.Module) -> None:
    """Switch every attention layer of `model` to full attention, in place.

    Raises:
        NotBidirectionalError: if the model has no attention module that can be switched, or a kind of layer or an
            attention implementation that this package has no mask for.
    """
    config = _text_config(model)
    kind = f"{type(model).__name__} (model_type {getattr(config, 'model_type', '?')})"
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise NotBidirectionalError(
            f"{kind} has layers of type {', '.join(sorted(unknown))}, which cannot be made bidirectional; "
            "use a model with full or sliding-window attention, such as GPT-2, Llama, Qwen2, Qwen3, Mistral or Gemma"
        )
    if _implementation(model) not in _KNOWN_ATTENTION:
        raise NotBidirectionalError(
            f"{kind} runs attention by {_implementation(model)!r}; choose flash_attn: sdpa (or fa2, or disabled for "
            "eager)"
        )
    modules = _attention_modules(model)
    if not modules:
        raise NotBidirectionalError(
            f"{kind} has no attention module with an is_causal switch, so it cannot be made bidirectional; use a "
            "model such "
            "as GPT-2, Llama, Qwen2, Qwen3, Mistral or Gemma"
        )
    for module in modules:
        module.is_causal = False
        triangle = getattr(module, "bias", None)
        if isinstance(triangle, Tensor) and triangle.dtype == torch.bool:
            triangle.fill_(True)  # GPT-2 under transformers 4 applies its own causal buffer whatever the mask says
    for module in model.modules():
        # The warning is wrong here (padding is known from the data), and on a GPU its check waits for the device
        # every step.
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _say_nothing  # type: ignore[assignment]
    outer: Any = model.config
    outer.is_causal = config.is_causal = False


def is_bidirectional(model: nn.Module) -> bool:
    """Tell whether `make_bidirectional` has been applied; `probe_bidirectional` proves that it took effect."""
    modules = _attention_modules(model)
    return (
        bool(modules)
        and not any(m.is_causal for m in modules)
        and getattr(_text_config(model), "is_causal", True) is False
    )


def full_attention_mask(
    model: nn.Module,
    *,
    batch: int,
    length: int,
    is_padding: Tensor | None,
    visible: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Return what to pass to the model's forward as `attention_mask`.

    Args:
        model: the unwrapped model.
        batch: rows of the forward.
        length: tokens of a row.
        is_padding: [batch, length] bool, True for keys that nothing may attend to; None for no padding.
        visible: [1 or batch, 1, length, length] bool, True where a query (dim 2) may attend to a key (dim 3); None
            for all.
        dtype: of the attention's queries.
        device: of the forward.
    Returns:
        None where nothing is hidden, so that the fast kernels run; a [batch, length] mask under flash attention; an
        additive mask; or a dict of them by layer type for models that want one.
    Raises:
        ValueError: for `visible` under flash attention, which takes no mask of this form.
    """
    if _implementation(model) == "flash_attention_2":
        if visible is not None:
            raise ValueError(
                "anneal_steps needs an attention mask that flash_attn: fa2 does not take; anneal under flash_attn: "
                "sdpa, or "
                "set anneal_steps: 0"
            )
        return None if is_padding is None else (~is_padding).to(torch.int64)
    allowed = visible
    if is_padding is not None:
        keys = ~is_padding[:, None, None, :]
        allowed = keys if visible is None else visible & keys
    windowed = allowed
    window = _window(model)
    if window is not None and window < length:
        position = torch.arange(length, device=device)
        near = ((position[:, None] - position[None, :]).abs() < window)[None, None]
        windowed = near if allowed is None else allowed & near
    full, sliding = (None if mask is None else additive_mask(mask, dtype) for mask in (allowed, windowed))
    if getattr(_text_config(model), "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    if sliding is None and not _READS_CONFIG:
        return torch.zeros(1, 1, length, length, dtype=dtype, device=device)
    return sliding


@torch.no_grad()
def probe_bidirectional(model: nn.Module, *, inner: nn.Module | None = None) -> None:
    """Prove, by two forwards, that the first logits depend on the last token.

    Args:
        model: what training calls: the model itself or a wrapper of it.
        inner: the unwrapped model, by default `model`.
    Raises:
        NotBidirectionalError: if they do not.
    """
    inner = model if inner is None else inner
    device = next(inner.parameters()).device
    length = max(2, min(_PROBE_LENGTH, _window(inner) or _PROBE_LENGTH))
    one = torch.zeros(1, length, dtype=torch.int64, device=device)
    other = one.clone()
    other[:, -1] = 1
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else _dtype(inner)
    mask = full_attention_mask(
        inner, batch=1, length=length, is_padding=None, visible=None, dtype=dtype, device=device
    )
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        first, second = (
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, 0] for ids in (one, other)
        )
    finally:
        for module, mode in modes:
            module.training = mode
    if bool((first == second).all()):
        raise NotBidirectionalError(
            f"{type(inner).__name__} under {_implementation(inner)!r} attention still attends causally: changing "
            "the last token "
            f"does not move the first logits (transformers {transformers.__version__}). It cannot be trained or "
            "sampled as a "
            "diffusion model; try flash_attn: sdpa or flash_attn: disabled, or another model"
        )


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that only warns."""


def _attention_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _implementation(model: nn.Module) -> str:
    return getattr(_text_config(model), "_attn_implementation", None) or "eager"


def _window(model: nn.Module) -> int | None:
    """Return the sliding window in effect, or None."""
    config = _text_config(model)
    layers = getattr(config, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        return None
    if not layers and getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def _dtype(model: nn.Module) -> torch.dtype:
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    return dtype
