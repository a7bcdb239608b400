"""Weights of the loss: the factor of each token, and the denominator of a batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, ones_like

from .schedules import NoiseSchedule

LossWeighting = Literal["elbo", "uniform"]
LossNorm = Literal["tokens", "masked", "sequence"]


def row_weight(t: Tensor, schedule: NoiseSchedule, weighting: LossWeighting) -> Tensor:
    """Return the weight of each row's tokens: -alpha'(t) / (1 - alpha(t)) for `elbo`, 1 for `uniform`.

    Args:
        t: [batch] float32, the time of each row.
        schedule: gives the weight.
        weighting: `elbo` or `uniform`.
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
    """Return the weight of each token's loss in the sum that is divided by `denominator`.

    It is w, the weight of the row; with `norm: sequence` it is w / n for a row of n maskable tokens.

    Args:
        t: [batch] float32, the time of each row.
        maskable: [batch, length] bool.
        schedule: gives the weight of a row.
        weighting: `elbo` or `uniform`.
        norm: `tokens`, `masked` or `sequence`.
        row: [batch] float32, weights of the rows that replace those of `row_weight`.
    Returns:
        [batch, length] float32.
    """
    weight = row_weight(t, schedule, weighting) if row is None else row
    if norm == "sequence":
        weight = weight / maskable.sum(dim=1).clamp(min=1)
    return weight[:, None].expand(maskable.shape)


def denominator(is_masked: Tensor, maskable: Tensor, norm: LossNorm) -> Tensor:
    """Return the number that divides a batch's weighted sum; add it up over micro-batches and ranks.

    `tokens` counts maskable tokens (the evidence bound per token). `masked` counts masked tokens (DiffuLLaMA's code;
    with mixed noise pass the noised tokens as `is_masked`). `sequence` counts rows with a maskable token (LLaDA;
    `token_weight` has already divided each row by its own length).

    Args:
        is_masked: [batch, length] bool.
        maskable: [batch, length] bool.
        norm: `tokens`, `masked` or `sequence`.
    Returns:
        int64 scalar, possibly 0.
    """
    if norm == "tokens":
        return maskable.sum()
    if norm == "masked":
        return is_masked.sum()
    return maskable.any(dim=1).sum()
