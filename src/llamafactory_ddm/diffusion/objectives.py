"""Training losses and evidence bounds of masked diffusion, in nats."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from .schedules import NoiseSchedule

LossWeighting = Literal["elbo", "uniform"]
LossNorm = Literal["tokens", "masked", "sequence"]


def masked_cross_entropy(logits: Tensor, x_0: Tensor) -> Tensor:
    """Return the negative log-likelihood of the clean token at each masked position.

    Args:
        logits: [n_masked, vocab], unnormalised, any float dtype; upcast to float32 inside.
        x_0: [n_masked] int64, the clean ids.
    Returns:
        [n_masked] float32, in nats.
    Raises:
        ValueError: if the two disagree in length.
    Source: Shi et al. 2024, MD4 (arXiv 2406.04329), eq. 4.
    """
    if logits.dim() != 2 or x_0.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [n, vocab] and x_0 [n], got {tuple(logits.shape)} and {tuple(x_0.shape)}")
    return functional.cross_entropy(logits.float(), x_0, reduction="none")


def row_weight(t: Tensor, schedule: NoiseSchedule, weighting: LossWeighting) -> Tensor:
    """Return the weight of each row's masked tokens: the schedule's for `elbo`, one for `uniform`.

    Args:
        t: [batch] float32.
        schedule: gives the weight.
        weighting: which.
    Returns:
        [batch] float32.
    """
    return schedule.loss_weight(t) if weighting == "elbo" else torch.ones_like(t)


def token_weight(
    t: Tensor, maskable: Tensor, schedule: NoiseSchedule, weighting: LossWeighting, norm: LossNorm
) -> Tensor:
    """Return what each token's cross-entropy is multiplied by before the sum is divided by `denominator`.

    Args:
        t: [batch] float32.
        maskable: [batch, length] bool.
        schedule: gives the weight of a row.
        weighting: `elbo` or `uniform`.
        norm: with `sequence` a row's tokens share that row's weight, divided by its maskable tokens.
    Returns:
        [batch, length] float32.
    """
    weight = row_weight(t, schedule, weighting)
    if norm == "sequence":
        weight = weight / maskable.sum(dim=1).clamp(min=1)
    return weight[:, None].expand(maskable.shape)


def denominator(is_masked: Tensor, maskable: Tensor, norm: LossNorm) -> Tensor:
    """Return what a batch's weighted sum is divided by; the denominators of micro-batches and ranks add up.

    Args:
        is_masked: [batch, length] bool.
        maskable: [batch, length] bool.
        norm: `tokens` counts maskable tokens (the evidence bound per token), `masked` counts masked tokens
            (DiffuLLaMA's code),
            `sequence` counts rows that hold a maskable token (each row is already divided by its own length, as LLaDA
            does).
    Returns:
        int64 scalar, possibly 0.
    """
    if norm == "tokens":
        return maskable.sum()
    if norm == "masked":
        return is_masked.sum()
    return maskable.any(dim=1).sum()
