"""The YAML keys of attention: full, or in blocks that are denoised from left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ...diffusion.blocks import BlockNoise
from ...modeling.diffusion_config import ATTENTIONS
from ...utils.keys import key


@dataclass
class AttentionKeys:
    """Keys of block diffusion; a key that is None takes its value from the checkpoint."""

    attention: str | None = key(
        None,
        "full: every token sees every token. block: a text is denoised block by block, from left to right; a token "
        "sees its own block and the blocks before it. Defaults to the checkpoint's, then to full. A checkpoint with "
        "full attention can be trained further with block.",
        choices=ATTENTIONS,
    )
    train_block_length: int | None = key(
        None,
        "With attention: block, tokens in a block, counted from the start of each document. Defaults to the "
        "checkpoint's.",
        kind="integer",
        low=1,
    )
    block_noise: str = key(
        "counts",
        "With attention: block, noise of a block in training: counts (a number of masked tokens, each from 1 to all "
        "as likely) or times (a time t of each block; may mask none of its tokens).",
        choices=get_args(BlockNoise),
    )
    sparse_attention: bool = key(
        False,
        "With attention: block, train with FlexAttention, which skips what no token sees, on a GPU and with models "
        "that take it; the same result up to rounding.",
    )
