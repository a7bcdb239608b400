"""Attention of block diffusion: the mask over two streams, their positions, and a probe that the model obeys it.

A row has 2 L columns, [clean | noisy]: the clean text and the noised one, with the same positions twice. A clean
query sees the clean keys of its own block and of the blocks before it. A noisy query sees the clean keys of the blocks
before its own and the noisy keys of its own block. Both see their own document only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.blocks import block_of, positions_of, sees
from .bidirectional import NotBidirectionalError, additive_by_layer
from .block_denoiser import check_block_attention
from .model_info import dtype_of, implementation, text_config
from .quantization import evaluation_mode
from .sparse_attention import FLEX, sparse_mask

_PROBE_LENGTH, _PROBE_BLOCK = 6, 3


def two_stream_visibility(block: Tensor, document: Tensor | None = None) -> Tensor:
    """Return [batch, 1, 2 * length, 2 * length] bool, True where a query (dim 2) may attend to a key (dim 3).

    Args:
        block: [batch, length] int64, the number of each token's block in its row, -1 for padding, from `block_of`.
        document: [batch, length] int64, index of the packed document of each token; None if a row is one document.
    """
    twice = torch.cat([block, block], dim=1)
    is_noisy = torch.arange(twice.shape[1], device=block.device) >= block.shape[1]
    one = torch.ones((), dtype=torch.bool, device=block.device)
    if document is not None:
        documents = torch.cat([document, document], dim=1)
        one = documents[:, :, None] == documents[:, None, :]
    allowed = sees(twice[:, :, None], is_noisy[:, None], twice[:, None, :], is_noisy[None, :], one)
    return (allowed | torch.eye(twice.shape[1], dtype=torch.bool, device=block.device))[:, None]


def two_stream_inputs(
    model: nn.Module,
    ids: Tensor,
    block_length: int,
    *,
    dtype: torch.dtype,
    is_padding: Tensor | None = None,
    document: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Return the arguments `attention_mask` and `position_ids` of a forward of two streams.

    Args:
        model: the unwrapped model.
        ids: [batch, 2 * length] int64, the two streams.
        block_length: tokens in a block.
        dtype: of the attention's queries.
        is_padding: [batch, length] bool, padding that no token attends to; None if there is none.
        document: [batch, length] int64, index of the packed document of each token; None if a row is one document.
        position_ids: [batch, length] int64, positions within packed documents; None if a row is one document.
    Raises:
        NotBidirectionalError: as `check_block_attention`.
    """
    check_block_attention(model)
    length = ids.shape[1] // 2
    position = positions_of(ids[:, :length], is_padding=is_padding, position_ids=position_ids)
    block = block_of(position, block_length, is_padding=is_padding)
    if implementation(model) == FLEX:
        mask = sparse_mask(block, document)
        mask = {"full_attention": mask} if getattr(text_config(model), "layer_types", None) else mask
    else:
        mask = additive_by_layer(model, two_stream_visibility(block, document), dtype)
    return {"attention_mask": mask, "position_ids": torch.cat([position, position], dim=1).expand(ids.shape)}


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
    inputs = two_stream_inputs(inner, ids, block, dtype=dtype)

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
