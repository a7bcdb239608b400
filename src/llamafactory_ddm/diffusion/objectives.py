"""Training losses and evidence bounds of masked diffusion, in nats."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .schedules import NoiseSchedule

LossWeighting = Literal["elbo", "uniform"]
LossNorm = Literal["tokens", "masked", "sequence"]
_ELEMENTS_AT_ONCE = 2**23


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
    nll: Tensor = _CrossEntropy.apply(logits, x_0)  # type: ignore[no-untyped-call]
    return nll


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps the logits alone for the backward pass and allocates one gradient of their size.

    The usual one also keeps the log-probabilities and passes a gradient of their size along: twice the memory at the
    peak.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x_0: Tensor) -> Tensor:
        """Return [n] float32."""
        log_total = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        for part in _row_parts(logits):
            log_total[part] = logits[part].float().logsumexp(dim=1)
        ctx.save_for_backward(logits, x_0, log_total)
        return log_total - logits.gather(1, x_0[:, None])[:, 0].float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return (softmax - one-hot) times the incoming gradient, in the dtype of the logits."""
        logits, x_0, log_total = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part in _row_parts(logits):
            share = logits[part].float().sub(log_total[part, None]).exp_()
            share.scatter_add_(1, x_0[part, None], -torch.ones_like(x_0[part, None], dtype=share.dtype))
            result[part] = share.mul_(grad[part, None])
        return result, None


def _row_parts(logits: Tensor) -> list[slice]:
    """Cut the rows so that a float32 copy of one part stays small."""
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


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
    t: Tensor,
    maskable: Tensor,
    schedule: NoiseSchedule,
    weighting: LossWeighting,
    norm: LossNorm,
    *,
    row: Tensor | None = None,
) -> Tensor:
    """Return what each token's cross-entropy is multiplied by before the sum is divided by `denominator`.

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
