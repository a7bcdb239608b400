"""Generation with block models: the settings that they take, canvases of whole blocks, and the sampler's blocks.

A block model decodes its blocks from left to right and computes nothing behind the current one. So a canvas costs no
computation here: it only bounds the length of a text, and is filled up to the end of its last block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.canvas import Canvas, CanvasBatch
from ..diffusion.blocks import positions_of
from ..modeling.diffusion_config import DiffusionConfig
from ..sampling import SamplingSettings
from ..sampling.budget import sizes_of_blocks, split_by_position, split_into_blocks, steps_of_each_block


def check_settings(block_length: int, settings: SamplingSettings) -> None:
    """Check settings against a model with `attention: block`.

    Args:
        block_length: tokens in a block of training.
        settings: how to sample.
    Raises:
        ValueError: naming the key, if one does not fit.
    """
    if settings.block_length not in (None, block_length):
        raise ValueError(
            f"block_length: {settings.block_length} contradicts the checkpoint, which was trained with "
            f"train_block_length: {block_length}; remove block_length"
        )
    if settings.kv_cache == "dual":
        raise ValueError(
            "kv_cache: dual does not compute what follows the current block, and a model with attention: block never "
            "does; set kv_cache: prefix, which is exact, or none"
        )
    if settings.cache_refresh is not None:
        raise ValueError(
            f"cache_refresh: {settings.cache_refresh} has no effect on a model with attention: block, whose cache is "
            "exact; remove cache_refresh"
        )
    if settings.early_stop in ("predict", "grow"):
        raise ValueError(
            f"early_stop: {settings.early_stop} shortens the canvas, but a model with attention: block computes "
            "nothing behind its current block; set early_stop: eos"
        )
    if settings.logits.guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale: {settings.logits.guidance_scale} masks the prompt, but a model with attention: block "
            "never saw a masked block before the current one; remove guidance_scale"
        )


def check_canvas(canvas: Canvas) -> None:
    """Check that no fixed token follows a position to generate.

    Raises:
        ValueError: if one does.
    """
    if not all(canvas.editable[canvas.editable.index(True) :]):
        raise ValueError(
            "infilling needs tokens behind the gap, which a model with attention: block does not see; end the text "
            "with the gap, or use a model with attention: full"
        )


def in_whole_blocks(canvas: Canvas, block_length: int, limit: int | None, *, shift: bool) -> Canvas:
    """Return the canvas with positions to generate up to the end of its last block.

    Tokens depend on how many positions their block has. So a text with a smaller max_new_tokens is the beginning of
    the one with a larger.

    Args:
        canvas: without fixed tokens after positions to generate.
        block_length: tokens in a block.
        limit: the model's positions; None for no limit.
        shift: whether the first token of a block does not depend on the others.
    """
    length = -(-len(canvas) // block_length) * block_length
    if shift and len(canvas) % block_length == 1:
        return canvas
    n_more = max(min(length, limit or length) - len(canvas), 0)
    return Canvas(canvas.ids + (0,) * n_more, canvas.editable + (True,) * n_more, canvas.n_start)


def blocks_of(batch: CanvasBatch, config: DiffusionConfig) -> Tensor | None:
    """Return [batch, length] int64, the sampler's blocks for a block model; None for a model with full attention."""
    if config.train_block_length is None:
        return None
    position = positions_of(batch.x, is_padding=batch.is_padding)
    return split_by_position(batch.editable, position, config.train_block_length, shift=config.shift)


def blocks_of_canvas(canvas: Canvas, settings: SamplingSettings, config: DiffusionConfig) -> list[int]:
    """Return the sampler's block of each position of a canvas, -1 where it is fixed."""
    editable = torch.tensor([canvas.editable])
    if config.train_block_length is None:
        block = split_into_blocks(editable, settings.block_length)
    else:
        position = torch.arange(len(canvas))[None]
        block = split_by_position(editable, position, config.train_block_length, shift=config.shift)
    numbers: list[int] = block[0].tolist()
    return numbers


def max_steps(canvas: Canvas, settings: SamplingSettings, config: DiffusionConfig) -> int:
    """Return the largest number of denoising steps of a canvas that decode a token, without edit steps."""
    steps = settings.diffusion_steps
    if config.train_block_length is None:
        return steps if settings.may_idle else min(steps, canvas.n_editable)
    position = torch.arange(len(canvas))[None]
    editable = torch.tensor([canvas.editable])
    block = split_by_position(editable, position, config.train_block_length, shift=config.shift)
    sizes, of_block = sizes_of_blocks(block), steps_of_each_block(block, steps)
    return int((of_block if settings.may_idle else torch.minimum(of_block, sizes)).sum())
