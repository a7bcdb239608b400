"""The objective of mixed noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.eos_noise import EndNoise
from ..diffusion.loss_weights import denominator, token_weight
from ..diffusion.losses import mixed_kl
from ..diffusion.noise import Stream, mix_tokens
from .base import OBJECTIVES, CleanBatch, EvaluationBatch, Objective, TrainingBatch, as_bits
from .masked import MaskedObjective
from .shift import head_index

_LEAST_LEVEL = 1e-6  # at no noise at all the weight of the bound is infinite


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class MixedObjective(Objective):
    """Diffusion with masks and random tokens.

    Every maskable token is scored, as a random token looks like any other: those that are kept cost something too.
    `norm: masked` divides by the tokens that noise changed.

    Attributes:
        uniform_ratio: share of noised tokens that become a random one.
        n_ids: ids that noise may draw, from 0.
    """

    name: ClassVar[str] = "mixed"
    term: ClassVar[str] = "kl"
    default_uniform_ratio: ClassVar[float | None] = 0.1  # XDLM's
    uniform_ratio: float
    n_ids: int

    @classmethod
    def build(
        cls, common: Mapping[str, Any], *, uniform_ratio: float = 0.0, n_ids: int = 0, ends: EndNoise | None = None
    ) -> Objective:
        """Return the objective of a run, masked where there are no random tokens; see `Objective.build`."""
        if not uniform_ratio:
            return MaskedObjective.build(common, ends=ends)
        return cls(uniform_ratio=uniform_ratio, n_ids=n_ids, **common)

    @classmethod
    def takes_end_noise(cls, uniform_ratio: float) -> bool:
        """Return whether there are no random tokens."""
        return not uniform_ratio

    def noise(self, clean: CleanBatch, *, sample_index: Tensor, group_size: int, step: int = 0) -> TrainingBatch:
        """Draw t and the noise of a micro-batch; see `Objective.noise`."""
        x_0, maskable = clean.x_0, clean.maskable
        t = self.draw_time(sample_index, group_size).clamp(min=_LEAST_LEVEL)
        z_t = self._mix(clean, 1.0 - self.schedule.alpha(t), seed=self.seed, sample_index=sample_index)
        is_noised = z_t != x_0
        weight = token_weight(t, maskable, self.schedule, self.weighting, self.norm)
        alpha = self.schedule.alpha(t.double())[:, None].expand(x_0.shape)
        return TrainingBatch(
            z_t=clean.displayed(z_t),
            head_index=head_index(maskable, self.shift),
            scored={
                "targets": x_0[maskable],
                "weight": as_bits(weight[maskable]),
                "noised": z_t[maskable],
                "alpha": as_bits(alpha[maskable]),
            },
            denominator=denominator(is_noised, maskable, self.norm),
            n_maskable=maskable.sum(),
            n_masked=(maskable & (z_t == self.mask_id)).sum(),
        )

    def loss(self, logits: Tensor, scored: Mapping[str, Tensor], denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted divergence over the denominator, and the plain sum; see `Objective.loss`."""
        alpha = scored["alpha"].view(torch.float64)
        kl = self._kl(logits, scored["targets"], scored["noised"], alpha)
        weighted = (kl * scored["weight"].view(torch.float32)).sum()
        return weighted / denominator.clamp(min=1), kl.detach().sum()

    def evaluation(self, clean: CleanBatch, level: Tensor, *, seed: int, sample_index: Tensor) -> EvaluationBatch:
        """Noise each token with a probability, the level squared; see `Objective.evaluation`.

        The weight in the bound grows as the noise level falls, where few tokens are noised and the estimate is rough:
        squares draw more samples there, of less weight each, and bound its variance.
        """
        level, maskable = level.square().clamp(min=_LEAST_LEVEL), clean.maskable
        streams = {"stream": Stream.EVALUATION, "uniform_stream": Stream.EVALUATION_UNIFORM}
        z = self._mix(clean, level, seed=seed, sample_index=sample_index, **streams)
        return EvaluationBatch(z, maskable, level, maskable.sum(dim=1), 2.0 * level.sqrt())

    def evaluate(self, logits: Tensor, clean: CleanBatch, noised: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return divergences and bounds; see `Objective.evaluate`.

        With the noise level 1 - alpha as the time, the weight in the bound is its inverse, whatever the schedule.
        """
        scored, device = noised.is_scored, logits.device
        level, weight = (value[:, None].expand(scored.shape)[scored] for value in (noised.level, noised.weight))
        kl = self._kl(
            logits, clean.x_0[scored].to(device), noised.z[scored].to(device), (1.0 - level).to(device)
        ).cpu()
        bound = torch.zeros(len(scored), dtype=torch.float64)
        return kl.double(), bound.index_add_(0, scored.nonzero()[:, 0], kl.double() * weight / level)

    def _mix(
        self,
        clean: CleanBatch,
        level: Tensor,
        *,
        seed: int,
        sample_index: Tensor,
        **streams: Stream,
    ) -> Tensor:
        return mix_tokens(
            clean.x_0,
            clean.maskable,
            level,
            uniform_ratio=self.uniform_ratio,
            n_ids=self.n_ids,
            mask_id=self.mask_id,
            seed=seed,
            sample_index=sample_index,
            **streams,
        )

    def _kl(self, logits: Tensor, targets: Tensor, noised: Tensor, alpha: Tensor) -> Tensor:
        return mixed_kl(
            logits,
            targets,
            noised,
            alpha,
            uniform_ratio=self.uniform_ratio,
            n_ids=self.n_ids,
            mask_id=self.mask_id,
        )
