"""Attention on a CPU that skips the parts of a mask in which no query sees a key.

The mask is cut into tiles of queries and keys. A tile is computed only if some of its queries sees some of its keys.
For rows of 512 tokens, as two streams of short blocks, that is 3/8 of all pairs. The other keys have no weight in the
softmax, so results are the same up to rounding. With attention dropout the probabilities are the same, but each tile
draws random numbers of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .model_info import implementation

TILED = "tiled_sdpa"  # the name for transformers
_TILE = 128  # columns; smaller ones skip more, but cost more calls and copies
_LARGEST_SHARE = 0.75  # of tiles to compute; above it the copies cost more than skipping the others saves

Tiles = list[tuple[list[int], Tensor]]  # for each tile of queries, the tiles of keys and the mask over them


def takes_tiles(model: nn.Module, device: torch.device) -> bool:
    """Return whether a model on a device computes attention in a way that `tiled_attention` can replace."""
    is_replaceable = bool(getattr(model, "_supports_attention_backend", False))
    return device.type == "cpu" and implementation(model) == "sdpa" and is_replaceable


def tiled_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """Return what transformers' `sdpa` returns, [batch, queries, heads, width], and None.

    Args:
        module: the attention layer.
        query: [batch, heads, queries, width].
        key: [batch, key-value heads, keys, width].
        value: the same.
        attention_mask: [1 or batch, 1, queries, keys], additive; None if every query sees every key. Any other that
            `sdpa` takes is used as a whole.
        rest: what else transformers passes.
    """
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    tiles, shape = None, (query.shape[2], key.shape[2])
    # torch.compile needs one graph for all masks.
    if attention_mask is not None and attention_mask.shape[2:] == shape and not torch.compiler.is_compiling():
        tiles = tiles_of(attention_mask) if attention_mask.is_floating_point() else None
    if tiles is None:
        result: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **rest)
        return result
    queries, keys, values = (part.split(_TILE, dim=2) for part in (query, key, value))
    parts = [
        sdpa(
            module,
            queries[number],
            torch.cat([keys[seen] for seen in of_keys], dim=2),
            torch.cat([values[seen] for seen in of_keys], dim=2),
            mask,
            **rest,
        )[0]
        for number, (of_keys, mask) in enumerate(tiles)
    ]
    return torch.cat(parts, dim=1), None


def tiles_of(mask: Tensor) -> Tiles | None:
    """Return the tiles of a mask in which some query sees some key; None if skipping the others gains nothing.

    They are kept with the mask, which all layers share and nothing may change afterwards.

    Args:
        mask: [1 or batch, 1, queries, keys], additive; a pair whose entry is the smallest number is not seen.
    """
    if not hasattr(mask, "tiles"):
        mask.tiles = _tiles_of(mask)  # type: ignore[attr-defined]
    found: Tiles | None = mask.tiles  # type: ignore[attr-defined]
    return found


def _tiles_of(mask: Tensor) -> Tiles | None:
    rows = [row.split(_TILE, dim=3) for row in mask.split(_TILE, dim=2)]
    lowest = torch.finfo(mask.dtype).min
    is_seen = [[bool(tile.amax() > lowest) for tile in row] for row in rows]
    count = sum(map(sum, is_seen))
    if count > _LARGEST_SHARE * len(rows) * len(rows[0]):
        return None
    of_keys = [[number for number, seen in enumerate(row) if seen] for row in is_seen]
    return [
        (numbers, torch.cat([row[number] for number in numbers], dim=3))
        for numbers, row in zip(of_keys, rows, strict=True)
    ]


AttentionInterface.register(TILED, tiled_attention)
# For masks that transformers makes itself, from one of [batch, keys].
AttentionMaskInterface.register(TILED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
