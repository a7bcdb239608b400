"""Attention of block diffusion: the mask over two streams, and a probe that the model obeys it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.two_streams import sees
from .bidirectional import NotBidirectionalError, additive_by_layer
from .block_denoiser import check_block_attention
from .model_info import dtype_of, implementation, text_config
from .quantization import evaluation_mode
from .sparse_attention import FLEX, sparse_mask

_PROBE_LENGTH, _PROBE_BLOCK = 6, 3


def two_stream_visibility(block: Tensor, is_noisy: Tensor, document: Tensor | None = None) -> Tensor:
    """Return [batch, 1, columns, columns] bool, True where a query (dim 2) may attend to a key (dim 3).

    Args:
        block: [batch, columns] int64, the number of each column's block in its row, -1 for padding.
        is_noisy: [batch, columns] bool, columns of the noisy stream.
        document: [batch, columns] int64, index of the packed document of each; None if a row is one document.
    """
    same = torch.ones((), dtype=torch.bool, device=block.device)
    if document is not None:
        same = document[:, :, None] == document[:, None, :]
    allowed = sees(block[:, :, None], is_noisy[:, :, None], block[:, None, :], is_noisy[:, None, :], same)
    return (allowed | torch.eye(block.shape[1], dtype=torch.bool, device=block.device))[:, None]


def two_stream_inputs(
    model: nn.Module,
    ids: Tensor,
    *,
    dtype: torch.dtype,
    block: Tensor,
    is_noisy: Tensor,
    position_ids: Tensor,
    document: Tensor | None = None,
) -> dict[str, Any]:
    """Return the arguments `attention_mask` and `position_ids` of a forward of two streams.

    Each tensor is [batch, columns] or, if all rows have the same, [columns].

    Args:
        model: the unwrapped model.
        ids: [batch, columns] int64, the two streams.
        dtype: of the attention's queries.
        block: int64, the number of each column's block in its row, -1 for padding.
        is_noisy: bool, columns of the noisy stream.
        position_ids: int64, positions within the document.
        document: int64, index of the packed document of each column; None if a row is one document.
    Raises:
        NotBidirectionalError: as `check_block_attention`.
    """
    check_block_attention(model)
    columns = (block, is_noisy) if document is None else (block, is_noisy, document)
    rows = [value[None] if value.dim() == 1 else value for value in columns]
    if implementation(model) == FLEX:
        mask = sparse_mask(*rows)
        mask = {"full_attention": mask} if getattr(text_config(model), "layer_types", None) else mask
    else:
        mask = additive_by_layer(model, two_stream_visibility(*rows), dtype)
    return {"attention_mask": mask, "position_ids": position_ids.expand(ids.shape)}


@torch.no_grad()
def probe_block_attention(model: nn.Module, *, inner: nn.Module | None = None) -> None:
    """Check with a few short forward passes that the model attends as the mask of two streams says.

    A noisy query must see the noised tokens of its own block, also later ones, and the clean tokens of earlier blocks;
    it must not see its own clean token, nor a later block. Training modes and random states are restored. Every rank
    must call it, as wrappers communicate in their forward.

    Args:
        model: the model that training calls, with or without a wrapper.
        inner: the unwrapped model, by default `model`.
    Raises:
        NotBidirectionalError: if it does not, or if the model cannot have such a mask.
    """
    inner = model if inner is None else inner
    check_block_attention(inner)
    with evaluation_mode(model):
        _probe(model, inner)


def _probe(model: nn.Module, inner: nn.Module) -> None:
    device, length, block = next(inner.parameters()).device, _PROBE_LENGTH, _PROBE_BLOCK
    vocabulary = int(text_config(inner).vocab_size)
    ids = torch.arange(2 * length, device=device)[None] % vocabulary
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype_of(inner)
    name = f"{type(inner).__name__} under {implementation(inner)!r} attention"
    position = torch.arange(length, device=device).repeat(2)
    inputs = two_stream_inputs(
        inner,
        ids,
        dtype=dtype,
        block=torch.div(position, block, rounding_mode="floor"),
        is_noisy=torch.arange(2 * length, device=device) >= length,
        position_ids=position,
    )

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits[0].float()
        return result

    def change(column: int) -> Tensor:
        """Return [2 * length], how much the logits of each column change with the token at `column`."""
        largest = torch.zeros(2 * length, device=device)
        # Several replacements, as two untrained embeddings may be equal.
        for offset in {1, vocabulary // 3, vocabulary // 2} - {0}:
            replaced = ids.clone()
            replaced[0, column] = (replaced[0, column] + offset) % vocabulary
            largest = torch.maximum(largest, (logits(replaced) - base).abs().amax(dim=1))
        return largest

    try:
        base = logits(ids)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise NotBidirectionalError(
            f"{name} does not accept the mask of attention: block ({type(error).__name__}: {error}); set flash_attn: "
            "sdpa, or use another model"
        ) from error
    if bool(base.isnan().any()):
        raise NotBidirectionalError(
            f"{name} computes NaN logits in {dtype}; check the weights, or set bf16: true in place of fp16"
        )
    noisy, last = length, 2 * length - 1
    for query, key, is_seen, what in (
        (noisy, noisy + block - 1, True, "the last noised token of its block"),
        (last, 0, True, "the clean text before its block"),
        (noisy, 0, False, "its own clean token"),
        (last, noisy, False, "the noised tokens of an earlier block"),
        (noisy, last, False, "a later block"),
    ):
        moved = change(key)
        # What a query must not see has exactly no weight; the tolerance is for kernels that add in any order.
        if (float(moved[query]) > 1e-3 * float(moved[key])) != is_seen:
            raise NotBidirectionalError(
                f"{name} does not obey the mask of attention: block: a noised token "
                f"{'does not see' if is_seen else 'sees'} {what}; set flash_attn: sdpa, or use another model"
            )
