"""The objective of mixed noise: masks and random tokens, with the divergence of `losses.mixed_kl`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.eos_noise import EosNoise
from ..diffusion.loss_weights import denominator, token_weight
from ..diffusion.losses import mixed_kl
from ..diffusion.noise import Stream, mix_tokens
from ..utils.devices import check_float64
from .base import OBJECTIVES, CleanBatch, EvaluationBatch, Objective, TrainingBatch, as_bits
from .masked import MaskedObjective
from .shift import head_index

_LEAST_LEVEL = 1e-6  # the weight of the bound is infinite at noise level 0


@OBJECTIVES.register
@dataclass(frozen=True, kw_only=True)
class MixedObjective(Objective):
    """Mixed diffusion: a token is noised with probability 1 - alpha(t), and becomes a random token or [MASK].

    Every maskable token is scored, kept ones included, as a random token cannot be told from a clean one. With
    `weighting: elbo` and `norm: tokens` the loss is the evidence bound per token,

        L = E_t [ -alpha'(t) / (1 - alpha(t)) * sum over maskable i of mixed_kl_i ] / n_maskable.

    `norm: masked` divides by the number of tokens that noise changed.

    Attributes:
        uniform_ratio: fraction of noised tokens that become random tokens.
        n_ids: random tokens are ids from 0 to n_ids - 1.
    """

    name: ClassVar[str] = "mixed"
    term: ClassVar[str] = "kl"
    default_uniform_ratio: ClassVar[float | None] = 0.1  # XDLM's
    uniform_ratio: float
    n_ids: int

    @classmethod
    def build(
        cls,
        common: Mapping[str, Any],
        *,
        uniform_ratio: float = 0.0,
        n_ids: int = 0,
        eos_noise: EosNoise | None = None,
    ) -> Objective:
        """Return the objective of a run, a `MaskedObjective` if uniform_ratio is 0; arguments as `Objective.build`."""
        if not uniform_ratio:
            return MaskedObjective.build(common, eos_noise=eos_noise)
        return cls(uniform_ratio=uniform_ratio, n_ids=n_ids, **common)

    @classmethod
    def takes_eos_noise(cls, uniform_ratio: float) -> bool:
        """Return whether uniform_ratio is 0."""
        return not uniform_ratio

    def noise(self, clean: CleanBatch, *, sample_index: Tensor, group_size: int, step: int = 0) -> TrainingBatch:
        """Draw t and the noise of a micro-batch; the arguments are those of `Objective.noise`."""
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
        """Return sum(weight * kl) / denominator and sum(kl); the arguments are those of `Objective.loss`."""
        check_float64(logits.device, "noise_process: mixed")
        alpha = scored["alpha"].view(torch.float64)
        kl = self._kl(logits, scored["targets"], scored["noised"], alpha)
        weighted = (kl * scored["weight"].view(torch.float32)).sum()
        return weighted / denominator.clamp(min=1), kl.detach().sum()

    def evaluations(
        self, clean: CleanBatch, levels: Tensor, *, seed: int, sample_index: Tensor
    ) -> Iterator[EvaluationBatch]:
        """Noise each token with probability s = level^2; the arguments are those of `Objective.evaluations`.

        The weight of the bound is 1 / s, so the variance is largest at small s. With `level` uniform on [0, 1), s has
        the density 1 / (2 sqrt(s)), which draws more samples at small s. `weight` = 2 sqrt(s) corrects for it.
        """
        streams = {"stream": Stream.EVALUATION, "uniform_stream": Stream.EVALUATION_UNIFORM}
        draws = sample_index[:, None] * levels.shape[1] + torch.arange(levels.shape[1])
        for level, draw in zip(levels.T.square().clamp(min=_LEAST_LEVEL), draws.T, strict=True):
            z = self._mix(clean, level, seed=seed, sample_index=draw, **streams)
            yield EvaluationBatch(z, clean.maskable, level, clean.maskable.sum(dim=1), 2.0 * level.sqrt())

    def evaluate(self, logits: Tensor, clean: CleanBatch, noised: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return divergences and bounds; the arguments are those of `Objective.evaluate`.

        The bound of a row is the sum over its scored tokens of weight * kl / s, with s = 1 - alpha the noise level. In
        terms of s the weight -alpha'(t) / (1 - alpha(t)) dt is ds / s for every schedule.
        """
        scored, device = noised.is_scored, logits.device
        check_float64(device, "noise_process: mixed")
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
