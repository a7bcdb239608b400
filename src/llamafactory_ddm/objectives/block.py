"""The objective of block diffusion: masked noise in each block, given the clean blocks before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..diffusion.blocks import (
    BlockNoise,
    behind_last,
    block_levels,
    block_of,
    completion,
    mask_blocks,
    mask_blocks_exactly,
    positions_of,
)
from ..diffusion.loss_weights import denominator
from ..diffusion.losses import masked_cross_entropy
from ..diffusion.two_streams import arrange_columns
from .base import CleanBatch, EvaluationBatch, TrainingBatch, as_bits
from .masked import MaskedObjective


@dataclass(frozen=True)
class BlockParts:
    """What `BlockObjective` does with each token of a batch.

    Attributes:
        block: [batch, length] int64, the number of its block in the row, -1 for padding.
        is_first: [batch, length] bool, scored tokens that the clean stream predicts.
        noisable: [batch, length] bool, tokens that noise may mask.
        behind: [batch, length] bool, tokens behind the last noisable one of their block; [MASK] in the noisy stream.
    """

    block: Tensor
    is_first: Tensor
    noisable: Tensor
    behind: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockEvaluation(EvaluationBatch):
    """A batch noised for evaluation, block by block.

    Attributes:
        is_first: [batch, length] bool, scored tokens that the clean stream predicts.
        factor: [batch, length] float64, factor of a scored token's cross-entropy in the bound of its row.
    """

    is_first: Tensor
    factor: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockObjective(MaskedObjective):
    """Block diffusion: each block is noised by itself, and predicted from its noised tokens and the clean text before.

    The model's input is a row of two streams, [clean | noisy] (`diffusion/two_streams.py`). The clean stream encodes
    finished blocks; the noisy stream sees the clean blocks before its own and the noised tokens of its own. One
    forward pass thus scores all blocks.

    Without shift the loss of a block is the evidence bound of masked diffusion in it,

        -log p(block | before) <= E_c [ n / c * sum over the c masked i of -log p(x_0[i] | before, z) ],

    with the noise that `diffusion/blocks.py` draws. With shift, logits at i - 1 predict token i. For the first token
    of a block that column is the last of the block before, in the clean stream. So the first token is a term of its
    own, with weight 1, and the others are noised, with the first in clear:

        -log p(block | before) <= -log p(first | before) + E_c [ n / c * sum ... -log p(x_0[i] | before, first, z) ].

    n counts the tokens that may be masked: neither the first token nor those of a prompt. A prompt is in clear, but
    what follows a response in its last block, such as the next turn, is [MASK] in the noisy stream and not scored: in
    generation it is not there yet. A document that ends within a block is completed by [MASK] too, as generation
    decodes whole blocks. The first token of a text is given, as elsewhere with shift. With blocks of one
    token the loss is the autoregressive one.

    Attributes:
        block_length: tokens in a block, counted from the start of a document.
        block_noise: `counts` or `times`.
        n_positions: the model's positions, beyond which no block is completed; None for no limit.
    Source: BD3-LM (arXiv 2503.09573) for the bound and the two streams. The first token's term is ours.
    """

    block_length: int
    block_noise: BlockNoise = "counts"
    n_positions: int | None = None

    def clean(self, batch: Mapping[str, Tensor]) -> CleanBatch:
        """Return a collator's batch; with shift the first token of a document is not maskable."""
        clean = super().clean(batch)
        if not self.shift:
            return clean
        return replace(clean, maskable=clean.maskable & (self._positions(clean) > 0))

    def _positions(self, clean: CleanBatch) -> Tensor:
        position = positions_of(clean.x_0, is_padding=clean.is_padding, position_ids=clean.position_ids)
        return position.expand(clean.x_0.shape)

    def parts(self, clean: CleanBatch) -> BlockParts:
        """Return the blocks of a batch, and which tokens each stream predicts."""
        position = self._positions(clean)
        block = block_of(position, self.block_length, is_padding=clean.is_padding)
        begins = (position % self.block_length == 0) & self.shift
        noisable = clean.maskable & ~begins
        return BlockParts(block, clean.maskable & begins, noisable, behind_last(noisable, block))

    def _noised(self, clean: CleanBatch, parts: BlockParts, is_masked: Tensor) -> Tensor:
        """Return [batch, length] int64, the ids of the noisy stream."""
        return clean.x_0.masked_fill(is_masked | parts.behind, self.mask_id)

    def _streams(
        self, clean: CleanBatch, parts: BlockParts, z: Tensor, is_masked: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the model's input for the noised ids `z`, `head_index`, and `TrainingBatch.placement`.

        Args:
            clean: the batch.
            parts: its parts.
            z: [batch, length] int64, the noised ids.
            is_masked: [batch, length] bool, tokens that the noisy stream predicts.
            is_first: [batch, length] bool, tokens that the clean stream predicts.
        """
        length, position = z.shape[1], self._positions(clean)
        behind = completion(parts.block, position, self.block_length, document=clean.document, limit=self.n_positions)
        noisy_block = torch.cat([parts.block, behind.block], dim=1)
        columns = arrange_columns(parts.block, noisy_block, is_masked, is_first, clean.document)

        def in_columns(of_clean: Tensor, of_noisy: Tensor, of_behind: Tensor) -> Tensor:
            return torch.cat([of_clean, of_noisy, of_behind], dim=1).gather(1, columns.source)

        placement = {
            "block": in_columns(parts.block, parts.block, behind.block).masked_fill(~columns.is_used, -1),
            "is_noisy": columns.source >= length,
            "position_ids": in_columns(position, position, behind.position),
        }
        if clean.document is not None and behind.document is not None:
            placement["document"] = in_columns(clean.document, clean.document, behind.document)
        if columns.is_plain:
            placement = {name: value[0] for name, value in placement.items()}
        row, token = (is_masked | is_first).nonzero().unbind(dim=1)
        source = torch.where(is_first[row, token], 0, length) + token - int(self.shift)
        head_index = row * columns.source.shape[1] + columns.place[row, source]
        masks = torch.full_like(behind.block, self.mask_id)
        return in_columns(clean.displayed(clean.x_0), clean.displayed(z), masks), head_index, placement

    def noise(self, clean: CleanBatch, *, sample_index: Tensor, group_size: int, step: int = 0) -> TrainingBatch:
        """Draw the noise of each block of a micro-batch; the arguments are those of `Objective.noise`."""
        parts, maskable = self.parts(clean), clean.maskable
        masks = mask_blocks(
            parts.noisable,
            parts.block,
            self.block_noise,
            schedule=self.schedule,
            time_epsilon=self.time_epsilon,
            seed=self.seed,
            sample_index=sample_index,
        )
        is_scored = masks.is_masked | parts.is_first
        weight = (
            torch.where(parts.is_first, 1.0, masks.weight) if self.weighting == "elbo" else torch.ones(is_scored.shape)
        )
        if self.norm == "sequence":
            weight = weight / maskable.sum(dim=1, keepdim=True).clamp(min=1)
        z = self._noised(clean, parts, masks.is_masked)
        ids, head_index, placement = self._streams(clean, parts, z, masks.is_masked, parts.is_first)
        return TrainingBatch(
            z_t=ids,
            head_index=head_index,
            placement=placement,
            scored={"targets": clean.x_0[is_scored], "weight": as_bits(weight[is_scored])},
            denominator=denominator(is_scored, maskable, self.norm),
            n_maskable=maskable.sum(),
            n_masked=masks.is_masked.sum(),
        )

    def evaluations(
        self, clean: CleanBatch, levels: Tensor, *, seed: int, sample_index: Tensor
    ) -> Iterator[EvaluationBatch]:
        """Mask each block at its own level of the row's stratum; the arguments are those of `Objective.evaluations`.

        First tokens have no noise, so they are scored once, with the first level.
        """
        parts, samples = self.parts(clean), levels.shape[1]
        share = torch.zeros(clean.x_0.shape, dtype=torch.float64)
        for number, row_level in enumerate(levels.T):
            level = block_levels(row_level, samples, parts.block)
            draw = sample_index * samples + number
            masks = mask_blocks_exactly(parts.noisable, parts.block, level, share=share, seed=seed, sample_index=draw)
            share = share + masks.is_masked * masks.weight
            is_first = parts.is_first & (number == 0)
            yield BlockEvaluation(
                z=self._noised(clean, parts, masks.is_masked),
                is_scored=masks.is_masked | is_first,
                level=level,
                n_counted=clean.maskable.sum(dim=1),
                weight=torch.ones_like(row_level),
                is_first=is_first,
                factor=torch.where(is_first, float(samples), masks.weight),
            )

    def evaluation_input(
        self, clean: CleanBatch, noised: EvaluationBatch
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Return the two streams, `head_index` and the placement of the columns."""
        is_first = cast(BlockEvaluation, noised).is_first
        return self._streams(clean, self.parts(clean), noised.z, noised.is_scored & ~is_first, is_first)

    def evaluate(self, logits: Tensor, clean: CleanBatch, noised: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies and bounds; the arguments are those of `Objective.evaluate`."""
        scored, factor = noised.is_scored, cast(BlockEvaluation, noised).factor
        nll = masked_cross_entropy(logits, clean.x_0[scored].to(logits.device)).cpu().double()
        bound = torch.zeros(len(scored), dtype=torch.float64)
        return nll, bound.index_add_(0, scored.nonzero()[:, 0], nll * factor[scored])
