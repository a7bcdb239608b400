"""The objective of masked noise: weighted cross-entropy at [MASK]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.eos_noise import EosNoise, draw_masks
from ..diffusion.likelihood import bound_per_row, mask_exactly, share_of
from ..diffusion.loss_weights import denominator, token_weight
from ..diffusion.losses import masked_cross_entropy
from ..diffusion.noise import mask_tokens
from .base import OBJECTIVES, CleanBatch, EvaluationBatch, Objective, TrainingBatch, as_bits
from .shift import head_index


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class MaskedObjective(Objective):
    """Masked diffusion: a token becomes [MASK] with probability 1 - alpha(t), and masked tokens are scored.

    With `weighting: elbo` and `norm: tokens` the loss is the evidence bound per token,

        L = E_t [ -alpha'(t) / (1 - alpha(t)) * sum over masked i of -log p(x_0[i] | z_t) ] / n_maskable.

    Attributes:
        eos_noise: how noise depends on the position of EOS; None if it does not.
    """

    name: ClassVar[str] = "masked"
    term: ClassVar[str] = "nll"
    eos_noise: EosNoise | None = None

    @classmethod
    def build(
        cls,
        common: Mapping[str, Any],
        *,
        uniform_ratio: float = 0.0,
        n_ids: int = 0,
        eos_noise: EosNoise | None = None,
    ) -> MaskedObjective:
        """Return the objective of a run; the arguments are those of `Objective.build`."""
        return cls(eos_noise=eos_noise, **common)

    @classmethod
    def takes_eos_noise(cls, uniform_ratio: float) -> bool:
        """Return True."""
        return True

    def noise(self, clean: CleanBatch, *, sample_index: Tensor, group_size: int, step: int = 0) -> TrainingBatch:
        """Draw t and the masks of a micro-batch; the arguments are those of `Objective.noise`."""
        x_0, maskable = clean.x_0, clean.maskable
        t = self.draw_time(sample_index, group_size)
        row = None
        if self.eos_noise is not None and clean.is_pad is not None and clean.end is not None:
            drawn = draw_masks(
                self.eos_noise,
                maskable,
                clean.is_pad,
                clean.end,
                t,
                self.schedule,
                weighting=self.weighting,
                step=step,
                seed=self.seed,
                sample_index=sample_index,
            )
            maskable, is_scored, row = drawn.maskable, drawn.is_scored, drawn.weight
            z_t = x_0.masked_fill(drawn.is_masked, self.mask_id)
        else:
            noised = mask_tokens(
                x_0, maskable, t, self.schedule, seed=self.seed, sample_index=sample_index, mask_id=self.mask_id
            )
            is_scored, z_t = noised.is_masked, noised.z_t
        weight = token_weight(t, maskable, self.schedule, self.weighting, self.norm, row=row)
        return TrainingBatch(
            z_t=clean.displayed(z_t),
            head_index=head_index(is_scored, self.shift),
            scored={"targets": x_0[is_scored], "weight": as_bits(weight[is_scored])},
            denominator=denominator(is_scored, maskable, self.norm),
            n_maskable=maskable.sum(),
            n_masked=is_scored.sum(),
        )

    def loss(self, logits: Tensor, scored: Mapping[str, Tensor], denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum(weight * nll) / denominator and sum(nll); the arguments are those of `Objective.loss`."""
        nll = masked_cross_entropy(logits, scored["targets"])
        weighted = (nll * scored["weight"].view(torch.float32)).sum()
        return weighted / denominator.clamp(min=1), nll.detach().sum()

    def evaluations(
        self, clean: CleanBatch, levels: Tensor, *, seed: int, sample_index: Tensor
    ) -> Iterator[EvaluationBatch]:
        """Mask floor(level n) + 1 of each row's n tokens (`mask_exactly`); arguments as `Objective.evaluations`."""
        share = torch.zeros(clean.x_0.shape, dtype=torch.float64)
        draws = sample_index[:, None] * levels.shape[1] + torch.arange(levels.shape[1])
        for level, draw in zip(levels.T, draws.T, strict=True):
            is_masked = mask_exactly(clean.maskable, level, seed=seed, sample_index=draw, share=share)
            share = share + share_of(is_masked)
            z = clean.x_0.masked_fill(is_masked, self.mask_id)
            yield EvaluationBatch(z, is_masked, level, clean.maskable.sum(dim=1), torch.ones_like(level))

    def evaluate(self, logits: Tensor, clean: CleanBatch, noised: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return cross-entropies and `bound_per_row`; the arguments are those of `Objective.evaluate`."""
        targets = clean.x_0[noised.is_scored].to(logits.device)
        nll = masked_cross_entropy(logits, targets).cpu().double()
        return nll, bound_per_row(nll, noised.is_scored, clean.maskable)
