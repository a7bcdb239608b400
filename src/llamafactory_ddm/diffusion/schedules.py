"""Noise schedules: alpha(t), the probability that a token is kept at time t, and what follows from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.registry import Registry


class NoiseSchedule(ABC):
    """alpha(t) = P(a token is kept at time t), with alpha(0) = 1 and alpha(1) = 0; tensors keep the shape of `t`.

    A schedule is its `name`, `alpha` and `dalpha`; the rest follows from them.
    """

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return P(a token is kept), in [0, 1], falling with t."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha with respect to t, at most 0."""

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return -alpha'(t) / (1 - alpha(t)), the weight of a masked token in the evidence bound."""
        return -self.dalpha(t) / (1.0 - self.alpha(t))

    def transfer_budget(self, n_masked: Tensor, steps: int) -> Tensor:
        """Return the number of tokens that each sampling step commits; the last step commits all that are left.

        Step i = 0 .. T - 1 ends at t_i = 1 - (i + 1) / T, when round(n alpha(t_i)) tokens are committed in total.

        Args:
            n_masked: [batch] int64, n, the masked tokens at the start.
            steps: T, at least 1.
        Returns:
            [batch, steps] int64; each row sums to n_masked.
        Raises:
            ValueError: if `steps` is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        # alpha is always computed on the CPU, so that every device rounds a product near one half alike.
        alpha = self.alpha(1.0 - torch.arange(1, steps + 1, dtype=torch.float64) / steps).to(n_masked.device)
        committed = (n_masked.double()[:, None] * alpha[None, :]).round().to(torch.int64)
        committed[:, -1] = n_masked
        return committed.diff(dim=1, prepend=torch.zeros_like(committed[:, :1]))

    def kept_masked(self, n: Tensor, left: Tensor, steps: Tensor) -> Tensor:
        """Return how many of n positions stay masked when `left` of T steps remain: trunc(n (1 - alpha(left / T))).

        Args:
            n: [batch] int64.
            left: [batch] int64, remaining steps.
            steps: [batch] int64, T, at least 1.
        Returns:
            [batch] int64.
        """
        return (n.double() * (1.0 - self.alpha(left.double() / steps.double()))).to(torch.int64)


SCHEDULES: Registry[type[NoiseSchedule]] = Registry("noise_schedule")


def get_schedule(name: str) -> NoiseSchedule:
    """Return the noise schedule with this name.

    Raises:
        ValueError: if no schedule has this name; the message suggests the nearest one.
    """
    return SCHEDULES.get(name)()


@SCHEDULES.register
@dataclass(frozen=True)
class LinearSchedule(NoiseSchedule):
    """alpha = 1 - t, weight 1/t.

    Source: DiffuLLaMA (arXiv 2410.17891), eq. 7; MD4 (arXiv 2406.04329), table 4.
    """

    name: ClassVar[str] = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1.0 - t

    def dalpha(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return 1 / t."""
        return 1.0 / t

    def transfer_budget(self, n_masked: Tensor, steps: int) -> Tensor:
        """Return n // T tokens for each of the T steps, and one more for the first n % T steps.

        Source: LLaDA (arXiv 2502.09992), get_num_transfer_tokens of its published code.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        step = torch.arange(steps, device=n_masked.device)
        share = torch.div(n_masked, steps, rounding_mode="floor")
        return share[:, None] + (step[None, :] < (n_masked - share * steps)[:, None])

    def kept_masked(self, n: Tensor, left: Tensor, steps: Tensor) -> Tensor:
        """Return trunc(n left / T) in float32, which rounds as the published code does.

        Source: DiffuLLaMA (arXiv 2410.17891), the sampler of its GSM8K evaluation.
        """
        return ((n * left).to(torch.float32) / steps.to(torch.float32)).to(torch.int64)


@SCHEDULES.register
@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """alpha = 1 - cos(pi/2 (1 - t)), weight pi/2 tan(pi/2 (1 - t)).

    Source: MD4 (arXiv 2406.04329), table 4.
    """

    name: ClassVar[str] = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - cos(pi/2 (1 - t))."""
        return 1.0 - torch.cos(0.5 * math.pi * (1.0 - t))

    def dalpha(self, t: Tensor) -> Tensor:
        """Return -pi/2 sin(pi/2 (1 - t))."""
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * (1.0 - t))

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return pi/2 tan(pi/2 (1 - t))."""
        return 0.5 * math.pi * torch.tan(0.5 * math.pi * (1.0 - t))
