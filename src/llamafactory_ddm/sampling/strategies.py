"""Which masked positions a denoising step unmasks, and for ReMDM which it masks again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..diffusion.noise import Stream
from ..utils.registry import Registry, did_you_mean
from .budget import remask_probability
from .logits import Measure
from .state import Turn


class Strategy(Protocol):
    """Chooses positions in two moves: before the forward those that need logits, after it those that are committed.

    A strategy that does not go by `plan.budget` or `plan.chance` has a `has_own_pace` that is true.
    """

    @property
    def name(self) -> str:
        """Return the name used in YAML."""

    @property
    def measures(self) -> frozenset[Measure]:
        """Return what `commit` needs to know of the positions."""

    def candidates(self, turn: Turn) -> Tensor:
        """Return [batch, length] bool, the part of `turn.scope` that needs logits in this step."""

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return [batch, length] bool, the masked candidates that are committed.

        Args:
            turn: of this step.
            candidate: [batch, length] bool, what `candidates` returned.
            score: gives [batch, length] float32 of one of `measures`; means nothing where there is no candidate.
        """


# A class, or another callable, that makes a strategy of its parameters.
STRATEGIES: Registry[Callable[..., Strategy]] = Registry("denoising_strategy")


def get_strategy(name: str, **parameters: Any) -> Strategy:
    """Return the strategy called `name`.

    Args:
        name: in `STRATEGIES`.
        parameters: of the strategy, in YAML its own keys and strategy_args; those left out have their defaults.
    Raises:
        ValueError: if there is no such strategy or parameter, with the nearest, or a parameter has no value, or one
            that is out of range.
    """
    make = STRATEGIES.get(name)
    known = list(inspect.signature(make).parameters)
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(
                f"strategy_args: denoising_strategy: {name} has no parameter {parameter!r}"
                f"{did_you_mean(parameter, known)}; it has {', '.join(known) or 'none'}"
            )
    try:
        return make(**parameters)
    except TypeError as error:
        raise ValueError(f"strategy_args: denoising_strategy: {name} refuses {parameters}: {error}") from error


def ranks(score: Tensor, candidate: Tensor) -> Tensor:
    """Return [batch, length] int64, 0 for a row's highest-scoring candidate; of equal ones the earlier comes first."""
    order = score.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def still_needed(turn: Turn) -> Tensor:
    """Return [batch, 1] how many positions a step must commit at least, lest the block's steps run out: 1 or more."""
    left = (turn.steps - turn.step).clamp(min=1)
    return torch.div(turn.is_masked.sum(dim=1) + left - 1, left, rounding_mode="floor").clamp(min=1)[:, None]


@STRATEGIES.register
@dataclass(frozen=True)
class RandomOrder:
    """Each masked token is revealed with the same chance, drawn before the forward, so only those are projected.

    Source: DiffuLLaMA (arXiv 2410.17891), algorithm 2.
    """

    name: ClassVar[str] = "random"
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def candidates(self, turn: Turn) -> Tensor:
        """Return the masked positions whose draw falls below the step's reveal probability."""
        u = turn.plan.uniform(Stream.SAMPLE_ORDER, turn.row_step)[..., 0]
        return turn.is_masked & (u.double() < turn.of(turn.plan.chance))

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return all of them."""
        return candidate


@dataclass(frozen=True)
class Budgeted:
    """Every masked token is predicted, the step's budget of those with the highest score is kept.

    Args:
        name: in YAML.
        measure: the score: `log_prob` of the token drawn, `margin` between the two most probable tokens, or
            `entropy`, of which the lowest is best.
    Source: LLaDA (arXiv 2502.09992), section 2.4, for the budget and `low_confidence`; Kim et al. 2025 (arXiv
        2502.06768), section 4, for the margin; Dream (arXiv 2508.15487) for the entropy.
    Deviates: Dream scores the filtered distribution and commits by its own schedule; here that is
        `score_distribution: filtered` and `commit_schedule: dream`, and by default the scores are the model's own and
        the budget LLaDA's. Of equal scores the earlier position comes first, which Dream leaves to `topk`, and
        [MASK] is never drawn.
    """

    name: str
    measure: Measure

    @property
    def measures(self) -> frozenset[Measure]:
        """Return the one score."""
        return frozenset({self.measure})

    def candidates(self, turn: Turn) -> Tensor:
        """Return all masked positions, or none of a row whose budget for this step is 0."""
        return turn.is_masked & (turn.of(turn.plan.budget) > 0)

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the budget's number of best positions; the earlier one wins a tie."""
        value = score(self.measure)
        value = -value if self.measure == "entropy" else value
        return candidate & (ranks(value, candidate) < turn.of(turn.plan.budget))


for _name, _measure in (("low_confidence", "log_prob"), ("margin", "margin"), ("entropy", "entropy")):
    STRATEGIES.register(partial(Budgeted, _name, _measure), name=_name)  # type: ignore[arg-type]


@STRATEGIES.register
@dataclass(frozen=True)
class TopK:
    """All positions of the block are scored anew in each step; those still masked that do not score low are committed.

    At loop t of T, counted down to 0, k = trunc(float32(n t / T)) of the n positions are to stay masked. A position is
    low if its score lies strictly below the (k + 1)-th lowest of all n, those decided already included, so that a step
    commits at least as many as the schedule asks for; a decided token stays.

    Source: DiffuLLaMA (arXiv 2410.17891), the sampler of its GSM8K evaluation; Zheng et al. 2023 (arXiv 2302.05737),
        algorithm 2.
    Deviates: with shift, position 0 is always given and takes no part, where DiffuLLaMA lends it the score of
        position 1.
    """

    name: ClassVar[str] = "topk"
    measures: ClassVar[frozenset[Measure]] = frozenset({"log_prob"})
    has_own_pace: ClassVar[bool] = True

    def candidates(self, turn: Turn) -> Tensor:
        """Return all positions of the block, as decided ones compete."""
        return turn.scope & turn.is_masked.any(dim=1, keepdim=True)

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the masked positions that do not score low."""
        value = score("log_prob").masked_fill(~candidate, torch.inf)
        n, left = turn.scope.sum(dim=1), turn.steps - 1 - turn.step
        k = turn.plan.schedule.kept_masked(n, left, turn.steps.clamp(min=1))
        cutoff = value.sort(dim=1).values.gather(1, k.clamp(0, value.shape[1] - 1)[:, None])
        return turn.is_masked & candidate & ~(value < cutoff)


@STRATEGIES.register
@dataclass(frozen=True)
class ConfidenceThreshold:
    """Every token whose probability reaches a threshold is committed, and at least the most probable one.

    More are committed only where the steps would run out otherwise, which cannot happen with as many steps as tokens.

    Args:
        confidence_threshold: probability in (0, 1].
    Raises:
        ValueError: if it is out of range.
    Source: Fast-dLLM (arXiv 2505.22618), section 3.3.
    """

    confidence_threshold: float = 0.9
    name: ClassVar[str] = "confidence_threshold"
    measures: ClassVar[frozenset[Measure]] = frozenset({"log_prob"})
    has_own_pace: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.confidence_threshold <= 1.0:
            raise ValueError(f"confidence_threshold must lie in (0, 1], got {self.confidence_threshold}")

    def candidates(self, turn: Turn) -> Tensor:
        """Return all masked positions."""
        return turn.is_masked

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return those that reach the threshold, or the best."""
        value = score("log_prob")
        sure = value.exp() >= self.confidence_threshold
        return candidate & (sure | (ranks(value, candidate) < still_needed(turn)))


@STRATEGIES.register
@dataclass(frozen=True)
class EntropyBound:
    """The largest set of positions whose joint uncertainty stays under a bound is committed, and at least one.

    Positions are taken in order of entropy, lowest first, while the sum of the entropies, the largest left out, is at
    most the bound: that sum limits how much the tokens of a step can depend on each other (their mutual information).

    Args:
        entropy_bound: nats, at least 0.
    Raises:
        ValueError: if it is out of range.
    Source: Ben-Hamu et al. 2025 (arXiv 2505.24857), section 4.
    """

    entropy_bound: float = 0.1
    name: ClassVar[str] = "entropy_bound"
    measures: ClassVar[frozenset[Measure]] = frozenset({"entropy"})
    has_own_pace: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.entropy_bound >= 0.0:
            raise ValueError(f"entropy_bound must be at least 0, got {self.entropy_bound}")

    def candidates(self, turn: Turn) -> Tensor:
        """Return all masked positions."""
        return turn.is_masked

    def commit(self, turn: Turn, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the largest set within the bound."""
        entropy = score("entropy").double()
        rank = ranks(-entropy, candidate)
        in_order = torch.zeros_like(entropy).scatter_(1, rank, entropy.masked_fill(~candidate, 0.0))
        before = in_order.cumsum(dim=1) - in_order  # without the entropy of the position itself, the largest so far
        within = before.gather(1, rank) <= self.entropy_bound
        return candidate & (within | (rank < still_needed(turn)))


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


@STRATEGIES.register
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
    name: ClassVar[str] = "remdm"
    measures: ClassVar[frozenset[Measure]] = frozenset()
    has_own_pace: ClassVar[bool] = True

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
