"""Block diffusion: the block of each token, and the noise of each block.

A text is denoised block by block, from left to right, each block given the clean text before it. So the evidence bound
of a text is the sum of the bounds of its blocks, and each block has a noise level of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .noise import Stream
from .rng import keyed_uniform
from .schedules import NoiseSchedule

BlockNoise = Literal["counts", "times"]
_TIE = 1e-6  # as in `likelihood.mask_exactly`
# Spreads the levels of successive blocks; independent of the golden ratio, which spreads those of successive rows.
_PLASTIC = 0.7548776662466927


@dataclass(frozen=True)
class BlockMasks:
    """The masks of a batch, drawn block by block.

    Attributes:
        is_masked: [batch, length] bool.
        weight: [batch, length] float32 in training, float64 in evaluation, weight of a masked token's cross-entropy in
            the evidence bound of its block.
    """

    is_masked: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Completion:
    """The positions behind each document of a batch, up to the end of its last block.

    Attributes:
        block: [batch, n] int64, the block that each completes; -1 for columns that only fill a row up.
        position: [batch, n] int64, position behind the document.
        document: [batch, n] int64, index of the packed document; None if a row is one document.
    """

    block: Tensor
    position: Tensor
    document: Tensor | None


def positions_of(like: Tensor, *, is_padding: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """Return the position of each token within its document, [batch or 1, length] int64; of padding, any number.

    Args:
        like: [batch, length], gives shape and device.
        is_padding: [batch, length] bool, on either side; None if there is none.
        position_ids: [batch, length] int64, positions of packed rows; None if a row is one document.
    """
    if position_ids is not None:
        return position_ids
    if is_padding is not None:
        return ((~is_padding).cumsum(dim=1) - 1).clamp(min=0)
    return torch.arange(like.shape[1], device=like.device)[None]


def block_of(position: Tensor, block_length: int, *, is_padding: Tensor | None = None) -> Tensor:
    """Return the number of each token's block within its row; -1 for padding.

    A block begins at every multiple of `block_length` of the position within the document, so no block spans two
    documents. Blocks are numbered through all documents of a row.

    Args:
        position: [batch, length] int64, position within the document, from 0.
        block_length: tokens in a block, at least 1; the last block of a document may have fewer.
        is_padding: [batch, length] bool; None if there is none.
    Returns:
        [batch, length] int64.
    Raises:
        ValueError: if `block_length` is below 1.
    """
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    begins = position % block_length == 0
    if is_padding is None:
        return begins.cumsum(dim=1) - 1
    return ((begins & ~is_padding).cumsum(dim=1) - 1).masked_fill(is_padding, -1)


def completion(
    block: Tensor, position: Tensor, block_length: int, *, document: Tensor | None, limit: int | None
) -> Completion:
    """Return the positions that the last block of each document lacks.

    Generation decodes whole blocks. Without these positions the width of a last block would tell where its text ends.

    Args:
        block: [batch, length] int64, from `block_of`.
        position: [batch, length] int64, position within the document.
        block_length: tokens in a block.
        document: [batch, length] int64, index of the packed document of each token; None if a row is one document.
        limit: the model's positions, of which none beyond is returned; None for no limit.
    Source: Fast-dLLM v2 (arXiv 2509.26328), which pads each text with [MASK] to a multiple of the block.
    """
    ends = block >= 0
    ends[:, :-1] &= (block[:, 1:] < 0) | (position[:, 1:] == 0)
    missing = block_length - 1 - position % block_length
    if limit is not None:
        missing = missing.minimum((limit - 1 - position).clamp(min=0))
    missing = missing.masked_fill(~ends, 0)
    row, token = ends.nonzero().unbind(dim=1)
    count, of_row = missing[row, token], missing.sum(dim=1)
    source = torch.arange(len(count), device=block.device).repeat_interleave(count)
    number = torch.arange(len(source), device=block.device)
    row, token = row[source], token[source]
    column = number - (of_row.cumsum(dim=0) - of_row)[row]
    behind = number - (count.cumsum(dim=0) - count)[source] + 1

    def in_columns(values: Tensor, empty: int) -> Tensor:
        result = torch.full((len(block), int(of_row.amax())), empty, dtype=torch.int64, device=block.device)
        result[row, column] = values
        return result

    return Completion(
        block=in_columns(block[row, token], -1),
        position=in_columns(position[row, token] + behind, 0),
        document=None if document is None else in_columns(document[row, token], 0),
    )


def behind_last(selected: Tensor, block: Tensor) -> Tensor:
    """Return [batch, length] bool, tokens behind the last selected one of their block; none in a block without any.

    Args:
        selected: [batch, length] bool.
        block: [batch, length] int64, from `block_of`.
    """
    column = torch.arange(block.shape[1], device=block.device).expand(block.shape)
    last = torch.full_like(_count(selected, block), block.shape[1])
    of_selected = column.masked_fill(~selected, -1)
    last = last.scatter_reduce(1, block.clamp(min=0), of_selected, "amax", include_self=False)
    last = _spread(last, block)
    return (block >= 0) & (last >= 0) & (column > last)


def mask_blocks(
    noisable: Tensor,
    block: Tensor,
    noise: BlockNoise,
    *,
    schedule: NoiseSchedule,
    time_epsilon: float,
    seed: int,
    sample_index: Tensor,
) -> BlockMasks:
    """Draw the masks of a training batch, each block by itself.

    `counts`: of a block's n noisable tokens c are masked, c uniform on 1..n, chosen at random; the weight is n / c.
    The mean over c and over the choices is the bound of the block, for every schedule, and no block stays clean.

    `times`: t = (1 - time_epsilon) u + time_epsilon for each block; a token is masked with probability 1 - alpha(t),
    independently, and the weight is -alpha'(t) / (1 - alpha(t)). Blocks may stay clean.

    Args:
        noisable: [batch, length] bool, tokens that may be masked.
        block: [batch, length] int64, from `block_of`.
        noise: `counts` or `times`.
        schedule: gives alpha and the weight of `times`.
        time_epsilon: the smallest t of `times`.
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
    Source: Ou et al. 2024 (arXiv 2406.03736) for the n / c estimator, BD3-LM (arXiv 2503.09573) for a t of each block.
    """
    level = draw_block_level(block, seed=seed, sample_index=sample_index)
    u = keyed_uniform(seed, Stream.MASK, sample_index, block.shape[1])
    if noise == "counts":
        masks = mask_block_counts(noisable, block, level, u)
        return BlockMasks(masks.is_masked, masks.weight.float())
    t = (1.0 - time_epsilon) * level + time_epsilon
    return BlockMasks((u < 1.0 - schedule.alpha(t)) & noisable, schedule.loss_weight(t))


def draw_block_level(block: Tensor, *, seed: int, sample_index: Tensor) -> Tensor:
    """Return [batch, length] float32, a number of each block, uniform in [0, 1); any number for padding."""
    n_blocks = int(block.amax()) + 1
    return _spread(keyed_uniform(seed, Stream.BLOCK, sample_index, max(n_blocks, 1)), block)


def mask_block_counts(noisable: Tensor, block: Tensor, level: Tensor, score: Tensor) -> BlockMasks:
    """Mask c = floor(level n) + 1 of the n noisable tokens of each block, those of least score, with the weight n / c.

    Args:
        noisable: [batch, length] bool.
        block: [batch, length] int64, from `block_of`.
        level: [batch, length] float in [0, 1), the same for all tokens of a block.
        score: [batch, length] float, finite; ties go to the earlier position.
    """
    count = _count(noisable, block)
    n = _spread(count, block)
    c = torch.minimum((level.double() * n).floor().long() + 1, n)
    # Sorted by block, then by score, the noisable tokens of a block stand together.
    order = score.masked_fill(~noisable, torch.inf).argsort(dim=1, stable=True)
    group = block.masked_fill(~noisable, torch.iinfo(torch.int64).max)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)
    rank_in_block = rank - _spread(count.cumsum(dim=1) - count, block)
    return BlockMasks(noisable & (rank_in_block < c), n.double() / c.clamp(min=1))


def block_levels(level: Tensor, samples: int, block: Tensor) -> Tensor:
    """Return the evaluation's noise level of each block, in the stratum of its row's level.

    The level of a row lies in a stratum [k / samples, (k + 1) / samples). Block j keeps the stratum and moves within
    it by j times an irrational number, so that the blocks of a row cover the stratum evenly.

    Args:
        level: [batch] float64 in [0, 1), from `likelihood.evaluation_times`.
        samples: levels per row.
        block: [batch, length] int64, from `block_of`.
    Returns:
        [batch, length] float64 in [0, 1).
    """
    scaled = level * samples
    stratum = scaled.floor()
    offset = ((scaled - stratum)[:, None] + block.clamp(min=0).double() * _PLASTIC) % 1.0
    return (stratum[:, None] + offset) / samples


def mask_blocks_exactly(
    noisable: Tensor, block: Tensor, level: Tensor, *, share: Tensor, seed: int, sample_index: Tensor
) -> BlockMasks:
    """Mask floor(level n) + 1 tokens of each block, those of least `share`, ties broken at random.

    It is `likelihood.mask_exactly` in each block.

    Args:
        noisable: [batch, length] bool.
        block: [batch, length] int64, from `block_of`.
        level: [batch, length] float64, from `block_levels`.
        share: [batch, length] float64, sum of the weights of the earlier draws that masked a token.
        seed: the seed of the evaluation.
        sample_index: [batch] int64, index of each draw.
    """
    score = share + keyed_uniform(seed, Stream.EVALUATION, sample_index, block.shape[1]).double() * _TIE
    return mask_block_counts(noisable, block, level, score)


def _count(selected: Tensor, block: Tensor) -> Tensor:
    """Return [batch, blocks] int64, the number of selected tokens in each block."""
    count = torch.zeros(len(block), int(block.amax().clamp(min=0)) + 1, dtype=torch.int64, device=block.device)
    return count.scatter_add_(1, block.clamp(min=0), (selected & (block >= 0)).long())


def _spread(values: Tensor, block: Tensor) -> Tensor:
    """Return [batch, length], the value of each token's block, of values [batch, blocks]."""
    return values.gather(1, block.clamp(min=0))
