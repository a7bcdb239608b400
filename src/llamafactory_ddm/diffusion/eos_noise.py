"""Noise that teaches a model where to end a text: less scored padding (annealed), and masks around EOS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .loss_weights import LossWeighting, row_weight
from .noise import Stream, draw_masked, k_smallest_mask
from .rng import keyed_uniform
from .schedules import NoiseSchedule

PadMaskMethod = Literal["elbo", "counts"]


@dataclass(frozen=True)
class EosNoise:
    """How the noise of a row depends on the position of its EOS.

    Attributes:
        pad_mask_ratio: target fraction of padding among scored masked tokens, after annealing; None treats padding
            like text.
        pad_anneal_steps: optimiser steps over which the fraction rises linearly from 0.
        pad_mask_method: `elbo` (drops padding from the loss, see `scored_padding`) or `counts` (masks less padding,
            see `mask_counts`).
        eos_window_ratio: fraction of rows that `mask_around_eos` masks, in place of the ordinary noise.
        eos_window_max: largest number of tokens before EOS that `mask_around_eos` masks, after annealing.
        eos_window_anneal_steps: optimiser steps over which that number rises linearly from 0.
    """

    pad_mask_ratio: float | None = None
    pad_anneal_steps: int = 0
    pad_mask_method: PadMaskMethod = "elbo"
    eos_window_ratio: float = 0.0
    eos_window_max: int = 100
    eos_window_anneal_steps: int = 0

    def pad_ratio(self, step: int) -> float | None:
        """Return the target fraction of padding at step `step`, pad_mask_ratio * anneal(step); None if unset."""
        if self.pad_mask_ratio is None:
            return None
        return self.pad_mask_ratio * anneal(step, self.pad_anneal_steps)

    def eos_window(self, step: int) -> int:
        """Return the largest window at optimiser step `step`: floor(eos_window_max * anneal(step))."""
        return int(self.eos_window_max * anneal(step, self.eos_window_anneal_steps))


@dataclass(frozen=True)
class EosMasks:
    """The masks and weights that `draw_masks` draws for a batch.

    Attributes:
        maskable: [batch, length] bool, tokens that can be scored.
        is_masked: [batch, length] bool, tokens that become [MASK].
        is_scored: [batch, length] bool, the masked tokens that enter the loss.
        weight: [batch] float32, weight of the cross-entropy of a row's scored tokens.
    """

    maskable: Tensor
    is_masked: Tensor
    is_scored: Tensor
    weight: Tensor


def draw_masks(
    noise: EosNoise,
    maskable: Tensor,
    is_pad: Tensor,
    end: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    weighting: LossWeighting,
    step: int,
    seed: int,
    sample_index: Tensor,
) -> EosMasks:
    """Draw the masks of a batch: of each row, either the ordinary noise or a window around EOS.

    A row is a window row with probability `eos_window_ratio` (`is_window_row`). `mask_around_eos` masks it from a few
    tokens before EOS to the end of the row, all padding included. With k of its n scorable tokens masked, its weight
    is n / k (1 if `weighting` is `uniform`), the weight of linear noise at t = k / n. The masks of window rows depend
    on the position of EOS, so their loss is not part of the evidence bound that the other rows estimate.

    Args:
        noise: the settings.
        maskable: [batch, length] bool, tokens that noise may mask.
        is_pad: [batch, length] bool, padding after EOS.
        end: [batch] int64, position of EOS, -1 where a row has none.
        t: [batch] float32, the time of each row.
        schedule: gives alpha(t) and the weight.
        weighting: `elbo` or `uniform`.
        step: number of finished optimiser steps.
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
    """
    ratio = noise.pad_ratio(step)
    scorable = (
        maskable if ratio is None else scored_padding(maskable, is_pad, ratio, seed=seed, sample_index=sample_index)
    )
    if ratio is None or noise.pad_mask_method == "elbo":
        is_masked, scored = draw_masked(maskable, t, schedule, seed=seed, sample_index=sample_index), scorable
    else:
        level = 1.0 - schedule.alpha(t)
        is_masked, scored = mask_counts(maskable, is_pad, level, ratio, seed=seed, sample_index=sample_index), maskable
    weight = row_weight(t, schedule, weighting)
    is_window = is_window_row(end, noise.eos_window_ratio, seed=seed, sample_index=sample_index)
    around = mask_around_eos(maskable, end, noise.eos_window(step), seed=seed, sample_index=sample_index)
    window_weight = scorable.sum(dim=1) / (around & scorable).sum(dim=1).clamp(min=1)
    return EosMasks(
        maskable=torch.where(is_window[:, None], scorable, scored),
        is_masked=torch.where(is_window[:, None], around, is_masked),
        is_scored=torch.where(is_window[:, None], around & scorable, is_masked & scored),
        weight=torch.where(
            is_window, window_weight if weighting == "elbo" else torch.ones_like(window_weight), weight
        ),
    )


def anneal(step: int, steps: int) -> float:
    """Return the linear annealing factor min(1, step / steps); 1 if `steps` is 0.

    Raises:
        ValueError: if either is negative.
    """
    if step < 0 or steps < 0:
        raise ValueError(f"step and steps must not be negative, got {step} and {steps}")
    return 1.0 if steps == 0 else min(1.0, step / steps)


def scored_padding(maskable: Tensor, is_pad: Tensor, ratio: float, *, seed: int, sample_index: Tensor) -> Tensor:
    """Exclude a random subset of padding from the loss; it is still noised.

    In a row of n text tokens and m padding tokens, each padding token is kept with probability

        r = min(1, ratio n / ((1 - ratio) m)),

    so that padding is on average a fraction `ratio` of the scored masked tokens, if m is large enough.

    The loss stays an estimate of the evidence bound with some terms left out. The bound of text and padding is a sum
    of one term per token, the cost of that token given the tokens that are unmasked before it in a random order. Noise
    and weights are unchanged, so the expected loss is the text's part of the bound plus r times the padding's part.
    Padding is masked as often as text, so a model does not learn to rely on seeing it.

    Args:
        maskable: [batch, length] bool.
        is_pad: [batch, length] bool, padding after EOS.
        ratio: target fraction of padding, in [0, 1].
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
    Returns:
        [batch, length] bool.
    Raises:
        ValueError: if `ratio` is out of range.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    padding = maskable & is_pad
    n, m = (maskable & ~is_pad).sum(dim=1).double(), padding.sum(dim=1).double()
    keep = (ratio * n / ((1.0 - ratio) * m)).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)
    if ratio == 1.0:
        keep = torch.ones_like(keep)
    u = keyed_uniform(seed, Stream.PAD, sample_index, maskable.shape[1])
    return maskable & ~(padding & (u >= keep[:, None]))


def mask_counts(
    maskable: Tensor, is_pad: Tensor, t: Tensor, ratio: float, *, seed: int, sample_index: Tensor
) -> Tensor:
    """Mask floor(t ratio L) padding tokens and floor(t (1 - ratio) L) text tokens of each row's L maskable ones.

    Which ones is random. Each number is capped by the number of such tokens. If both are 0, one text token is masked,
    or one padding token in a row without text.

    The loss is the published, reweighted one, not an evidence bound. Let n of the L tokens be text and m padding. A
    text token is masked with probability about min(1, t (1 - ratio) L / n) instead of t. With the weight 1 / t and
    small t, text therefore counts about (1 - ratio) L / n times, and padding about ratio L / m times.

    Args:
        maskable: [batch, length] bool.
        is_pad: [batch, length] bool, padding after EOS.
        t: [batch] float32, the time of each row.
        ratio: fraction of padding among masked tokens, in [0, 1].
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
    Returns:
        [batch, length] bool, True where masked.
    Raises:
        ValueError: if `ratio` is out of range.
    Source: the published code of variable-length DiffuGPT, where L is the context length.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    padding, text = maskable & is_pad, maskable & ~is_pad
    n_padding, n_text = padding.sum(dim=1), text.sum(dim=1)
    budget = t.double() * (n_padding + n_text)
    k_padding = torch.minimum((budget * ratio).floor().long(), n_padding)
    k_text = torch.minimum((budget * (1.0 - ratio)).floor().long(), n_text)
    masks_nothing = k_padding + k_text == 0
    k_text = torch.where(masks_nothing & (n_text > 0), 1, k_text)
    k_padding = torch.where(masks_nothing & (n_text == 0), n_padding.clamp(max=1), k_padding)
    u = keyed_uniform(seed, Stream.MASK, sample_index, maskable.shape[1])
    return k_smallest_mask(u, padding, k_padding) | k_smallest_mask(u, text, k_text)


def is_window_row(end: Tensor, ratio: float, *, seed: int, sample_index: Tensor) -> Tensor:
    """Draw the rows that are masked around EOS: each row with an EOS, with probability `ratio`.

    Args:
        end: [batch] int64, position of EOS, -1 where a row has none.
        ratio: in [0, 1].
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
    Returns:
        [batch] bool.
    """
    return (keyed_uniform(seed, Stream.WINDOW, sample_index, 2)[:, 0] < ratio) & (end >= 0)


def mask_around_eos(maskable: Tensor, end: Tensor, window: int, *, seed: int, sample_index: Tensor) -> Tensor:
    """Mask every maskable token from position `end` - w on, with w drawn uniformly from {0, ..., window}.

    w is random so that the first masked position does not reveal the position of EOS.

    Args:
        maskable: [batch, length] bool.
        end: [batch] int64, position of EOS; -1 masks nothing.
        window: largest number of masked tokens before EOS.
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
    Returns:
        [batch, length] bool, True where masked.
    """
    u = keyed_uniform(seed, Stream.WINDOW, sample_index, 2)[:, 1].double()
    first = end - (u * (window + 1)).floor().long()
    position = torch.arange(maskable.shape[1], device=maskable.device)
    return maskable & (position >= first[:, None]) & (end >= 0)[:, None]
