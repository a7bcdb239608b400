"""Committing all that is left of a block once the model has made up its mind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .logits import Measure
from .state import Turn

MEASURES: frozenset[Measure] = frozenset({"argmax", "entropy"})


@dataclass(frozen=True)
class StableStop:
    """Commit all that is left of a block once the model has made up its mind.

    Attributes:
        stable_steps: steps in a row in which the most probable token of no masked position changed.
        entropy: nats; the mean over the masked positions must not exceed it.
    Raises:
        ValueError: if a value is out of range.
    """

    stable_steps: int = 2
    entropy: float = 0.1

    def __post_init__(self) -> None:
        if self.stable_steps < 1:
            raise ValueError(f"stable_steps must be at least 1, got {self.stable_steps}")
        if not self.entropy >= 0.0:
            raise ValueError(f"entropy must be at least 0, got {self.entropy}")

    def settled(self, turn: Turn, stable: Tensor, entropy: Tensor) -> Tensor:
        """Return [batch, length] bool, the masked positions of rows that may stop.

        Args:
            turn: of this step.
            stable: [batch] int64, steps since a guess changed.
            entropy: [batch, length] float32, in nats.
        """
        count = turn.is_masked.sum(dim=1).clamp(min=1)
        mean = torch.where(turn.is_masked, entropy, 0.0).sum(dim=1) / count
        return turn.is_masked & ((stable >= self.stable_steps) & (mean <= self.entropy))[:, None]
