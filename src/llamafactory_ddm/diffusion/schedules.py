"""Noise schedules: the share of tokens that is kept at time t, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class NoiseSchedule(Protocol):
    """alpha(t) = P(a token is kept at time t), with alpha(0) = 1 and alpha(1) = 0; tensors keep the shape of `t`."""

    @property
    def name(self) -> str:
        """Return the name used in YAML."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return P(a token is kept), in [0, 1]."""

    def dalpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha with respect to t, at most 0."""

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return the t at which `alpha` of the tokens are kept."""

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return -alpha'(t) / (1 - alpha(t)), the weight of a masked token in the evidence bound."""


@dataclass(frozen=True)
class LinearSchedule:
    """alpha = 1 - t, weight 1/t.

    Source: DiffuLLaMA (arXiv 2410.17891), eq. 7; MD4 (arXiv 2406.04329), table 4.
    """

    name: str = "linear"

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t."""
        return 1.0 - t

    def dalpha(self, t: Tensor) -> Tensor:
        """Return -1."""
        return -torch.ones_like(t)

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return 1 - alpha."""
        return 1.0 - alpha

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return 1 / t."""
        return 1.0 / t


@dataclass(frozen=True)
class CosineSchedule:
    """alpha = 1 - cos(pi/2 (1 - t)), weight pi/2 tan(pi/2 (1 - t)).

    Source: MD4 (arXiv 2406.04329), table 4.
    """

    name: str = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - cos(pi/2 (1 - t))."""
        return 1.0 - torch.cos(0.5 * math.pi * (1.0 - t))

    def dalpha(self, t: Tensor) -> Tensor:
        """Return -pi/2 sin(pi/2 (1 - t))."""
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * (1.0 - t))

    def inverse(self, alpha: Tensor) -> Tensor:
        """Return 1 - 2/pi arccos(1 - alpha)."""
        return 1.0 - torch.arccos(1.0 - alpha) * (2.0 / math.pi)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Return pi/2 tan(pi/2 (1 - t))."""
        return 0.5 * math.pi * torch.tan(0.5 * math.pi * (1.0 - t))


SCHEDULES: dict[str, NoiseSchedule] = {"linear": LinearSchedule(), "cosine": CosineSchedule()}


def get_schedule(name: str) -> NoiseSchedule:
    """Return the schedule called `name`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown noise_schedule {name!r}; choose one of {sorted(SCHEDULES)}")
    return SCHEDULES[name]
