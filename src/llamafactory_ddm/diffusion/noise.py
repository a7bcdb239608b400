"""The forward process: which t each row gets, and which of its tokens become [MASK] or a random token."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .rng import keyed_uniform
from .schedules import NoiseSchedule


class Stream(IntEnum):
    """What a keyed draw is for; each has its own independent numbers.

    Evaluation shares none with training, as its fixed seed may be the run's.
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


@dataclass(frozen=True)
class NoisedBatch:
    """A batch after the forward process.

    Attributes:
        z_t: [batch, length] int64, the noised ids.
        is_masked: [batch, length] bool, True where the noise put [MASK]; a [MASK] already in the clean text is False.
        t: [batch] float32, the time of each row.
    """

    z_t: Tensor
    is_masked: Tensor
    t: Tensor


def draw_time(
    seed: int, sample_index: Tensor, *, time_epsilon: float = 1e-3, antithetic: bool = False, group_size: int = 1
) -> Tensor:
    """Draw t = (1 - time_epsilon) u + time_epsilon for each row.

    Args:
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
        time_epsilon: the smallest t, in [0, 1).
        antithetic: stratify u over each group of `group_size` consecutive ordinals: u_i = (u_group + i / group_size)
            mod 1.
            Each u_i is still uniform by itself, so the objective stays unbiased.
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

    Args:
        x_0: [batch, length] int64, clean ids.
        maskable: [batch, length] bool, True where noise may fall.
        t: [batch] float32, the time of each row.
        schedule: gives alpha.
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
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
    """Replace each maskable token with probability 1 - alpha: by a random token in a share of cases, else by [MASK].

    With u uniform, it is kept if u >= 1 - alpha, becomes any of the `n_ids` ids, itself included, if
    u < uniform_ratio (1 - alpha), and [MASK] otherwise. At a ratio of 0 these are the masks of `mask_tokens`.

    Args:
        x_0: [batch, length] int64, clean ids.
        maskable: [batch, length] bool, True where noise may fall.
        noise_level: [batch] float, 1 - alpha of each row.
        uniform_ratio: in [0, 1].
        n_ids: ids to draw from, from 0.
        mask_id: the id of [MASK].
        seed: of the run.
        sample_index: [batch] int64, ordinals in the run's global order.
        stream: of u.
        uniform_stream: of the random tokens.
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
    # One number has 24 bits, which would favour some of many ids; two have enough.
    pair = keyed_uniform(seed, uniform_stream, sample_index, 2 * x_0.shape[1]).double()
    drawn = ((pair[:, 0::2] + pair[:, 1::2] * 2.0**-24) * n_ids).long()
    return torch.where((u < uniform_ratio * level) & maskable, drawn, z_t)


def draw_masked(maskable: Tensor, t: Tensor, schedule: NoiseSchedule, *, seed: int, sample_index: Tensor) -> Tensor:
    """Return [batch, length] bool, each maskable position with probability 1 - alpha(t), independently.

    The arguments are those of `mask_tokens`.
    """
    u = keyed_uniform(seed, Stream.MASK, sample_index, maskable.shape[1])
    return (u < (1.0 - schedule.alpha(t))[:, None]) & maskable


def lowest(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Return the `count` places of each row, among the marked ones, whose scores are lowest.

    Args:
        score: [batch, length] float below 2; of equal ones the earlier place comes first.
        among: [batch, length] bool.
        count: [batch] int64; more than there are marks them all.
    Returns:
        [batch, length] bool.
    """
    rank = score.masked_fill(~among, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count[:, None]) & among
