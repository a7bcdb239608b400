"""The forward process: the time t of each row, and the tokens that become [MASK] or a random token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .rng import keyed_uniform
from .schedules import NoiseSchedule


class Stream(IntEnum):
    """The purpose of a keyed draw; the numbers of two streams are independent.

    Evaluation has streams of its own, as its fixed seed may equal the run's seed.
    """

    TIME = 1
    MASK = 2
    ATTENTION = 3
    EVALUATION = 4
    SAMPLE_TOKEN = 5
    SAMPLE_ORDER = 6
    PAD = 7
    WINDOW = 8
    UNIFORM = 9
    REMASK = 10
    TRUNCATE = 11
    EVALUATION_UNIFORM = 12
    EVALUATION_REVEAL = 13
    EVALUATION_CUT = 14
    LENGTH_FIT = 15
    ANSWER = 16
    ANSWER_LEVEL = 17
    BLOCK = 18


@dataclass(frozen=True)
class NoisedBatch:
    """A batch after the forward process.

    Attributes:
        z_t: [batch, length] int64, the noised ids.
        is_masked: [batch, length] bool, True where noise put [MASK]; False for a [MASK] of the clean text.
        t: [batch] float32, the time of each row.
    """

    z_t: Tensor
    is_masked: Tensor
    t: Tensor


def draw_time(
    seed: int, sample_index: Tensor, *, time_epsilon: float = 1e-3, antithetic: bool = False, group_size: int = 1
) -> Tensor:
    """Draw t = (1 - time_epsilon) u + time_epsilon for each row, u uniform in [0, 1).

    Args:
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
        time_epsilon: the smallest t, in [0, 1).
        antithetic: stratify u over each group of `group_size` consecutive sample indices:
            u_i = (u_group + i / group_size) mod 1. Each u_i is still uniform, so the loss stays unbiased.
        group_size: rows of one optimiser step over all ranks and micro-steps.
    Returns:
        [batch] float32 in [time_epsilon, 1).
    Raises:
        ValueError: if `time_epsilon` or `group_size` is out of range.
    Source: DiffuLLaMA (arXiv 2410.17891) for eps = 1e-3; Kingma et al. 2021 (arXiv 2107.00630), appendix I.1 for the
        stratification.
    """
    if not 0.0 <= time_epsilon < 1.0:
        raise ValueError(f"time_epsilon must lie in [0, 1), got {time_epsilon}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if antithetic:
        group = torch.div(sample_index, group_size, rounding_mode="floor")
        offset = (sample_index - group * group_size).to(torch.float64) / group_size
        u = ((keyed_uniform(seed, Stream.TIME, group, 1)[:, 0].to(torch.float64) + offset) % 1.0).to(torch.float32)
    else:
        u = keyed_uniform(seed, Stream.TIME, sample_index, 1)[:, 0]
    return (1.0 - time_epsilon) * u + time_epsilon


def mask_tokens(
    x_0: Tensor, maskable: Tensor, t: Tensor, schedule: NoiseSchedule, *, seed: int, sample_index: Tensor, mask_id: int
) -> NoisedBatch:
    """Replace each maskable token by [MASK] with probability 1 - alpha(t), independently.

        q(z_t | x_0) = alpha(t) one_hot(x_0) + (1 - alpha(t)) one_hot([MASK])

    Args:
        x_0: [batch, length] int64, clean ids.
        maskable: [batch, length] bool, tokens that noise may mask.
        t: [batch] float32, the time of each row.
        schedule: gives alpha.
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
        mask_id: the id of [MASK].
    Raises:
        ValueError: if the shapes disagree.
    Source: MDLM (arXiv 2406.07524), eq. 3.
    """
    if x_0.shape != maskable.shape or t.shape != x_0.shape[:1] or sample_index.shape != x_0.shape[:1]:
        raise ValueError(
            f"shapes disagree: x_0 {tuple(x_0.shape)}, maskable {tuple(maskable.shape)}, t {tuple(t.shape)}, "
            f"sample_index {tuple(sample_index.shape)}"
        )
    is_masked = draw_masked(maskable, t, schedule, seed=seed, sample_index=sample_index)
    return NoisedBatch(z_t=x_0.masked_fill(is_masked, mask_id), is_masked=is_masked, t=t)


def mix_tokens(
    x_0: Tensor,
    maskable: Tensor,
    noise_level: Tensor,
    *,
    uniform_ratio: float,
    n_ids: int,
    mask_id: int,
    seed: int,
    sample_index: Tensor,
    stream: int = Stream.MASK,
    uniform_stream: int = Stream.UNIFORM,
) -> Tensor:
    """Replace each maskable token with probability 1 - alpha, by a random token or by [MASK], independently.

        q(z_t | x_0) = alpha one_hot(x_0) + (1 - alpha) (k uniform(n_ids) + (1 - k) one_hot([MASK]))

    with k = uniform_ratio. For u uniform in [0, 1), a token is kept if u >= 1 - alpha, becomes one of the `n_ids` ids
    (itself included) if u < k (1 - alpha), and [MASK] otherwise. At k = 0 the masks are those of `mask_tokens`.

    Args:
        x_0: [batch, length] int64, clean ids.
        maskable: [batch, length] bool, tokens that noise may replace.
        noise_level: [batch] float, 1 - alpha of each row.
        uniform_ratio: k, the fraction of noised tokens that become random tokens, in [0, 1].
        n_ids: random tokens are ids from 0 to n_ids - 1.
        mask_id: the id of [MASK].
        seed: the run's seed.
        sample_index: [batch] int64, index of each sample in the run's global order.
        stream: stream of u.
        uniform_stream: stream of the random tokens.
    Returns:
        [batch, length] int64, the noised ids.
    Raises:
        ValueError: if `uniform_ratio` or `n_ids` is out of range.
    Source: XDLM (arXiv 2602.01362), the forward process.
    """
    if not 0.0 <= uniform_ratio <= 1.0:
        raise ValueError(f"uniform_ratio must lie in [0, 1], got {uniform_ratio}")
    if n_ids < 1:
        raise ValueError(f"n_ids must be at least 1, got {n_ids}")
    u, level = keyed_uniform(seed, stream, sample_index, x_0.shape[1]), noise_level[:, None]
    z_t = x_0.masked_fill((u < level) & maskable, mask_id)
    if not uniform_ratio:
        return z_t
    # One number has 24 bits, which would favour some ids of a large vocabulary; two have 48.
    pair = keyed_uniform(seed, uniform_stream, sample_index, 2 * x_0.shape[1]).double()
    drawn = ((pair[:, 0::2] + pair[:, 1::2] * 2.0**-24) * n_ids).long()
    return torch.where((u < uniform_ratio * level) & maskable, drawn, z_t)


def draw_masked(maskable: Tensor, t: Tensor, schedule: NoiseSchedule, *, seed: int, sample_index: Tensor) -> Tensor:
    """Return [batch, length] bool, True at each maskable position with probability 1 - alpha(t), independently.

    The arguments are those of `mask_tokens`.
    """
    u = keyed_uniform(seed, Stream.MASK, sample_index, maskable.shape[1])
    return (u < (1.0 - schedule.alpha(t))[:, None]) & maskable


def k_smallest_mask(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Return True at the `count` smallest scores of each row, taken from the positions where `among` is True.

    Args:
        score: [batch, length] float, finite; ties go to the earlier position.
        among: [batch, length] bool.
        count: [batch] int64; all of `among` if it is larger.
    Returns:
        [batch, length] bool.
    """
    rank = score.masked_fill(~among, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count[:, None]) & among
