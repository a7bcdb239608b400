"""Full attention for a causal language model: a switch, the masks it needs, and a test that it took effect.

No model's forward is copied. On transformers >= 5.5 it is enough to set `is_causal` to False in the config and in
every attention module. Older versions, sliding windows, padding and annealing need an explicit mask: additive float
with the smallest finite number, as a boolean mask is silently wrong under eager attention. A sliding window becomes
symmetric, |query - key| < window (the rule of flash attention too), in the layers that have one; other layers attend
to all positions.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..diffusion.attention import additive_mask
from .model_info import dtype_of, implementation, is_flash, text_config, window_of
from .model_info import implementation as _implementation
from .quantization import evaluation_mode

__all__ = [
    "NotBidirectionalError",
    "full_attention_mask",
    "is_bidirectional",
    "make_bidirectional",
    "probe_bidirectional",
]

_READS_CONFIG = Version(transformers.__version__) >= Version("5.5.0")
_PROBE_LENGTH = 8
# Further outputs that a config can request. A router's loss needs a mask of another form, and is not used.
_OUTPUTS = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}


def make_bidirectional(model: nn.Module) -> None:
    """Switch every attention layer of `model` to full attention, in place.

    Raises:
        NotBidirectionalError: if the model has no attention module that can be switched, a type of layer or an
            attention implementation without a mask here, or a part that is one-directional without attention. The
            model is then unchanged.
    """
    modules = attention_modules(model)
    refuse_unfit(model, modules)
    for module in modules:
        module.is_causal = False
        triangle = causal_triangle(module)
        if triangle is not None:
            triangle.fill_(True)  # GPT-2 under transformers 4 also applies its own causal buffer
    for module in model.modules():
        # The warning is wrong here (padding is known from the data), and on a GPU its check waits for the device
        # every step.
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _say_nothing  # type: ignore[assignment]
    for config in (model.config, text_config(model)):
        config.is_causal = False  # type: ignore[union-attr]
        for name, value in _OUTPUTS.items():
            if getattr(config, name, value) != value:
                setattr(config, name, value)


def is_bidirectional(model: nn.Module) -> bool:
    """Tell whether `make_bidirectional` has been applied; `probe_bidirectional` proves that it took effect."""
    modules = attention_modules(model)
    return (
        bool(modules)
        and not any(m.is_causal for m in modules)
        and getattr(text_config(model), "is_causal", True) is False
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
    document: Tensor | None = None,
) -> Any:
    """Return the `attention_mask` argument of the model's forward.

    Rows padded on the left also need `position_ids` that start at their first real token, and packed rows need
    `position_ids` that start at 0 in each document; this function returns neither.

    Args:
        model: the unwrapped model.
        batch: rows of the forward.
        length: tokens of a row.
        is_padding: [batch, length] bool, True for keys that no real token may attend to; None for no padding (a test
            for all False would wait for the device).
        visible: [1 or batch, 1, length, length] bool, True where a query (dim 2) may attend to a key (dim 3); None
            for all. A token must see itself.
        dtype: of the attention's queries.
        device: of the forward.
        document: [batch, length] int64, index of the packed document of each token; documents do not attend to one
            another.
    Returns:
        None if every query sees every key, so that the fast kernels run; a [batch, length] mask under flash attention;
        an additive mask, [1 or batch, 1, 1 or length, length]; or a dict of these by layer type for models that take
        one.
    Raises:
        ValueError: for `visible` or `document` under flash attention, which takes no mask of this form, or for a
            mask whose shape is not that of the forward.
    """
    for name, given in (("is_padding", is_padding), ("document", document)):
        if given is not None and given.shape != (batch, length):
            raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {(batch, length)}")
    if visible is not None and (visible.shape[0] not in (1, batch) or visible.shape[1:] != (1, length, length)):
        raise ValueError(f"visible has shape {tuple(visible.shape)}, expected (1 or {batch}, 1, {length}, {length})")
    if is_flash(_implementation(model)):
        if visible is not None:
            raise ValueError(
                "anneal_steps needs an attention mask that flash attention (flash_attn: fa2, fa3) does not take; "
                "anneal under flash_attn: sdpa, or set anneal_steps: 0"
            )
        if document is not None:
            raise ValueError(
                "packing keeps documents apart by an attention mask that flash attention (flash_attn: fa2, fa3) does "
                "not take; set flash_attn: sdpa, or packing: false"
            )
        return None if is_padding is None else (~is_padding).to(torch.int64)
    allowed = visible
    if document is not None:
        together = (document[:, :, None] == document[:, None, :])[:, None]
        allowed = together if allowed is None else allowed & together
    if is_padding is not None:
        keys = ~is_padding[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    windowed = allowed
    window = window_of(model)
    if window is not None and window < length:
        position = torch.arange(length, device=device)
        near = ((position[:, None] - position[None, :]).abs() < window)[None, None]
        windowed = near if allowed is None else allowed & near
    full = _additive(allowed, dtype)
    sliding = full if windowed is allowed else _additive(windowed, dtype)
    if getattr(text_config(model), "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    if sliding is None and not _READS_CONFIG:
        return torch.zeros(1, 1, length, length, dtype=dtype, device=device)
    return sliding


def _additive(allowed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the additive mask of `allowed`; a query that may attend to no key attends to all of them.

    Such a query is padding, so its output is never used. But with every key masked, float16 scores below -16 overflow
    when added to the smallest number, and the NaN would reach real tokens through the values of the next layer.
    """
    if allowed is None:
        return None
    return additive_mask(allowed | ~allowed.any(dim=-1, keepdim=True), dtype)


@torch.no_grad()
def probe_bidirectional(model: nn.Module, *, inner: nn.Module | None = None) -> None:
    """Check with a few short forward passes that the first logits depend on the last token, and the last on the first.

    Training modes and random states are unchanged. Every rank must call it, as wrappers communicate in their forward.

    Args:
        model: the model that training calls, with or without a wrapper.
        inner: the unwrapped model, by default `model`.
    Raises:
        NotBidirectionalError: if they do not, if the logits are NaN, or if the model does not take the masks that
            padding and annealing need.
    """
    inner = model if inner is None else inner
    with evaluation_mode(model):
        _probe(model, inner)


def _probe(model: nn.Module, inner: nn.Module) -> None:
    device = next(inner.parameters()).device
    length = max(2, min(_PROBE_LENGTH, window_of(inner) or _PROBE_LENGTH))
    vocabulary = int(text_config(inner).vocab_size)
    ids = torch.arange(length, device=device)[None] % vocabulary
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype_of(inner)
    name = f"{type(inner).__name__} under {_implementation(inner)!r} attention"

    def logits(ids: Tensor, visible: Tensor | None = None) -> Tensor:
        mask = full_attention_mask(
            inner, batch=1, length=length, is_padding=None, visible=visible, dtype=dtype, device=device
        )
        result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        return result

    def moves(changed: int, seen: int) -> bool:
        # Several other tokens, as two untrained rows of the embedding may be equal.
        for step in {1, vocabulary // 3, vocabulary // 2} - {0}:
            other = ids.clone()
            other[0, changed] = (other[0, changed] + step) % vocabulary
            if not torch.equal(logits(other)[seen], base[seen]):
                return True
        return False

    def plain() -> None:
        model(input_ids=ids, use_cache=False).logits  # noqa: B018

    base = _taken(name, logits, plain, ids)
    if bool(base.isnan().any()):
        raise NotBidirectionalError(
            f"{name} computes NaN logits in {dtype}, which proves nothing and trains nothing; check the weights, "
            "or use bf16: true in place of fp16"
        )
    for changed, seen, words in (
        (-1, 0, "the last token does not move the first"),
        (0, -1, "the first token does not move the last"),
    ):
        if not moves(changed, seen):
            raise NotBidirectionalError(
                f"{name} still attends causally: changing {words} logits (transformers {transformers.__version__}). "
                "It cannot be trained or sampled as a diffusion model; try flash_attn: sdpa or flash_attn: disabled, "
                "or another model"
            )
    if not is_flash(_implementation(inner)):
        _taken(name, logits, plain, ids, torch.ones(1, 1, length, length, dtype=torch.bool, device=device))


_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _taken(name: str, logits: Any, plain: Any, ids: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return `logits(ids, visible)`, and name the cause if it raises.

    A model that cannot take the mask raises any of `_ERRORS`. The `plain` forward, without a mask, tells whether the
    mask is the cause.
    """
    try:
        result: Tensor = logits(ids, visible)
    except _ERRORS as error:
        try:
            plain()
        except _ERRORS as other:
            raise NotBidirectionalError(
                f"{name} cannot compute logits, with or without an attention mask ({type(other).__name__}: {other}); "
                "check its config.json and its weights, or use another model"
            ) from other
        raise NotBidirectionalError(
            f"{name} does not take the attention masks that diffusion needs ({type(error).__name__}: {error}); try "
            f"flash_attn: sdpa, or use a model {SUCH_AS}"
        ) from error
    return result


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that only warns."""


SUCH_AS = "such as GPT-2, Llama, Qwen2, Qwen3, Mistral or Gemma"


_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


_KNOWN_ATTENTION = ("eager", "sdpa")


class NotBidirectionalError(RuntimeError):
    """The model's attention is causal and cannot be made, or was not made, bidirectional."""


def refuse_unfit(model: nn.Module, modules: list[Any]) -> None:
    """Refuse a model that would not be fully bidirectional after switching its attention `modules`.

    Raises:
        NotBidirectionalError: naming the model, the part at fault and what to do.
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
    """Tell whether `module` carries a state along the sequence, by its depthwise convolution, which all such have."""
    return any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1 for child in module.children())
