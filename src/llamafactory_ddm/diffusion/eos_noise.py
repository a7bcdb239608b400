"""Noise that teaches where a text ends: fewer masked pads, by annealing, and windows around the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .loss_weights import LossWeighting, row_weight
from .noise import Stream, draw_masked, lowest
from .rng import keyed_uniform
from .schedules import NoiseSchedule

PadMaskMethod = Literal["elbo", "counts"]


@dataclass(frozen=True)
class EndNoise:
    """How the noise of a row depends on where its text ends.

    Attributes:
        pad_mask_ratio: the share of masked and scored tokens that are pads once annealing is over; None treats pads
            like text.
        pad_anneal_steps: optimiser steps over which the share rises linearly from 0.
        pad_mask_method: `elbo` (see `scored_pads`) or `counts` (see `mask_counts`).
        eos_window_ratio: share of rows that are masked by `mask_end` in place of the ordinary noise.
        eos_window_max: the most tokens before the end that such a row has masked, once annealing is over.
        eos_window_anneal_steps: optimiser steps over which that number rises linearly from 0.
    """

    pad_mask_ratio: float | None = None
    pad_anneal_steps: int = 0
    pad_mask_method: PadMaskMethod = "elbo"
    eos_window_ratio: float = 0.0
    eos_window_max: int = 100
    eos_window_anneal_steps: int = 0

    def pad_ratio(self, step: int) -> float | None:
        """Return the share of scored tokens that are to be pads at optimiser step `step`; None for no rule."""
        if self.pad_mask_ratio is None:
            return None
        return self.pad_mask_ratio * risen(step, self.pad_anneal_steps)

    def eos_window(self, step: int) -> int:
        """Return the most tokens before the end that a window row has masked at optimiser step `step`."""
        return int(self.eos_window_max * risen(step, self.eos_window_anneal_steps))


@dataclass(frozen=True)
class EndMasks:
    """What `draw_masks` decides about a batch.

    Attributes:
        maskable: [batch, length] bool, tokens that the objective scores at some noise level.
        is_masked: [batch, length] bool, what the model does not see.
        is_scored: [batch, length] bool, masked tokens that it is scored on, all but some pads.
        weight: [batch] float32, multiplies the cross-entropy of a row's scored tokens.
    """

    maskable: Tensor
    is_masked: Tensor
    is_scored: Tensor
    weight: Tensor


def draw_masks(
    noise: EndNoise,
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
) -> EndMasks:
    """Mask a batch so that it teaches the end of its texts.

    A row that is masked around its end and behind it hides all pads. Its weight is n / k for k scored of n tokens that
    could be (1 under `uniform` weighting), so that it counts as a row of linear noise at the level k / n. Its end is
    found from the text alone, so the loss of such rows is no part of the bound that the other rows estimate.

    Args:
        noise: how.
        maskable: [batch, length] bool, True where noise may fall.
        is_pad: [batch, length] bool, pads behind the text.
        end: [batch] int64, index of the end-of-text token, -1 where a row has none.
        t: [batch] float32, the time of each row.
        schedule: gives alpha and the weight.
        weighting: `elbo` or `uniform`.
        step: optimiser steps finished so far.
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
    """
    ratio = noise.pad_ratio(step)
    kept = maskable if ratio is None else scored_pads(maskable, is_pad, ratio, seed=seed, sample_index=sample_index)
    if ratio is None or noise.pad_mask_method == "elbo":
        is_masked, scored = draw_masked(maskable, t, schedule, seed=seed, sample_index=sample_index), kept
    else:
        level = 1.0 - schedule.alpha(t)
        is_masked, scored = mask_counts(maskable, is_pad, level, ratio, seed=seed, sample_index=sample_index), maskable
    weight = row_weight(t, schedule, weighting)
    window = is_window_row(end, noise.eos_window_ratio, seed=seed, sample_index=sample_index)
    around = mask_end(maskable, end, noise.eos_window(step), seed=seed, sample_index=sample_index)
    share = kept.sum(dim=1) / (around & kept).sum(dim=1).clamp(min=1)
    return EndMasks(
        maskable=torch.where(window[:, None], kept, scored),
        is_masked=torch.where(window[:, None], around, is_masked),
        is_scored=torch.where(window[:, None], around & kept, is_masked & scored),
        weight=torch.where(window, share if weighting == "elbo" else torch.ones_like(share), weight),
    )


def risen(step: int, steps: int) -> float:
    """Return how far what rises linearly from 0 over `steps` optimiser steps has come, min(1, step / steps).

    Raises:
        ValueError: if either is negative.
    """
    if step < 0 or steps < 0:
        raise ValueError(f"step and steps must not be negative, got {step} and {steps}")
    return 1.0 if steps == 0 else min(1.0, step / steps)


def scored_pads(maskable: Tensor, is_pad: Tensor, ratio: float, *, seed: int, sample_index: Tensor) -> Tensor:
    """Return `maskable` without a random part of the pads, on which the model is not scored; they are noised as ever.

    A row of n text tokens and m pads keeps each pad with probability r = min(1, ratio n / ((1 - ratio) m)), so that of
    the tokens that are masked and scored a share `ratio` is pads on average, where there are enough of them.

    What it estimates: noise and weights are those of the evidence bound of text and pads, a sum of a term for each
    token, what it costs given whatever is revealed before it in a random order. The terms of the tokens that are kept
    stay as they are, and the others are left out: on average over what is kept, the text's part of the bound and r
    times the pads' part. As no pad is shown more often than in generation, a model learns to do without them.

    Args:
        maskable: [batch, length] bool.
        is_pad: [batch, length] bool, pads behind the text; those that are not maskable stay so.
        ratio: in [0, 1].
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
    Returns:
        [batch, length] bool.
    Raises:
        ValueError: if `ratio` is out of range.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    pads = maskable & is_pad
    n, m = (maskable & ~is_pad).sum(dim=1).double(), pads.sum(dim=1).double()
    keep = (ratio * n / ((1.0 - ratio) * m)).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)
    if ratio == 1.0:
        keep = torch.ones_like(keep)
    u = keyed_uniform(seed, Stream.PAD, sample_index, maskable.shape[1])
    return maskable & ~(pads & (u >= keep[:, None]))


def mask_counts(
    maskable: Tensor, is_pad: Tensor, t: Tensor, ratio: float, *, seed: int, sample_index: Tensor
) -> Tensor:
    """Mask floor(t ratio L) pads and floor(t (1 - ratio) L) other tokens of a row's L maskable ones, at random.

    Each number is capped by how many there are; where both are 0, one token that is no pad is masked, or a pad where
    there is nothing else.

    What it estimates: a text token is masked with probability near min(1, t (1 - ratio) L / n) in place of t, where n
    of the L tokens are text. With weights 1 / t its cross-entropy therefore counts about (1 - ratio) L / n times in
    each row, as long as t is small enough for that, and a pad's ratio L / m times: a reweighted loss as it was
    published, no evidence bound.

    Args:
        maskable: [batch, length] bool.
        is_pad: [batch, length] bool, pads behind the text.
        t: [batch] float32, the time of each row.
        ratio: in [0, 1], the share of masked tokens that are to be pads.
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
    Returns:
        [batch, length] bool, True where masked.
    Raises:
        ValueError: if `ratio` is out of range.
    Source: the published code of variable-length DiffuGPT, whose L is the context length.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    pads, text = maskable & is_pad, maskable & ~is_pad
    n_pads, n_text = pads.sum(dim=1), text.sum(dim=1)
    budget = t.double() * (n_pads + n_text)
    k_pads = torch.minimum((budget * ratio).floor().long(), n_pads)
    k_text = torch.minimum((budget * (1.0 - ratio)).floor().long(), n_text)
    none = k_pads + k_text == 0
    k_text = torch.where(none & (n_text > 0), 1, k_text)
    k_pads = torch.where(none & (n_text == 0), n_pads.clamp(max=1), k_pads)
    u = keyed_uniform(seed, Stream.MASK, sample_index, maskable.shape[1])
    return lowest(u, pads, k_pads) | lowest(u, text, k_text)


def is_window_row(end: Tensor, ratio: float, *, seed: int, sample_index: Tensor) -> Tensor:
    """Draw which rows are masked around their end, each with probability `ratio`; never one without an end.

    Args:
        end: [batch] int64, index of the end-of-text token, -1 where a row has none.
        ratio: in [0, 1].
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
    Returns:
        [batch] bool.
    """
    return (keyed_uniform(seed, Stream.WINDOW, sample_index, 2)[:, 0] < ratio) & (end >= 0)


def mask_end(maskable: Tensor, end: Tensor, window: int, *, seed: int, sample_index: Tensor) -> Tensor:
    """Mask the end of the text, a few tokens before it, and everything behind it.

    How many tokens before the end is drawn uniformly from 0 to `window`, so that how far the end lies behind the first
    masked token is not given away; tokens that are not maskable stay.

    Args:
        maskable: [batch, length] bool.
        end: [batch] int64, index of the end-of-text token; -1 masks nothing.
        window: the most tokens before the end.
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
    Returns:
        [batch, length] bool, True where masked.
    """
    u = keyed_uniform(seed, Stream.WINDOW, sample_index, 2)[:, 1].double()
    first = end - (u * (window + 1)).floor().long()
    place = torch.arange(maskable.shape[1], device=maskable.device)
    return maskable & (place >= first[:, None]) & (end >= 0)[:, None]
