"""How the positions of a row fall into blocks, and how many of them each denoising step commits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule

NO_BLOCK = -1
CommitSchedule = Literal["even", "dream"]
COMMIT_SCHEDULES: tuple[CommitSchedule, ...] = get_args(CommitSchedule)
_LAST_TIME = 1e-3  # Dream's eps


def reveal_probability(step: int, steps: int, schedule: NoiseSchedule) -> float:
    """Return the chance that a masked token is revealed in a step, (alpha_s - alpha_t) / (1 - alpha_t).

    The step goes from t = 1 - step / steps to s = 1 - (step + 1) / steps. With the linear schedule this is
    1 / (steps - step), DiffuLLaMA's 1 / (t + 1) with t counted down to 0; the last step reveals what is left.

    Raises:
        ValueError: if `step` is not in [0, steps).
    Source: MDLM (arXiv 2406.07524), eq. 6; DiffuLLaMA (arXiv 2410.17891), algorithm 2.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in [0, {steps}), got {step}")
    if step == steps - 1:
        return 1.0
    times = torch.tensor([1.0 - step / steps, 1.0 - (step + 1) / steps], dtype=torch.float64)
    now, then = schedule.alpha(times).tolist()
    return float((then - now) / (1.0 - now))


def remask_probability(step: Tensor, steps: Tensor, schedule: NoiseSchedule, cap: float) -> tuple[Tensor, Tensor]:
    """Return the chance that a decided token is masked again, and what that adds to a masked one's to be revealed.

    From t = 1 - step / steps to s = 1 - (step + 1) / steps the first is sigma = min(cap, (1 - alpha_s) / alpha_t), and
    0 in the last step. To keep the share of decided tokens at alpha_s in spite of it, the chance to be revealed is
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t): that of `reveal_probability` and sigma alpha_t / (1 - alpha_t).

    Args:
        step: [batch] int64, from 0.
        steps: [batch] int64; 0 for a row that is finished, of which the result means nothing.
        schedule: gives alpha.
        cap: the most that sigma may be, in [0, 1].
    Returns:
        [batch] float64 each.
    Source: ReMDM (arXiv 2503.00307), the posterior of its section 3 and the capped schedule.
    """
    count = steps.clamp(min=1).double()
    now, then = (schedule.alpha(1.0 - (step + more).double() / count).clamp(0.0, 1.0) for more in (0, 1))
    sigma = ((1.0 - then) / now).clamp(max=cap).masked_fill(step + 1 >= steps, 0.0)
    return sigma, sigma * now / (1.0 - now)


def dream_shares(steps: int, schedule: NoiseSchedule) -> Tensor:
    """Return [steps] float32, the share of the tokens still masked that each step reveals; all of them in the last.

    The steps go from t = 1 to 1e-3; with the linear schedule the share is 1 - s / t. It is computed in float32, as
    published, so that whole numbers of tokens round alike.

    Raises:
        ValueError: if `steps` is below 1.
    Source: Dream (arXiv 2508.15487), the sampler of its published code.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    times = torch.linspace(1.0, _LAST_TIME, steps + 1)
    masked = (1.0 - schedule.alpha(times.double())).float()
    shares = 1.0 - masked[1:] / masked[:-1]
    shares[-1] = 1.0
    return shares


def dream_budget(n_masked: int, steps: int, schedule: NoiseSchedule) -> list[int]:
    """Return how many tokens each step commits: int(n share), with n tokens still masked and `dream_shares`.

    Raises:
        ValueError: if `steps` is below 1.
    """
    budget = []
    for share in dream_shares(steps, schedule):
        budget.append(int(share * n_masked))
        n_masked -= budget[-1]
    return budget


def split_into_blocks(editable: Tensor, block_length: int | None) -> Tensor:
    """Return [batch, length] int64, the block of each editable position, from 0; NO_BLOCK for the others.

    A block is `block_length` consecutive editable positions of a row, counted from the row's first, so that padding
    and given tokens between them shift nothing; the last block holds what is left. None is one block for all.

    Args:
        editable: [batch, length] bool.
        block_length: at least 1, or None.
    Raises:
        ValueError: if `block_length` is below 1.
    Source: LLaDA (arXiv 2502.09992), section 2.4, semi-autoregressive remasking.
    """
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, or None for a single block, got {block_length}")
    place = editable.cumsum(dim=1) - 1
    block = torch.zeros_like(place) if block_length is None else torch.div(place, block_length, rounding_mode="floor")
    return torch.where(editable, block, NO_BLOCK)


def steps_of_blocks(block: Tensor, steps: int) -> Tensor:
    """Share a row's steps out to its blocks, the earlier ones getting the one that does not divide.

    Args:
        block: [batch, length] int64, from `split_into_blocks`.
        steps: of the whole row.
    Returns:
        [batch, n_blocks] int64, n_blocks of the row with most; each row that has blocks sums to `steps`.
    Raises:
        ValueError: if a row has more blocks than there are steps.
    """
    blocks = block.amax(dim=1) + 1
    most = int(blocks.max()) if len(blocks) else 0
    if most > steps:
        raise ValueError(
            f"{steps} steps cannot finish {most} blocks, each of which needs one at least; take at least {most} steps "
            "(diffusion_steps) or longer blocks (block_length)"
        )
    place = torch.arange(max(most, 1), device=block.device)[None, :]
    count = blocks.clamp(min=1)
    share = torch.div(steps, count, rounding_mode="floor")
    result = share[:, None] + (place < (steps - share * count)[:, None])
    return torch.where(place < blocks[:, None], result, 0)


def pace_of_blocks(
    block: Tensor, block_steps: Tensor, steps: int, schedule: NoiseSchedule, commit_schedule: CommitSchedule = "even"
) -> tuple[Tensor, Tensor]:
    """Return what each step commits by number and by chance, the blocks of a row one after another.

    Args:
        block: [batch, length] int64, from `split_into_blocks`.
        block_steps: [batch, n_blocks] int64, from `steps_of_blocks`.
        steps: of the whole row.
        schedule: sets the pace.
        commit_schedule: `even`, see `NoiseSchedule.transfer_budget` and `reveal_probability`, or `dream`, see
            `dream_shares`.
    Returns:
        [batch, steps] int64, the budgets, and [batch, steps] float64, the chances to be revealed.
    """
    n_blocks = block_steps.shape[1]
    sizes = torch.stack([(block == index).sum(dim=1) for index in range(n_blocks)], dim=1).tolist()

    def numbers_of(size: int, count: int) -> list[int]:
        if commit_schedule == "dream":
            return dream_budget(size, count, schedule)
        even: list[int] = schedule.transfer_budget(torch.tensor([size]), count)[0].tolist()
        return even

    def chances_of(count: int) -> list[float]:
        if commit_schedule == "dream":
            return list(map(float, dream_shares(count, schedule)))
        return [reveal_probability(step, count, schedule) for step in range(count)]

    budgets: dict[tuple[int, int], list[int]] = {}
    chances: dict[int, list[float]] = {}
    budget, chance = [], []
    for row_sizes, row_steps in zip(sizes, block_steps.tolist(), strict=True):
        numbers: list[int] = []
        probabilities: list[float] = []
        for size, count in zip(row_sizes, row_steps, strict=True):
            if not count:
                continue
            if (size, count) not in budgets:
                budgets[size, count] = numbers_of(size, count)
            if count not in chances:
                chances[count] = chances_of(count)
            numbers += budgets[size, count]
            probabilities += chances[count]
        budget.append(numbers + [0] * (steps - len(numbers)))
        chance.append(probabilities + [0.0] * (steps - len(probabilities)))
    shape = (len(block), steps)
    return (
        torch.tensor(budget, dtype=torch.int64, device=block.device).view(shape),
        torch.tensor(chance, dtype=torch.float64, device=block.device).view(shape),
    )
