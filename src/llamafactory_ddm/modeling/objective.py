"""The training objective as one frozen value: a clean batch in, what the forward needs out, and its logits' loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.ends import EndNoise, draw_masks
from ..diffusion.noise import draw_time, mask_tokens
from ..diffusion.objectives import LossNorm, LossWeighting, denominator, masked_cross_entropy, token_weight
from ..diffusion.schedules import NoiseSchedule
from .denoiser import head_rows, predictable

_OTHERS = ("document", "position_ids", "is_pad", "end")


@dataclass(frozen=True)
class CleanBatch:
    """A collated batch before noise.

    Attributes:
        x_0: [batch, length] int64, clean ids.
        maskable: [batch, length] bool, tokens that noise may fall on and that the model can predict.
        is_padding: [batch, length] bool, padding that nothing attends to; None where there is none.
        document: [batch, length] int64, which of several packed documents a token belongs to; None for one a row.
        position_ids: [batch, length] int64, places within the documents; None for one a row.
        is_pad: [batch, length] bool, pads behind the text that the model learns to write; None where nothing marks
            them.
        end: [batch] int64, index of the end-of-text token, -1 where a row has none; None together with `is_pad`.
    """

    x_0: Tensor
    maskable: Tensor
    is_padding: Tensor | None = None
    document: Tensor | None = None
    position_ids: Tensor | None = None
    is_pad: Tensor | None = None
    end: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], *, shift: bool) -> CleanBatch:
        """Read what a collator made, on the CPU.

        Args:
            batch: `input_ids` and perhaps `attention_mask` (0 is padding), `maskable`, `document`, `position_ids`,
                `is_pad`, `end`; without `maskable` every real token is.
            shift: whether logits at i - 1 predict token i.
        """
        x_0 = batch["input_ids"].to("cpu")
        is_padding: Tensor | None = None
        if "attention_mask" in batch:
            is_padding = batch["attention_mask"].to("cpu") == 0
            if not bool(is_padding.any()):
                is_padding = None
        if "maskable" in batch:
            maskable = batch["maskable"].to("cpu")
        else:
            maskable = torch.ones_like(x_0, dtype=torch.bool) if is_padding is None else ~is_padding
        others = (batch[key].to("cpu") if key in batch else None for key in _OTHERS)
        return cls(x_0, predictable(maskable, shift), is_padding, *others)

    @property
    def n_tokens(self) -> int:
        """How many tokens are no padding."""
        return self.x_0.numel() if self.is_padding is None else int((~self.is_padding).sum())

    def placement(self) -> dict[str, Tensor]:
        """Return by name what the attention mask and the positions are made from, without what is None."""
        named = {"is_padding": self.is_padding, "document": self.document, "position_ids": self.position_ids}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class TrainingBatch:
    """A noised micro-batch, reduced to what the step needs.

    Attributes:
        z_t: [batch, length] int64, noised ids.
        head_rows: [n_masked] int64, rows of the flattened hidden states that predict the tokens that are scored.
        targets: [n_masked] int64, the clean ids of these tokens.
        weight: [n_masked] float32, multiplies each token's cross-entropy.
        denominator: int64 scalar, this batch's share of what the weighted sum is divided by.
        n_maskable: int64 scalar, tokens that noise could fall on.
    """

    z_t: Tensor
    head_rows: Tensor
    targets: Tensor
    weight: Tensor
    denominator: Tensor
    n_maskable: Tensor


@dataclass(frozen=True)
class MaskedObjective:
    """Masked diffusion with its schedule, weights and normalisation.

    Attributes:
        mask_id: the id of [MASK].
        shift: whether logits at i - 1 predict token i.
        schedule: alpha and its weight.
        weighting: `elbo` or `uniform`.
        norm: `tokens`, `masked` or `sequence`.
        time_epsilon: the smallest t drawn.
        antithetic: stratify t over an optimiser step.
        seed: of the run's noise.
        ends: how the noise depends on where a text ends; None where it does not.
    """

    mask_id: int
    shift: bool
    schedule: NoiseSchedule
    weighting: LossWeighting = "elbo"
    norm: LossNorm = "tokens"
    time_epsilon: float = 1e-3
    antithetic: bool = False
    seed: int = 0
    ends: EndNoise | None = None

    def noise(self, clean: CleanBatch, *, rows: Tensor, group_size: int, step: int = 0) -> TrainingBatch:
        """Draw t and the masks of a micro-batch.

        Args:
            clean: made with the same `shift`.
            rows: [batch] int64, ordinals in the run's global order.
            group_size: rows of one optimiser step over ranks and micro-steps.
            step: optimiser steps finished so far.
        """
        x_0, maskable = clean.x_0, clean.maskable
        t = draw_time(
            self.seed, rows, time_epsilon=self.time_epsilon, antithetic=self.antithetic, group_size=group_size
        )
        row = None
        if self.ends is not None and clean.is_pad is not None and clean.end is not None:
            drawn = draw_masks(
                self.ends,
                maskable,
                clean.is_pad,
                clean.end,
                t,
                self.schedule,
                weighting=self.weighting,
                step=step,
                seed=self.seed,
                rows=rows,
            )
            maskable, is_scored, row = drawn.maskable, drawn.is_scored, drawn.weight
            z_t = x_0.masked_fill(drawn.is_masked, self.mask_id)
        else:
            noised = mask_tokens(x_0, maskable, t, self.schedule, seed=self.seed, rows=rows, mask_id=self.mask_id)
            is_scored, z_t = noised.is_masked, noised.z_t
        weight = token_weight(t, maskable, self.schedule, self.weighting, self.norm, row=row)
        return TrainingBatch(
            z_t=z_t,
            head_rows=head_rows(is_scored, self.shift),
            targets=x_0[is_scored],
            weight=weight[is_scored],
            denominator=denominator(is_scored, maskable, self.norm),
            n_maskable=maskable.sum(),
        )

    @staticmethod
    def loss(logits: Tensor, targets: Tensor, weight: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch and its unweighted negative log-likelihood.

        Args:
            logits: [n_masked, vocab], logits for the masked tokens in row-major order.
            targets: [n_masked] int64.
            weight: [n_masked] float32.
            denominator: scalar, summed over every micro-batch and rank of the optimiser step.
        Returns:
            The weighted cross-entropy summed and divided by `denominator` (by 1 where that is 0), and the plain sum in
            nats, detached; both float32 scalars. Micro-batches and ranks add up to the loss of the whole step.
        """
        nll = masked_cross_entropy(logits, targets)
        return (nll * weight).sum() / denominator.clamp(min=1), nll.detach().sum()
