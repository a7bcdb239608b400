"""How many tokens a denoising step commits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.schedules import NoiseSchedule


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


def transfer_budget(n_masked: Tensor, steps: int, schedule: NoiseSchedule) -> Tensor:
    """Return how many tokens each step commits, so that after the last none is masked.

    With the linear schedule each step gets n // steps tokens and the first n % steps one more; with another, step i
    brings the number revealed to n * alpha(1 - (i + 1) / steps), rounded.

    Args:
        n_masked: [batch] int64.
        steps: at least 1.
        schedule: gives alpha.
    Returns:
        [batch, steps] int64; each row sums to n_masked.
    Raises:
        ValueError: if `steps` is below 1.
    Source: LLaDA (arXiv 2502.09992), get_num_transfer_tokens of its published code.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if schedule.name == "linear":
        place = torch.arange(steps, device=n_masked.device)
        share = torch.div(n_masked, steps, rounding_mode="floor")
        return share[:, None] + (place[None, :] < (n_masked - share * steps)[:, None])
    # alpha is computed on the CPU whatever the device, so that a product near one half rounds alike everywhere.
    alpha = schedule.alpha(1.0 - torch.arange(1, steps + 1, dtype=torch.float64) / steps).to(n_masked.device)
    revealed = (n_masked.double()[:, None] * alpha[None, :]).round().to(torch.int64)
    revealed[:, -1] = n_masked
    return revealed.diff(dim=1, prepend=torch.zeros_like(revealed[:, :1]))
