"""Which masked positions a denoising step commits."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from ..diffusion.philox import keyed_uniform
from ..diffusion.schedules import NoiseSchedule
from .steps import reveal_probability


@dataclass(frozen=True)
class Plan:
    """What stays the same over the steps of one call.

    Attributes:
        mask_id: of [MASK].
        steps: number of denoising steps.
        schedule: sets the pace.
        budget: [batch, steps] int64, tokens that each step commits where a strategy goes by number.
        seed: of every draw.
        rows: [batch] int64, ordinal of each sample; with `seed` it fixes the sample's draws.
    """

    mask_id: int
    steps: int
    schedule: NoiseSchedule
    budget: Tensor
    seed: int
    rows: Tensor

    def uniform(self, stream: Stream, step: int, length: int) -> Tensor:
        """Return [batch, length] uniform numbers that depend on seed, sample, stream and step alone."""
        return keyed_uniform(self.seed, stream, self.rows * self.steps + step, length)

    def token_draws(self, step: int, length: int) -> Tensor:
        """Return [batch, length] float64 uniform numbers in [0, 1), multiples of 2**-48, that decide the tokens.

        A large vocabulary has many tokens less probable than 2**-24, the grain of a single draw, so two are joined.
        """
        pair = self.uniform(Stream.SAMPLE_TOKEN, step, 2 * length).double()
        return pair[:, 0::2] + pair[:, 1::2] * 2.0**-24


class Strategy(Protocol):
    """Chooses positions in two moves: before the forward those that need logits, after it those that are committed."""

    @property
    def name(self) -> str:
        """Return the name used in YAML."""

    def candidates(self, is_masked: Tensor, step: int, plan: Plan) -> Tensor:
        """Return [batch, length] bool, the part of `is_masked` that needs logits in this step."""

    def commit(self, candidate: Tensor, confidence: Tensor, step: int, plan: Plan) -> Tensor:
        """Return [batch, length] bool, the part of `candidate` that is committed.

        Args:
            candidate: [batch, length] bool, what `candidates` returned.
            confidence: [batch, length] float32, log-probability of the token drawn there; -inf elsewhere.
            step: from 0.
            plan: of the call.
        """


@dataclass(frozen=True)
class RandomOrder:
    """Each masked token is revealed with the same chance, drawn before the forward, so only those are projected.

    Source: DiffuLLaMA (arXiv 2410.17891), algorithm 2.
    """

    name: str = "random"

    def candidates(self, is_masked: Tensor, step: int, plan: Plan) -> Tensor:
        """Return the masked positions whose draw falls below the step's reveal probability."""
        chance = reveal_probability(step, plan.steps, plan.schedule)
        return is_masked & (plan.uniform(Stream.SAMPLE_ORDER, step, is_masked.shape[1]) < chance)

    def commit(self, candidate: Tensor, confidence: Tensor, step: int, plan: Plan) -> Tensor:
        """Return all of them."""
        return candidate


@dataclass(frozen=True)
class LowConfidence:
    """Every masked token is predicted, the step's budget of most confident ones is kept, the rest stays masked.

    Source: LLaDA (arXiv 2502.09992), section 2.4.
    """

    name: str = "low_confidence"

    def candidates(self, is_masked: Tensor, step: int, plan: Plan) -> Tensor:
        """Return all masked positions, or none of a row whose budget for this step is 0."""
        return is_masked & (plan.budget[:, step] > 0)[:, None]

    def commit(self, candidate: Tensor, confidence: Tensor, step: int, plan: Plan) -> Tensor:
        """Return the budget's number of most confident positions; the earlier one wins a tie."""
        order = confidence.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return candidate & (rank < plan.budget[:, step][:, None])


STRATEGIES: dict[str, Strategy] = {}


def register(strategy: Strategy) -> None:
    """Make `strategy` available under its name.

    Raises:
        ValueError: if the name is taken.
    """
    if strategy.name in STRATEGIES:
        raise ValueError(f"a denoising strategy called {strategy.name!r} exists already")
    STRATEGIES[strategy.name] = strategy


def get_strategy(name: str) -> Strategy:
    """Return the strategy called `name`.

    Raises:
        ValueError: if there is none, naming the nearest.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown denoising_strategy {name!r}; choose one of {', '.join(STRATEGIES)}{hint}")
    return STRATEGIES[name]


register(RandomOrder())
register(LowConfidence())
