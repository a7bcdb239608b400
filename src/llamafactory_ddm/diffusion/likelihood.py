"""A low-variance, deterministic estimate of the evidence bound on held-out text."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Stream, lowest
from .rng import keyed_uniform

_GOLDEN = 0.6180339887498949


def evaluation_times(sample_index: Tensor, samples: int) -> Tensor:
    """Return the noise level of each row's samples, stratified over samples and spread evenly over rows.

    Sample k of a row lies in [k / samples, (k + 1) / samples); within it the rows follow a golden-ratio sequence, so
    that any number of rows covers the stratum evenly and a row's levels depend on its ordinal alone.

    Args:
        sample_index: [batch] int64, ordinals within the evaluation set.
        samples: levels per row.
    Returns:
        [batch, samples] float64 in [0, 1).
    Raises:
        ValueError: if `samples` is not positive.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    offset = ((sample_index.to(torch.float64) + 0.5) * _GOLDEN) % 1.0
    return (torch.arange(samples, device=sample_index.device, dtype=torch.float64) + offset[:, None]) / samples


def mask_exactly(maskable: Tensor, level: Tensor, *, seed: int, sample_index: Tensor) -> Tensor:
    """Mask k = floor(level * n) + 1 of each row's n maskable tokens, chosen uniformly.

    With `level` uniform on [0, 1), k is uniform on 1..n, and n times the mean cross-entropy of the k masked tokens is
    an unbiased estimate of the row's evidence bound in nats, for every noise schedule; fixing the count removes the
    variance that independent masking adds.

    Args:
        maskable: [batch, length] bool.
        level: [batch] float64 in [0, 1).
        seed: fixed for evaluation.
        sample_index: [batch] int64, ordinals of the draw.
    Returns:
        [batch, length] bool, True where masked; all False in a row without maskable tokens.
    Source: Ou et al. 2024 (arXiv 2406.03736) and LLaDA (arXiv 2502.09992), eq. 6, for the (L / k) estimator.
    """
    n = maskable.sum(dim=1)
    k = torch.minimum((level * n).floor().to(torch.int64) + 1, n)
    return lowest(keyed_uniform(seed, Stream.EVALUATION, sample_index, maskable.shape[1]), maskable, k)


def bound_per_row(nll: Tensor, is_masked: Tensor, maskable: Tensor) -> Tensor:
    """Return each row's estimate of the evidence bound, n / k times the summed cross-entropy of its k masked tokens.

    Args:
        nll: [n_masked] float32, nats, in row-major order of `is_masked`.
        is_masked: [batch, length] bool.
        maskable: [batch, length] bool.
    Returns:
        [batch] float64, nats per sequence; 0 for a row without maskable tokens.
    """
    row = is_masked.nonzero()[:, 0]
    total = torch.zeros(len(is_masked), dtype=torch.float64, device=nll.device).index_add_(0, row, nll.double())
    return total * maskable.sum(dim=1) / is_masked.sum(dim=1).clamp(min=1)
