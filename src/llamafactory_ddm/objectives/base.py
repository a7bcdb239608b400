"""The interface of a training objective: it noises a clean batch, and computes the loss of the model's logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..diffusion.eos_noise import EosNoise
from ..diffusion.loss_weights import LossNorm, LossWeighting
from ..diffusion.noise import Stream, draw_time
from ..diffusion.rng import keyed_uniform
from ..diffusion.schedules import NoiseSchedule
from ..utils.registry import Registry
from .shift import head_index, predictable

_OPTIONAL = ("document", "position_ids", "is_pad", "end", "shown")


@dataclass(frozen=True)
class CleanBatch:
    """A collated batch before noise.

    Attributes:
        x_0: [batch, length] int64, clean ids, which are the targets.
        maskable: [batch, length] bool, tokens that may be noised and that the model can predict; never [MASK].
        is_padding: [batch, length] bool, padding that no token attends to; None if there is none.
        document: [batch, length] int64, index of the packed document of each token; None if a row is one document.
        position_ids: [batch, length] int64, positions within the documents; None if a row is one document.
        is_pad: [batch, length] bool, padding after EOS that the model learns to generate; None without variable
            length.
        end: [batch] int64, position of EOS, -1 where a row has none; None if `is_pad` is None.
        shown: [batch, length] int64, the model's input for a token that is not noised; None if that is `x_0`. It
            differs where one position is both the end of an answer and the start of the next turn (see `displayed`).
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
        """Return a collator's batch as a `CleanBatch` on the CPU.

        A [MASK] that stands in the clean text is not a target, as no model generates [MASK]; it is never noised and
        never counted.

        Args:
            batch: `input_ids`, and optionally `attention_mask` (0 is padding), `maskable`, `document`, `position_ids`,
                `is_pad`, `end` and `shown`. Without `maskable`, every token that is not padding is maskable.
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
        optional = (batch[key].to("cpu") if key in batch else None for key in _OPTIONAL)
        return cls(x_0, predictable(maskable, shift) & (x_0 != mask_id), is_padding, *optional)

    def truncated(self, ratio: float, *, seed: int, sample_index: Tensor) -> CleanBatch:
        """Truncate a row of n tokens with probability `ratio` to a length uniform in 1..n; the rest becomes padding.

        Args:
            ratio: fraction of rows, in [0, 1].
            seed: the run's seed.
            sample_index: [batch] int64, index of each sample in the run's global order.
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
        """Return the model's input for the noised ids `z`: `shown` where z equals x_0, else z.

        Some templates have no token that ends an answer. LLaMA-Factory then labels the first token of the next turn
        with EOS. At that position EOS is the target, while later turns must see the turn's first token, as they do in
        generation. So the model sees [MASK] if the position is noised, and the turn's first token if not. The loss is
        still an evidence bound, which holds for any model of the noised ids and for any encoding of them.

        Args:
            z: [batch, length] int64, noised ids.
        Returns:
            [batch, length] int64.
        """
        return z if self.shown is None else torch.where(z == self.x_0, self.shown, z)

    @property
    def n_tokens(self) -> int:
        """The number of tokens that are not padding."""
        return self.x_0.numel() if self.is_padding is None else int((~self.is_padding).sum())

    def document_lengths(self) -> Tensor:
        """Return the number of tokens of each document, [n] int64; a row without packing is one document."""
        is_token = torch.ones_like(self.maskable) if self.is_padding is None else ~self.is_padding
        if self.document is None:
            return is_token.sum(dim=1)
        rows = torch.arange(len(is_token))[:, None]
        return torch.bincount((self.document + rows * (self.document.amax() + 1))[is_token])

    def placement(self) -> dict[str, Tensor]:
        """Return those of `is_padding`, `document` and `position_ids` that are not None, for mask and positions."""
        named = {"is_padding": self.is_padding, "document": self.document, "position_ids": self.position_ids}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class TrainingBatch:
    """A noised micro-batch: the tensors that a training step needs.

    Attributes:
        z_t: [batch, length] int64, the model's input; [batch, columns] with two streams (`objectives/block.py`).
        head_index: [n_scored] int64, indices into the flattened hidden states that predict the scored tokens.
        scored: the loss's inputs by name, [n_scored] integers each. Floats are stored as bits (`as_bits`), as
            DeepSpeed would cast them to half precision on their way to the device.
        denominator: int64 scalar, this batch's part of the number that divides the weighted sum.
        n_maskable: int64 scalar, number of maskable tokens.
        n_masked: int64 scalar, number of tokens that became [MASK].
        placement: of `z_t`, [batch, columns] or, if all rows have the same, [columns]: `block`, `is_noisy`,
            `position_ids` and perhaps `document` of two streams; None if it is that of the clean batch.
    """

    z_t: Tensor
    head_index: Tensor
    scored: dict[str, Tensor]
    denominator: Tensor
    n_maskable: Tensor
    n_masked: Tensor
    placement: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class EvaluationBatch:
    """A batch noised for evaluation.

    Attributes:
        z: [batch, length] int64, noised ids; the model's input is `CleanBatch.displayed(z)`.
        is_scored: [batch, length] bool.
        level: [batch] float64 in [0, 1), expected fraction of noised tokens; [batch, length] if blocks differ in it.
        n_counted: [batch] int64, number of tokens that the bound covers.
        weight: [batch] float64, weight of a row's terms in a mean over evenly spread noise levels.
        is_first: [batch, length] bool, scored tokens that are predicted from clean text alone; None if none are.
    """

    z: Tensor
    is_scored: Tensor
    level: Tensor
    n_counted: Tensor
    weight: Tensor
    is_first: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A noise process and its loss, for training and evaluation; a frozen value.

    Attributes:
        name: value of the YAML key noise_process.
        term: name of the unweighted loss in logs.
        default_uniform_ratio: default of the YAML key uniform_ratio; None if the process has no random tokens and the
            key is refused.
        mask_id: the id of [MASK].
        shift: whether logits at i - 1 predict token i.
        schedule: gives alpha(t) and the weight.
        weighting: `elbo` or `uniform`.
        norm: `tokens`, `masked` or `sequence`.
        time_epsilon: the smallest t.
        antithetic: stratify t over the rows of an optimiser step.
        seed: the seed of the noise.
        truncate_ratio: fraction of training rows that are truncated to a random length.
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
        cls,
        common: Mapping[str, Any],
        *,
        uniform_ratio: float = 0.0,
        n_ids: int = 0,
        eos_noise: EosNoise | None = None,
    ) -> Objective:
        """Return the objective of a run.

        Args:
            common: values of the attributes that every objective has.
            uniform_ratio: value of uniform_ratio in the YAML or the checkpoint.
            n_ids: random tokens are ids from 0 to n_ids - 1.
            eos_noise: how noise depends on the position of EOS; None unless `takes_eos_noise` returns True.
        """
        return cls(**common)

    @classmethod
    def takes_eos_noise(cls, uniform_ratio: float) -> bool:
        """Tell whether noise can depend on the position of EOS (pad_mask_ratio, eos_window_ratio)."""
        return False

    def clean(self, batch: Mapping[str, Tensor]) -> CleanBatch:
        """Return a collator's batch as `CleanBatch.of` reads it."""
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
            sample_index: [batch] int64, index of each sample in the run's global order.
            group_size: rows of one optimiser step, over all ranks and micro-steps.
            step: number of finished optimiser steps.
        """

    @abstractmethod
    def loss(self, logits: Tensor, scored: Mapping[str, Tensor], denominator: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch, sum(weight * term) / denominator, and sum(term).

        The losses of all micro-batches and ranks add up to the loss of the optimiser step. So do those of any parts of
        a micro-batch: training may pass the logits of a few scored tokens at a time.

        Args:
            logits: [n_scored, vocab], logits of scored tokens in row-major order.
            scored: `TrainingBatch.scored` for these tokens.
            denominator: scalar, `TrainingBatch.denominator` summed over all micro-batches and ranks of the optimiser
                step; 0 counts as 1.
        Returns:
            The loss, and the unweighted sum in nats, detached; both float32 scalars.
        """

    @abstractmethod
    def evaluations(
        self, clean: CleanBatch, levels: Tensor, *, seed: int, sample_index: Tensor
    ) -> Iterator[EvaluationBatch]:
        """Noise a batch for evaluation, once for each of its levels.

        Args:
            clean: from `clean`.
            levels: [batch, samples] float64, each uniform in [0, 1), from `evaluation_times`.
            seed: the seed of the evaluation.
            sample_index: [batch] int64, index of each row in the data set.
        """

    def evaluation_input(
        self, clean: CleanBatch, noised: EvaluationBatch
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Return an evaluation's `z_t`, `head_index` and placement, as in `TrainingBatch`."""
        return clean.displayed(noised.z), head_index(noised.is_scored, self.shift), clean.placement()

    @abstractmethod
    def evaluate(self, logits: Tensor, clean: CleanBatch, noised: EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return the terms, [n_scored] float64 in nats, and the bound of each row, [batch] float64 in nats.

        Args:
            logits: [n_scored, vocab], logits of the scored tokens in row-major order.
            clean: the batch.
            noised: one of the results of `evaluations` for this batch.
        """


OBJECTIVES: Registry[type[Objective]] = Registry("noise_process")


def as_bits(values: Tensor) -> Tensor:
    """Return the bits of float32 or float64 numbers as integers of the same width."""
    return values.view({torch.float32: torch.int32, torch.float64: torch.int64}[values.dtype])
