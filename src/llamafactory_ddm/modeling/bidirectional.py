"""Full attention for a causal language model: a switch, its masks, and a probe that it took effect.

No model code is copied. On transformers >= 5.5 it is enough to set `is_causal` to False in the config and in
every attention module. Older versions, sliding windows, padding and annealing need an explicit mask: additive float
with the smallest finite number, as a boolean mask is silently wrong under eager attention. A sliding window becomes
symmetric, |query - key| < window (as in flash attention), in the layers that have one; other layers attend to all
positions.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from ..diffusion.attention import additive_mask
from .flash_attention import segment_arguments, segments
from .model_info import dtype_of, implementation, is_flash, text_config, window_of
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
# Outputs that a config can request and that are switched off. A router's loss needs a mask of another form.
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
            attention implementation that this module has no mask for, or a recurrent layer. The model is then
            unchanged.
    """
    modules = attention_modules(model)
    check_can_be_bidirectional(model, modules)
    for module in modules:
        module.is_causal = False
        buffer = causal_buffer(module)
        if buffer is not None:
            buffer.fill_(True)  # GPT-2 under transformers 4 also applies its own causal buffer
            if "bias" in module._non_persistent_buffers_set:  # that of a row of two streams is larger, and not saved
                columns = 2 * buffer.shape[-1]
                module.bias = buffer.new_ones(1, 1, 1, 1).expand(1, 1, columns, columns)
    for module in model.modules():
        # The warning is wrong here, as padding is known from the data, and on a GPU its check waits for the device in
        # every step.
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _no_warning  # type: ignore[assignment]
    for config in (model.config, text_config(model)):
        config.is_causal = False  # type: ignore[union-attr]
        for name, value in _OUTPUTS.items():
            if getattr(config, name, value) != value:
                setattr(config, name, value)


def is_bidirectional(model: nn.Module) -> bool:
    """Tell whether `make_bidirectional` has been applied; `probe_bidirectional` tests that it took effect."""
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
    columns: Tensor | None = None,
) -> Any:
    """Return the `attention_mask` argument of the model's forward.

    Rows padded on the left also need `position_ids` that start at their first real token, and packed rows need
    `position_ids` that start at 0 in each document; this function returns neither.

    Args:
        model: the unwrapped model.
        batch: rows of the forward.
        length: tokens of a row.
        is_padding: [batch, length] bool, True for keys that no real token may attend to; None for no padding.
        visible: [1 or batch, 1, length, length] bool, True where a query (dim 2) may attend to a key (dim 3); None
            for all. A token must see itself.
        dtype: of the attention's queries.
        device: of the forward.
        document: [batch, length] int64, index of the packed document of each token; a token attends to its own
            document only.
        columns: [batch, n_queries] int64, the queries' columns under a cache; None for all. `visible` then has
            n_queries in dim 2, and so has the mask.
    Returns:
        None if every query sees every key, which lets fast kernels run; a [batch, length] mask under flash attention;
        an additive mask, [1 or batch, 1, 1 or n_queries, length]; or a dict of these by layer type for models that
        take one.
    Raises:
        ValueError: for `visible` or `document` under flash attention, which takes no mask of this form, or for a
            mask whose shape is not that of the forward.
    """
    for name, value in (("is_padding", is_padding), ("document", document)):
        if value is not None and value.shape != (batch, length):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {(batch, length)}")
    n = length if columns is None else columns.shape[1]
    if visible is not None and (visible.shape[0] not in (1, batch) or visible.shape[1:] != (1, n, length)):
        raise ValueError(f"visible has shape {tuple(visible.shape)}, expected (1 or {batch}, 1, {n}, {length})")
    if is_flash(implementation(model)):
        if visible is not None:
            raise ValueError(
                "anneal_steps needs an attention mask that flash attention (flash_attn: fa2, fa3) does not support; "
                "set flash_attn: sdpa, or anneal_steps: 0"
            )
        if document is not None:
            raise ValueError("flash attention takes packed documents as segments (flash_attention.py), not as a mask")
        return None if is_padding is None else (~is_padding).to(torch.int64)
    allowed = visible
    if document is not None:
        of_query = document if columns is None else document.gather(1, columns)
        same_document = (of_query[:, :, None] == document[:, None, :])[:, None]
        allowed = same_document if allowed is None else allowed & same_document
    if is_padding is not None:
        is_token = ~is_padding[:, None, None, :]
        allowed = is_token if allowed is None else allowed & is_token
    windowed = allowed
    window = window_of(model)
    if window is not None and window < length:
        position = torch.arange(length, device=device)
        of_query = position[None] if columns is None else columns
        near = ((of_query[:, :, None] - position).abs() < window)[:, None]
        windowed = near if allowed is None else allowed & near
    full = _additive(allowed, dtype)
    sliding = full if windowed is allowed else _additive(windowed, dtype)
    if getattr(text_config(model), "layer_types", None):
        return {"full_attention": full, "sliding_attention": sliding}
    if sliding is None and not _READS_CONFIG:
        return torch.zeros(1, 1, n, length, dtype=dtype, device=device)
    return sliding


def additive_by_layer(model: nn.Module, allowed: Tensor, dtype: torch.dtype) -> Any:
    """Return the `attention_mask` argument for a mask that all layers share, without sliding windows.

    Args:
        model: the unwrapped model.
        allowed: [1 or batch, 1, queries, keys] bool, True where a query may attend to a key.
        dtype: of the attention's queries.
    Returns:
        An additive mask, or a dict of it by layer type for models that take one.
    """
    mask = _additive(allowed, dtype)
    return {"full_attention": mask} if getattr(text_config(model), "layer_types", None) else mask


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

    Training modes and random states are restored. Every rank must call it, as wrappers communicate in their forward.

    Args:
        model: the model that training calls, with or without a wrapper.
        inner: the unwrapped model, by default `model`.
    Raises:
        NotBidirectionalError: if they do not, if the logits are NaN, or if the model does not accept the masks that
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
    name = f"{type(inner).__name__} under {implementation(inner)!r} attention"

    def logits(ids: Tensor, visible: Tensor | None = None) -> Tensor:
        mask = full_attention_mask(
            inner, batch=1, length=length, is_padding=None, visible=visible, dtype=dtype, device=device
        )
        result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        return result

    def depends(output: int, on: int) -> bool:
        # Several replacements, as two untrained embeddings may be equal.
        for offset in {1, vocabulary // 3, vocabulary // 2} - {0}:
            replaced = ids.clone()
            replaced[0, on] = (replaced[0, on] + offset) % vocabulary
            if not torch.equal(logits(replaced)[output], base[output]):
                return True
        return False

    def without_mask() -> None:
        model(input_ids=ids, use_cache=False).logits  # noqa: B018

    base = _logits_or_cause(name, logits, without_mask, ids)
    if bool(base.isnan().any()):
        raise NotBidirectionalError(
            f"{name} computes NaN logits in {dtype}; check the weights, or set bf16: true in place of fp16"
        )
    for output, on, words in (
        (0, -1, "first logits do not depend on its last"),
        (-1, 0, "last logits do not depend on its first"),
    ):
        if not depends(output, on):
            raise NotBidirectionalError(
                f"{name} still attends causally: its {words} token (transformers {transformers.__version__}); set "
                "flash_attn: sdpa or flash_attn: disabled, or use another model"
            )
    if is_flash(implementation(inner)):
        _probe_segments(model, inner, ids)
    else:
        _logits_or_cause(
            name, logits, without_mask, ids, torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        )


def _probe_segments(model: nn.Module, inner: nn.Module, ids: Tensor) -> None:
    """Check that tokens attend within their segment only, each half of `ids` being one.

    Raises:
        NotBidirectionalError: if they do not.
    """
    device, length = ids.device, ids.shape[1]
    first = length // 2
    document = (torch.arange(length) >= first).long()[None]
    found = segments((1, length), None, document)
    position = torch.cat([torch.arange(first), torch.arange(length - first)])[None].to(device)
    arguments = segment_arguments(found | {"cu_seq_lens": found["cu_seq_lens"].to(device)})

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(
            input_ids=ids, attention_mask=None, position_ids=position, use_cache=False, **arguments
        ).logits[0]
        return result

    replaced = torch.cat([ids[:, :first], ids[:, first:].roll(1, dims=1)], dim=1)
    try:
        leaks = not torch.equal(logits(ids)[:first], logits(replaced)[:first])
    except _ERRORS as error:
        raise _segments_refused(inner, f"{type(error).__name__}: {error}") from error
    if leaks:
        raise _segments_refused(inner, "documents of a packed row see each other")


def _segments_refused(inner: nn.Module, why: str) -> NotBidirectionalError:
    return NotBidirectionalError(
        f"{type(inner).__name__} does not pass the lengths of documents (cu_seq_lens_q) on to "
        f"{implementation(inner)!r} attention ({why}); set flash_attn: sdpa"
    )


_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def _logits_or_cause(name: str, logits: Any, without_mask: Any, ids: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return `logits(ids, visible)`; if it raises, raise an error that names the cause.

    A model that does not accept the mask raises any of `_ERRORS`. If `without_mask` does not raise, the mask is the
    cause.
    """
    try:
        result: Tensor = logits(ids, visible)
    except _ERRORS as error:
        try:
            without_mask()
        except _ERRORS as unmasked_error:
            raise NotBidirectionalError(
                f"{name} cannot compute logits, with or without an attention mask "
                f"({type(unmasked_error).__name__}: {unmasked_error}); check its config.json and its weights, or use "
                "another model"
            ) from unmasked_error
        raise NotBidirectionalError(
            f"{name} does not accept the attention masks that diffusion needs ({type(error).__name__}: {error}); set "
            f"flash_attn: sdpa, or use a model {_SUPPORTED}"
        ) from error
    return result


def _no_warning(*args: Any, **kwargs: Any) -> None:
    """Replace a method that only warns."""


_SUPPORTED = "such as GPT-2, Llama, Qwen2, Qwen3, Mistral or Gemma"


_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


_KNOWN_ATTENTION = ("eager", "sdpa")


class NotBidirectionalError(RuntimeError):
    """The model's attention is causal and cannot be made, or was not made, bidirectional."""


def check_can_be_bidirectional(model: nn.Module, modules: list[Any]) -> None:
    """Check that a model would be fully bidirectional after switching its attention `modules`.

    Raises:
        NotBidirectionalError: naming the model, the part at fault and what to do.
    """
    config = text_config(model)
    kind = f"{type(model).__name__} (model_type {getattr(config, 'model_type', '?')})"
    unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if unknown:
        raise NotBidirectionalError(
            f"{kind} has layers of type {', '.join(sorted(unknown))}, which cannot be made bidirectional; "
            f"use a model with full or sliding-window attention, {_SUPPORTED}"
        )
    if implementation(model) not in _KNOWN_ATTENTION and not is_flash(implementation(model)):
        raise NotBidirectionalError(
            f"{kind} uses {implementation(model)!r} attention, which is not supported; set flash_attn: sdpa "
            "(or fa2, fa3, or disabled for eager)"
        )
    if not modules:
        raise NotBidirectionalError(
            f"{kind} has no attention module with an is_causal switch, so it cannot be made bidirectional; "
            f"use a model {_SUPPORTED}"
        )
    recurrent = next((type(module).__name__ for module in model.modules() if _is_recurrent(module)), None)
    if recurrent is not None:
        raise NotBidirectionalError(
            f"{kind} has the recurrent layer {recurrent}, which cannot be made bidirectional; "
            f"use a model with attention only, {_SUPPORTED}"
        )
    if any((buffer := causal_buffer(module)) is not None and not buffer[..., -1, :].all() for module in modules):
        raise NotBidirectionalError(
            f"{kind} has a local window built into its attention, which is not supported; use a model {_SUPPORTED}"
        )
    if getattr(config, "alibi", False):
        raise NotBidirectionalError(
            f"{kind} uses ALiBi, which favours later tokens under full attention; "
            f"use a model with other position embeddings, {_SUPPORTED}"
        )


def attention_modules(model: nn.Module) -> list[Any]:
    """Return the modules with a switch between causal and full attention, `is_causal`."""
    return [module for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]


def causal_buffer(module: Any) -> Tensor | None:
    """Return the boolean buffer [1, 1, positions, positions] with the causal mask of an attention module."""
    buffer = getattr(module, "bias", None)
    return buffer if isinstance(buffer, Tensor) and buffer.dtype == torch.bool else None


def _is_recurrent(module: nn.Module) -> bool:
    """Tell whether `module` is recurrent, by its depthwise convolution, which all such layers have."""
    return any(isinstance(child, nn.Conv1d) and child.groups == child.in_channels > 1 for child in module.children())
