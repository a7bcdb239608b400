"""Strategies that mask again what they have committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from .budget import remask_probability
from .logits import Measure
from .state import Turn
from .strategies import Strategy, register


@runtime_checkable
class Remasking(Strategy, Protocol):
    """A strategy with a third move, made before the forward; most strategies have none."""

    def remask(self, turn: Turn) -> Tensor:
        """Return [batch, length] bool, positions of `turn.is_decided` that are masked after this step."""

    def stays(self, turn: Turn) -> Tensor:
        """Return [batch] bool, rows that do not leave their block after this step though nothing in it is masked."""


def remasked(strategy: Strategy, turn: Turn) -> Tensor | None:
    """Return [batch, length] bool, the decided positions that a strategy masks again; None where it never does."""
    return strategy.remask(turn) & turn.is_decided if isinstance(strategy, Remasking) else None


def stays(strategy: Strategy, turn: Turn) -> Tensor:
    """Return [batch] bool, rows that a strategy keeps at their block."""
    return strategy.stays(turn) if isinstance(strategy, Remasking) else torch.zeros_like(turn.steps, dtype=torch.bool)


@dataclass(frozen=True)
class Remdm:
    """Random order in which decided tokens fall back to [MASK], each with the same chance, and are written anew.

    In a step from t to s a decided token is masked with probability sigma = min(remask_cap, (1 - alpha_s) / alpha_t)
    and a masked one revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that the expected
    share of decided tokens is alpha_s as in random order. The last step masks nothing and reveals all. With a cap of
    0 this is random order, draw for draw; with another a block takes all of its steps.

    Args:
        remask_cap: the most that sigma may be, in [0, 1].
    Raises:
        ValueError: if it is out of range.
    Source: ReMDM (arXiv 2503.00307), its capped schedule.
    """

    remask_cap: float = 0.02
    name: str = "remdm"
    measures: frozenset[Measure] = frozenset()

    def __post_init__(self) -> None:
        if not 0.0 <= self.remask_cap <= 1.0:
            raise ValueError(f"remask_cap must lie in [0, 1], got {self.remask_cap}")

    def candidates(self, turn: Turn) -> Tensor:
        """Return the masked positions whose draw falls below the step's reveal probability."""
        _, more = remask_probability(turn.step, turn.steps, turn.plan.schedule, self.remask_cap)
        u = turn.plan.uniform(Stream.SAMPLE_ORDER, turn.row_step)[..., 0]
        return turn.is_masked & (u.double() < turn.of(turn.plan.chance) + more[:, None])

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return all of them."""
        return candidate

    def remask(self, turn: Turn) -> Tensor:
        """Return the decided positions whose draw falls below sigma."""
        sigma, _ = remask_probability(turn.step, turn.steps, turn.plan.schedule, self.remask_cap)
        u = turn.plan.uniform(Stream.REMASK, turn.row_step)[..., 0]
        return turn.is_decided & (u.double() < sigma[:, None])

    def stays(self, turn: Turn) -> Tensor:
        """Return the rows whose block has steps left: what is decided early may yet be masked again."""
        left = turn.step + 1 < turn.steps
        return left if self.remask_cap > 0.0 else torch.zeros_like(left)


register(Remdm())
