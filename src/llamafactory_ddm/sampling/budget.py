"""The blocks of a row, and how many positions each denoising step commits."""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..diffusion.schedules import NoiseSchedule

NO_BLOCK = -1
CommitSchedule = Literal["even", "dream"]
COMMIT_SCHEDULES: tuple[CommitSchedule, ...] = get_args(CommitSchedule)
_LAST_TIME = 1e-3  # Dream's eps


def reveal_probability(step: int, steps: int, schedule: NoiseSchedule) -> float:
    """Return the probability that a step reveals a masked token, (alpha_s - alpha_t) / (1 - alpha_t).

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
    alpha_t, alpha_s = schedule.alpha(times).tolist()
    return float((alpha_s - alpha_t) / (1.0 - alpha_t))


def remask_probability(step: Tensor, steps: Tensor, schedule: NoiseSchedule, cap: float) -> tuple[Tensor, Tensor]:
    """Return the probability that a step remasks a decoded token, and what it adds to the probability of revealing.

    From t = 1 - step / steps to s = 1 - (step + 1) / steps a decoded token is remasked with probability

        sigma = min(cap, (1 - alpha_s) / alpha_t),    0 in the last step.

    A masked token is then revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that the
    expected fraction of decoded tokens is alpha_s as without remasking. That exceeds `reveal_probability` by
    sigma alpha_t / (1 - alpha_t), the second result.

    Args:
        step: [batch] int64, from 0.
        steps: [batch] int64; 0 for a finished row, whose result is not meaningful.
        schedule: gives alpha.
        cap: upper bound on sigma, in [0, 1].
    Returns:
        [batch] float64 each.
    Source: ReMDM (arXiv 2503.00307), the posterior of its section 3 and the capped schedule.
    """
    count = steps.clamp(min=1).double()
    alpha_t, alpha_s = (schedule.alpha(1.0 - taken.double() / count).clamp(0.0, 1.0) for taken in (step, step + 1))
    sigma = ((1.0 - alpha_s) / alpha_t).clamp(max=cap).masked_fill(step + 1 >= steps, 0.0)
    return sigma, sigma * alpha_t / (1.0 - alpha_t)


def dream_fractions(steps: int, schedule: NoiseSchedule) -> Tensor:
    """Return [steps] float32, the fraction of the masked tokens that each step from t to s reveals.

    It is 1 - (1 - alpha_s) / (1 - alpha_t), with the linear schedule 1 - s / t, and 1 in the last step. The times are
    evenly spaced from 1 to 1e-3. It is computed in float32, as published, so that numbers of tokens round alike.

    Raises:
        ValueError: if `steps` is below 1.
    Source: Dream (arXiv 2508.15487), the sampler of its published code.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    times = torch.linspace(1.0, _LAST_TIME, steps + 1)
    masked = (1.0 - schedule.alpha(times.double())).float()
    fractions = 1.0 - masked[1:] / masked[:-1]
    fractions[-1] = 1.0
    return fractions


def dream_budget(n_masked: int, steps: int, schedule: NoiseSchedule) -> list[int]:
    """Return how many tokens each step commits: int(n f), with n tokens still masked and f of `dream_fractions`.

    Raises:
        ValueError: if `steps` is below 1.
    """
    budget = []
    for fraction in dream_fractions(steps, schedule):
        budget.append(int(fraction * n_masked))
        n_masked -= budget[-1]
    return budget


def split_into_blocks(editable: Tensor, block_length: int | None) -> Tensor:
    """Return [batch, length] int64, the block of each editable position, from 0; NO_BLOCK for the others.

    A block is `block_length` editable positions of a row. Only editable positions are counted, from the row's first,
    so padding and fixed tokens do not move the blocks. The last block may be shorter. None makes one block of all.

    Args:
        editable: [batch, length] bool.
        block_length: at least 1, or None.
    Raises:
        ValueError: if `block_length` is below 1.
    Source: LLaDA (arXiv 2502.09992), section 2.4, semi-autoregressive remasking.
    """
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length must be at least 1, or None for a single block, got {block_length}")
    index = editable.cumsum(dim=1) - 1
    block = torch.zeros_like(index) if block_length is None else torch.div(index, block_length, rounding_mode="floor")
    return torch.where(editable, block, NO_BLOCK)


def split_by_position(editable: Tensor, position: Tensor, block_length: int, *, shift: bool) -> Tensor:
    """Return [batch, length] int64, the block of each editable position, from 0; NO_BLOCK for the others.

    A block begins at every multiple of `block_length` of the position within the document, so its first may hold both
    prompt and positions to generate. Blocks without an editable position get no number.

    Args:
        editable: [batch, length] bool.
        position: [batch, length] int64, position of each token within its document.
        block_length: at least 1.
        shift: whether a block's first token is predicted from the tokens before the block alone. It is decoded before
            the others then, as a block of its own.
    Raises:
        ValueError: if `block_length` is below 1.
    Source: block diffusion (arXiv 2503.09573).
    """
    if block_length < 1:
        raise ValueError(f"block_length must be at least 1, got {block_length}")
    place = torch.div(position, block_length, rounding_mode="floor")
    if shift:
        place = 2 * place + (position % block_length > 0)
    place = torch.where(editable, place, NO_BLOCK)
    before = functional.pad(place.cummax(dim=1).values, (1, -1), value=NO_BLOCK)
    number = (editable & (place > before)).cumsum(dim=1) - 1
    return torch.where(editable, number, NO_BLOCK)


def steps_of_each_block(block: Tensor, steps: int) -> Tensor:
    """Return [batch, n_blocks] int64, `steps` for each block of a row, 1 if it is a single token, 0 if it has none.

    Args:
        block: [batch, length] int64, from `split_by_position`.
        steps: of a block.
    """
    sizes = sizes_of_blocks(block)
    return torch.where(sizes > 1, steps, sizes)


def sizes_of_blocks(block: Tensor) -> Tensor:
    """Return [batch, n_blocks] int64, the number of positions of each block; n_blocks is at least 1.

    Args:
        block: [batch, length] int64, from `split_into_blocks` or `split_by_position`.
    """
    n_blocks = max(int(block.max()) + 1, 1) if len(block) else 1
    sizes = block.new_zeros(len(block), n_blocks + 1).scatter_add_(1, block - NO_BLOCK, torch.ones_like(block))
    return sizes[:, 1:]


def steps_of_blocks(block: Tensor, steps: int) -> Tensor:
    """Divide a row's steps among its blocks, as evenly as possible; earlier blocks get one more.

    Args:
        block: [batch, length] int64, from `split_into_blocks`.
        steps: of the whole row.
    Returns:
        [batch, n_blocks] int64; n_blocks is the largest number of blocks of a row. Blocks that a row lacks get 0, and
        each row that has blocks sums to `steps`.
    Raises:
        ValueError: if a row has more blocks than there are steps.
    """
    n_blocks = block.amax(dim=1) + 1
    max_blocks = int(n_blocks.max()) if len(n_blocks) else 0
    if max_blocks > steps:
        raise ValueError(
            f"diffusion_steps: {steps} is too few for {max_blocks} blocks, each of which takes a step or more; set "
            f"diffusion_steps to at least {max_blocks}, or raise block_length"
        )
    index = torch.arange(max(max_blocks, 1), device=block.device)[None, :]
    divisor = n_blocks.clamp(min=1)
    quotient = torch.div(steps, divisor, rounding_mode="floor")
    result = quotient[:, None] + (index < (steps - quotient * divisor)[:, None])
    return torch.where(index < n_blocks[:, None], result, 0)


def pace_of_blocks(
    block: Tensor, block_steps: Tensor, schedule: NoiseSchedule, commit_schedule: CommitSchedule = "even"
) -> tuple[Tensor, Tensor]:
    """Return how many tokens each step commits, and with what probability it reveals one, block after block.

    Args:
        block: [batch, length] int64, from `split_into_blocks` or `split_by_position`.
        block_steps: [batch, n_blocks] int64, the steps of each.
        schedule: sets the pace.
        commit_schedule: `even`, see `NoiseSchedule.transfer_budget` and `reveal_probability`, or `dream`, see
            `dream_fractions`.
    Returns:
        [batch, steps] int64, the budgets, and [batch, steps] float64, the reveal probabilities; `steps` is the largest
        number of a row.
    """
    steps = max(int(block_steps.sum(dim=1).max()), 1) if len(block) else 1
    sizes = sizes_of_blocks(block).tolist()

    @cache
    def budget(size: int, n_steps: int) -> list[int]:
        if commit_schedule == "dream":
            return dream_budget(size, n_steps, schedule)
        even: list[int] = schedule.transfer_budget(torch.tensor([size]), n_steps)[0].tolist()
        return even

    @cache
    def probabilities(n_steps: int) -> list[float]:
        if commit_schedule == "dream":
            return list(map(float, dream_fractions(n_steps, schedule)))
        return [reveal_probability(step, n_steps, schedule) for step in range(n_steps)]

    budgets, reveal_probabilities = [], []
    for row_sizes, row_steps in zip(sizes, block_steps.tolist(), strict=True):
        blocks = [(size, n_steps) for size, n_steps in zip(row_sizes, row_steps, strict=True) if n_steps]
        unused = steps - sum(n_steps for _, n_steps in blocks)
        budgets.append([*chain(*(budget(*block) for block in blocks)), *[0] * unused])
        reveal_probabilities.append([*chain(*(probabilities(n_steps) for _, n_steps in blocks)), *[0.0] * unused])
    shape = (len(block), steps)
    return (
        torch.tensor(budgets, dtype=torch.int64, device=block.device).view(shape),
        torch.tensor(reveal_probabilities, dtype=torch.float64, device=block.device).view(shape),
    )
