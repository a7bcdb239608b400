"""What a token's loss is multiplied by, and what the sum of a batch is divided by."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, ones_like

from .schedules import NoiseSchedule

LossWeighting = Literal["elbo", "uniform"]
LossNorm = Literal["tokens", "masked", "sequence"]


def row_weight(t: Tensor, schedule: NoiseSchedule, weighting: LossWeighting) -> Tensor:
    """Return the weight of each row's tokens: the schedule's for `elbo`, one for `uniform`.

    Args:
        t: [batch] float32.
        schedule: gives the weight.
        weighting: which.
    Returns:
        [batch] float32.
    """
    return schedule.loss_weight(t) if weighting == "elbo" else ones_like(t)


def token_weight(
    t: Tensor,
    maskable: Tensor,
    schedule: NoiseSchedule,
    weighting: LossWeighting,
    norm: LossNorm,
    *,
    row: Tensor | None = None,
) -> Tensor:
    """Return what each token's loss is multiplied by before the sum is divided by `denominator`.

    Args:
        t: [batch] float32.
        maskable: [batch, length] bool.
        schedule: gives the weight of a row.
        weighting: `elbo` or `uniform`.
        norm: with `sequence` a row's tokens share that row's weight, divided by its maskable tokens.
        row: [batch] float32, weights of rows in place of those that `schedule` and `weighting` give.
    Returns:
        [batch, length] float32.
    """
    weight = row_weight(t, schedule, weighting) if row is None else row
    if norm == "sequence":
        weight = weight / maskable.sum(dim=1).clamp(min=1)
    return weight[:, None].expand(maskable.shape)


def denominator(is_masked: Tensor, maskable: Tensor, norm: LossNorm) -> Tensor:
    """Return what a batch's weighted sum is divided by; the denominators of micro-batches and ranks add up.

    Args:
        is_masked: [batch, length] bool.
        maskable: [batch, length] bool.
        norm: `tokens` counts maskable tokens (the evidence bound per token), `masked` counts masked tokens
            (DiffuLLaMA's code; under mixed noise pass the noised ones),
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
