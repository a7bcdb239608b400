"""A deterministic, low-variance estimate of the evidence bound on held-out text."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import Stream, k_smallest_mask
from .rng import keyed_uniform

_GOLDEN = 0.6180339887498949
# Breaks ties between equal shares: of shares that differ, few differ by less.
_TIE = 1e-6


def evaluation_times(sample_index: Tensor, samples: int) -> Tensor:
    """Return the noise levels of each row: t_k = (k + {(i + 1/2) g}) / samples for sample index i, k = 0, 1, ...

    {x} is the fractional part and g = (sqrt(5) - 1) / 2. Level k of every row lies in its own stratum
    [k / samples, (k + 1) / samples). Within a stratum the golden-ratio sequence covers the interval evenly for any
    number of rows. The levels of a row depend on its sample index alone.

    Args:
        sample_index: [batch] int64, index of each row in the evaluation set.
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


def mask_exactly(
    maskable: Tensor, level: Tensor, *, seed: int, sample_index: Tensor, share: Tensor | None = None
) -> Tensor:
    """Mask k = floor(level n) + 1 of each row's n maskable tokens: those of least `share`, ties broken at random.

    With `level` uniform on [0, 1), k is uniform on 1..n, and n times the mean cross-entropy of the k masked tokens is
    an unbiased estimate of the row's evidence bound in nats, for every noise schedule. A fixed count has less variance
    than independent masking.

    In the mean over several draws of a row, token i has the weight sum over its draws of n / k. Pass as `share` the
    sum of 1 / k so far: the draws then give all tokens nearly the same weight. As no rule but chance distinguishes
    the positions, each draw alone is still a uniformly random subset, and the mean remains unbiased.

    Args:
        maskable: [batch, length] bool.
        level: [batch] float64 in [0, 1).
        seed: the seed of the evaluation.
        sample_index: [batch] int64, index of each draw.
        share: [batch, length] float64, see above; None for the first draw of each row.
    Returns:
        [batch, length] bool, True where masked; all False in a row without maskable tokens.
    Source: Ou et al. 2024 (arXiv 2406.03736) and LLaDA (arXiv 2502.09992), eq. 6, for the (L / k) estimator. The
        balance is ours.
    """
    n = maskable.sum(dim=1)
    k = torch.minimum((level * n).floor().to(torch.int64) + 1, n)
    score = keyed_uniform(seed, Stream.EVALUATION, sample_index, maskable.shape[1])
    if share is not None:
        score = share + score.double() * _TIE
    return k_smallest_mask(score, maskable, k)


def share_of(is_masked: Tensor) -> Tensor:
    """Return 1 / k at each row's k masked tokens and 0 elsewhere, [batch, length] float64, for `mask_exactly`."""
    return is_masked.double() / is_masked.sum(dim=1, keepdim=True).clamp(min=1)


def bound_per_row(nll: Tensor, is_masked: Tensor, maskable: Tensor) -> Tensor:
    """Return the evidence bound of each row, (n / k) * sum over its k masked tokens of -log p(x_0[i] | z).

    Args:
        nll: [n_masked] float32, nats, in row-major order of `is_masked`.
        is_masked: [batch, length] bool.
        maskable: [batch, length] bool.
    Returns:
        [batch] float64, nats per row; 0 in a row without maskable tokens.
    """
    row = is_masked.nonzero()[:, 0]
    total = torch.zeros(len(is_masked), dtype=torch.float64, device=nll.device).index_add_(0, row, nll.double())
    return total * maskable.sum(dim=1) / is_masked.sum(dim=1).clamp(min=1)
