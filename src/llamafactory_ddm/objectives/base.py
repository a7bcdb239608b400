"""What every training objective has in common: a clean batch in, what the forward needs out, its logits' loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.eos_noise import EndNoise
from ..diffusion.loss_weights import LossNorm, LossWeighting
from ..diffusion.noise import Stream, draw_time
from ..diffusion.rng import keyed_uniform
from ..diffusion.schedules import NoiseSchedule
from ..utils.registry import Registry
from .shift import predictable

_OTHERS = ("document", "position_ids", "is_pad", "end", "shown")


@dataclass(frozen=True)
class CleanBatch:
    """A collated batch before noise.

    Attributes:
        x_0: [batch, length] int64, clean ids, which are the targets.
        maskable: [batch, length] bool, tokens that noise may fall on and that the model can predict: never [MASK].
        is_padding: [batch, length] bool, padding that nothing attends to; None where there is none.
        document: [batch, length] int64, which of several packed documents a token belongs to; None for one a row.
        position_ids: [batch, length] int64, places within the documents; None for one a row.
        is_pad: [batch, length] bool, pads behind the text that the model learns to write; None where nothing marks
            them.
        end: [batch] int64, index of the end-of-text token, -1 where a row has none; None together with `is_pad`.
        shown: [batch, length] int64, what the model sees of a token that noise left as it is; None where that is the
            token itself. It differs where an answer ends and the next turn begins in one place (see `displayed`).
    """

    x_0: Tensor
    maskable: Tensor
    is_padding: Tensor | None = None
    document: Tensor | None = None
    position_ids: Tensor | None = None
    is_pad: Tensor | None = None
    end: Tensor | None = None
    shown: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], *, shift: bool, mask_id: int) -> CleanBatch:
        """Read what a collator made, on the CPU.

        A [MASK] of the text itself is no target, as no model writes it: it stays where it is, and is counted nowhere.

        Args:
            batch: `input_ids` and perhaps `attention_mask` (0 is padding), `maskable`, `document`, `position_ids`,
                `is_pad`, `end`, `shown`; without `maskable` every real token is.
            shift: whether logits at i - 1 predict token i.
            mask_id: the id of [MASK].
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
        return cls(x_0, predictable(maskable, shift) & (x_0 != mask_id), is_padding, *others)

    def truncated(self, ratio: float, *, seed: int, sample_index: Tensor) -> CleanBatch:
        """Cut a share of the rows to a random length, from 1 to their own; what is cut off becomes padding.

        Args:
            ratio: share of the rows, in [0, 1].
            seed: of the run.
            sample_index: [batch] int64, ordinals in the run's global order.
        Source: LLaDA (arXiv 2502.09992), section 2.2, which cuts 1 % of its sequences.
        """
        if not ratio:
            return self
        u = keyed_uniform(seed, Stream.TRUNCATE, sample_index, 2).double()
        real = torch.ones_like(self.maskable) if self.is_padding is None else ~self.is_padding
        length = (u[:, 1] * real.sum(dim=1)).floor().long() + 1
        cut = real & (real.cumsum(dim=1) > length[:, None]) & (u[:, 0] < ratio)[:, None]
        if not bool(cut.any()):
            return self
        return replace(self, maskable=self.maskable & ~cut, is_padding=~real | cut)

    def displayed(self, z: Tensor) -> Tensor:
        """Return what the model is given of noised ids: `shown` where noise left a token as it is.

        Some templates have no token of their own for the end of an answer; the place of the next turn's first token is
        then labelled with it. Both are true of that place: the end is what is to be predicted, and the turn's first
        token is what later turns come after, in generation as in training. So noise hides the end, and what shows
        that it is not hidden is the turn's first token. The bound stays one, as it holds for any model of the noised
        ids, however they are presented to it.

        Args:
            z: [batch, length] int64, noised ids.
        Returns:
            [batch, length] int64.
        """
        return z if self.shown is None else torch.where(z == self.x_0, self.shown, z)

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
        z_t: [batch, length] int64, noised ids as the model is given them.
        head_index: [n_scored] int64, rows of the flattened hidden states that predict the tokens that are scored.
        scored: by name, integers of the scored tokens that the loss needs, [n_scored] each; floating ones as bits, as
            DeepSpeed would round them to half precision on their way to the device.
        denominator: int64 scalar, this batch's share of what the weighted sum is divided by.
        n_maskable: int64 scalar, tokens that noise could fall on.
        n_masked: int64 scalar, those that became [MASK].
    """

    z_t: Tensor
    head_index: Tensor
    scored: dict[str, Tensor]
    denominator: Tensor
    n_maskable: Tensor
    n_masked: Tensor


@dataclass(frozen=True)
class EvaluationBatch:
    """A batch noised for evaluation.

    Attributes:
        z: [batch, length] int64, noised ids; the model is given them as `CleanBatch.displayed` has them.
        is_scored: [batch, length] bool.
        level: [batch] float64 in [0, 1), the share of tokens that is noised, on average.
        n_counted: [batch] int64, tokens that the bound is of.
        weight: [batch] float64, of a row's terms in a mean over noise levels that are spread evenly.
    """

    z: Tensor
    is_scored: Tensor
    level: Tensor
    n_counted: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A diffusion process with its loss, as training and evaluation see it, in one frozen value.

    Attributes:
        name: the value of the YAML key noise_process.
        term: what an unweighted term of the loss is called in logs.
        default_uniform_ratio: the YAML key uniform_ratio where it is not set; None if the process has no random
            tokens and takes no such key.
        mask_id: the id of [MASK].
        shift: whether logits at i - 1 predict token i.
        schedule: alpha and its weight.
        weighting: `elbo` or `uniform`.
        norm: `tokens`, `masked` or `sequence`.
        time_epsilon: the smallest t drawn.
        antithetic: stratify t over an optimiser step.
        seed: of the run's noise.
        truncate_ratio: share of training rows that are cut to a random length.
    """

    name: ClassVar[str]
    term: ClassVar[str]
    default_uniform_ratio: ClassVar[float | None] = None
    mask_id: int
    shift: bool
    schedule: NoiseSchedule
    weighting: LossWeighting = "elbo"
    norm: LossNorm = "tokens"
    time_epsilon: float = 1e-3
    antithetic: bool = False
    seed: int = 0
    truncate_ratio: float = 0.0

    @classmethod
    def build(
        cls, common: Mapping[str, Any], *, uniform_ratio: float = 0.0, n_ids: int = 0, ends: EndNoise | None = None
    ) -> Objective:
        """Return the objective of a run.

        Args:
            common: values of the attributes that every objective has.
            uniform_ratio: of the YAML or the checkpoint.
            n_ids: ids that are tokens, from 0; what random tokens are drawn from.
            ends: how noise depends on where a text ends; None unless `takes_end_noise`.
        """
        return cls(**common)

    @classmethod
    def takes_end_noise(cls, uniform_ratio: float) -> bool:
        """Tell whether noise can depend on where a text ends (pad_mask_ratio, eos_window_ratio)."""
        return False

    def clean(self, batch: Mapping[str, Tensor]) -> CleanBatch:
        """Read what a collator made; see `CleanBatch.of`."""
        return CleanBatch.of(batch, shift=self.shift, mask_id=self.mask_id)

    def draw_time(self, sample_index: Tensor, group_size: int) -> Tensor:
        """Return [batch] float32, the time of each row; the arguments are those of `noise`."""
        return draw_time(
            self.seed, sample_index, time_epsilon=self.time_epsilon, antithetic=self.antithetic, group_size=group_size
        )

    @abstractmethod
    def noise(self, clean: CleanBatch, *, sample_index: Tensor, group_size: int, step: int = 0) -> TrainingBatch:
        """Draw t and the noise of a micro-batch.

        Args:
            clean: from `clean`.
            sample_index: [batch] int64, ordinals in the run's global order.
            group_size: rows of one optimiser step over ranks and micro-steps.
            step: optimiser steps finished so far.
        """

    @abstractmethod
    def loss(self, logits: Tensor, scored: Mapping[str, Tensor], denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch and the plain sum of its terms.

        Args:
            logits: [n_scored, vocab], logits for the scored tokens in row-major order.
            scored: what `noise` returned under this name.
            denominator: scalar, summed over every micro-batch and rank of the optimiser step.
        Returns:
            The weighted terms summed and divided by `denominator` (by 1 where that is 0), and the plain sum in nats,
            detached; both float32 scalars. Micro-batches and ranks add up to the loss of the whole step.
        """

    @abstractmethod
    def evaluation(self, clean: CleanBatch, level: Tensor, *, seed: int, sample_index: Tensor) -> EvaluationBatch:
        """Noise a batch for evaluation.

        Args:
            clean: from `clean`.
            level: [batch] float64, uniform in [0, 1), from `evaluation_times`.
            seed: fixed for evaluation.
            sample_index: [batch] int64, ordinals of the draw.
        """

    @abstractmethod
    def evaluate(self, logits: Tensor, clean: CleanBatch, noised: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return the terms, [n_scored] float64 in nats, and the rows' estimates of the bound, [batch] float64.

        Args:
            logits: [n_scored, vocab].
            clean: the batch.
            noised: what `evaluation` made of it.
        """


OBJECTIVES: Registry[type[Objective]] = Registry("noise_process")


def as_bits(values: Tensor) -> Tensor:
    """Return floating numbers as integers of their width."""
    return values.view({torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype])
