"""Denoising strategies: which masked positions a step commits, and with ReMDM which decoded ones it remasks."""

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
from .state import StepView


class Strategy(Protocol):
    """Chooses positions twice: before the forward pass those that need logits, after it those that are committed.

    `has_own_pace` is true for a strategy that reads neither `plan.budget` nor `plan.reveal_probability`.
    """

    @property
    def name(self) -> str:
        """Return the name used in YAML."""

    @property
    def measures(self) -> frozenset[Measure]:
        """Return the scores of a position that `commit` reads."""

    def candidates(self, view: StepView) -> Tensor:
        """Return [batch, length] bool, the part of `view.scope` that needs logits in this step."""

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return [batch, length] bool, the masked candidates that are committed.

        Args:
            view: of this step.
            candidate: [batch, length] bool, what `candidates` returned.
            score: returns [batch, length] float32 of one of `measures`; undefined where there is no candidate.
        """


# A class or another callable, from parameters to a strategy.
STRATEGIES: Registry[Callable[..., Strategy]] = Registry("denoising_strategy")


def get_strategy(name: str, **parameters: Any) -> Strategy:
    """Return the strategy called `name`.

    Args:
        name: in `STRATEGIES`.
        parameters: of the strategy; in YAML the keys that it reads, and strategy_args.
    Raises:
        ValueError: if there is no such strategy or parameter, naming the nearest, or a parameter is missing or out of
            range.
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
    """Return [batch, length] int64, 0 for a row's highest-scoring candidate; ties go to the earlier position."""
    order = score.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, rank)


def still_needed(view: StepView) -> Tensor:
    """Return [batch, 1] int64, ceil(masked / steps left), at least 1: as many tokens a step must commit to finish."""
    left = (view.steps - view.step).clamp(min=1)
    return torch.div(view.is_masked.sum(dim=1) + left - 1, left, rounding_mode="floor").clamp(min=1)[:, None]


@STRATEGIES.register
@dataclass(frozen=True)
class RandomOrder:
    """Reveal each masked token with the same probability, drawn before the forward pass; only these need logits.

    Source: DiffuLLaMA (arXiv 2410.17891), algorithm 2.
    """

    name: ClassVar[str] = "random"
    measures: ClassVar[frozenset[Measure]] = frozenset()

    def candidates(self, view: StepView) -> Tensor:
        """Return the masked positions whose draw falls below the step's reveal probability."""
        u = view.plan.uniform(Stream.SAMPLE_ORDER, view.row_step)
        return view.is_masked & (u.double() < view.of_step(view.plan.reveal_probability))

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return all of them."""
        return candidate


@dataclass(frozen=True)
class Budgeted:
    """`low_confidence`, `margin`, `entropy`: predict every masked token and keep those with the highest score.

    As many are kept as the step's budget says.

    Args:
        name: in YAML.
        measure: the score: `log_prob` of the token drawn, `margin` between the two most probable tokens, or
            `entropy`, whose lowest values are best.
    Source: LLaDA (arXiv 2502.09992), section 2.4, for the budget and `low_confidence`; Kim et al. 2025 (arXiv
        2502.06768), section 4, for the margin; Dream (arXiv 2508.15487) for the entropy.
    Deviates: Dream scores the filtered distribution and commits by its own schedule; here that is
        `score_distribution: filtered` and `commit_schedule: dream`, and by default the scores are the model's own and
        the budget LLaDA's. Ties go to the earlier position, which Dream leaves to `topk`, and [MASK] is never
        drawn.
    """

    name: str
    measure: Measure

    @property
    def measures(self) -> frozenset[Measure]:
        """Return the one score."""
        return frozenset({self.measure})

    def candidates(self, view: StepView) -> Tensor:
        """Return all masked positions, or none of a row whose budget for this step is 0."""
        return view.is_masked & (view.of_step(view.plan.budget) > 0)

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the budget's number of best positions; the earlier one wins a tie."""
        value = score(self.measure)
        value = -value if self.measure == "entropy" else value
        return candidate & (ranks(value, candidate) < view.of_step(view.plan.budget))


for _name, _measure in (("low_confidence", "log_prob"), ("margin", "margin"), ("entropy", "entropy")):
    STRATEGIES.register(partial(Budgeted, _name, _measure), name=_name)  # type: ignore[arg-type]


@STRATEGIES.register
@dataclass(frozen=True)
class TopK:
    """Score all positions of the block again in each step, and commit the masked ones that do not score low.

    With t of the T steps left after this one, k = trunc(float32(n t / T)) of the block's n positions should stay
    masked. A score is low if it lies strictly below the (k + 1)-th lowest of all n, decoded positions included. So a
    step commits at least as many as the schedule requires. Decoded tokens do not change.

    Source: DiffuLLaMA (arXiv 2410.17891), the sampler of its GSM8K evaluation; Zheng et al. 2023 (arXiv 2302.05737),
        algorithm 2.
    Deviates: with shift, position 0 is always fixed and does not compete; DiffuLLaMA gives it the score of
        position 1.
    """

    name: ClassVar[str] = "topk"
    measures: ClassVar[frozenset[Measure]] = frozenset({"log_prob"})
    has_own_pace: ClassVar[bool] = True

    def candidates(self, view: StepView) -> Tensor:
        """Return all positions of the block, as decoded ones compete."""
        return view.scope & view.is_masked.any(dim=1, keepdim=True)

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the masked positions that do not score low."""
        value = score("log_prob").masked_fill(~candidate, torch.inf)
        n, left = view.scope.sum(dim=1), view.steps - 1 - view.step
        k = view.plan.schedule.kept_masked(n, left, view.steps.clamp(min=1))
        cutoff = value.sort(dim=1).values.gather(1, k.clamp(0, value.shape[1] - 1)[:, None])
        return view.is_masked & candidate & ~(value < cutoff)


@STRATEGIES.register
@dataclass(frozen=True)
class ConfidenceThreshold:
    """Commit every token whose probability reaches a threshold, and at least the most probable one.

    More tokens are committed only where the steps would not suffice otherwise; with a step for each token they do.

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

    def candidates(self, view: StepView) -> Tensor:
        """Return all masked positions."""
        return view.is_masked

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the candidates that reach the threshold, and at least the best one."""
        value = score("log_prob")
        reached = value.exp() >= self.confidence_threshold
        return candidate & (reached | (ranks(value, candidate) < still_needed(view)))


@STRATEGIES.register
@dataclass(frozen=True)
class EntropyBound:
    """Commit the largest set of positions whose joint uncertainty stays within a bound, and at least one.

    Positions are taken in order of entropy, lowest first, while sum(H) - max(H) over their entropies H is at most the
    bound. That difference is an upper bound on the mutual information of the tokens.

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

    def candidates(self, view: StepView) -> Tensor:
        """Return all masked positions."""
        return view.is_masked

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return the largest set within the bound, and at least the best candidate."""
        entropy = score("entropy").double()
        rank = ranks(-entropy, candidate)
        in_order = torch.zeros_like(entropy).scatter_(1, rank, entropy.masked_fill(~candidate, 0.0))
        before = (
            in_order.cumsum(dim=1) - in_order
        )  # sum(H) - max(H), as the position itself has the largest entropy so far
        within = before.gather(1, rank) <= self.entropy_bound
        return candidate & (within | (rank < still_needed(view)))


@runtime_checkable
class Remasking(Strategy, Protocol):
    """A strategy that also remasks decoded positions, chosen before the forward pass."""

    def remask(self, view: StepView) -> Tensor:
        """Return [batch, length] bool, positions of `view.is_decoded` that are remasked after this step."""

    def stays(self, view: StepView) -> Tensor:
        """Return [batch] bool, rows that stay in their block after this step even if it is fully decoded."""


def remask_positions(strategy: Strategy, view: StepView) -> Tensor:
    """Return [batch, length] bool, the decoded positions that a strategy remasks after this step."""
    if isinstance(strategy, Remasking):
        return strategy.remask(view) & view.is_decoded
    return torch.zeros_like(view.is_masked)


def stays(strategy: Strategy, view: StepView) -> Tensor:
    """Return [batch] bool, rows that a strategy keeps in their block although it is fully decoded."""
    return strategy.stays(view) if isinstance(strategy, Remasking) else torch.zeros_like(view.steps, dtype=torch.bool)


@STRATEGIES.register
@dataclass(frozen=True)
class Remdm:
    """Random order with remasking: decoded tokens return to [MASK] with equal probability and are generated again.

    In a step from t to s a decoded token is masked with probability sigma = min(remask_cap, (1 - alpha_s) / alpha_t)
    and a masked one revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that the expected
    fraction of decoded tokens is alpha_s as in random order. The last step masks nothing and reveals all. A cap of 0
    gives random order with the same draws; with a cap above 0 a block takes all of its steps.

    Args:
        remask_cap: upper bound on sigma, the remasking probability, in [0, 1].
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

    def candidates(self, view: StepView) -> Tensor:
        """Return the masked positions whose draw falls below the step's reveal probability."""
        _, extra = remask_probability(view.step, view.steps, view.plan.schedule, self.remask_cap)
        u = view.plan.uniform(Stream.SAMPLE_ORDER, view.row_step)
        return view.is_masked & (u.double() < view.of_step(view.plan.reveal_probability) + extra[:, None])

    def commit(self, view: StepView, candidate: Tensor, score: Callable[[Measure], Tensor]) -> Tensor:
        """Return all of them."""
        return candidate

    def remask(self, view: StepView) -> Tensor:
        """Return the decoded positions whose draw falls below sigma."""
        sigma, _ = remask_probability(view.step, view.steps, view.plan.schedule, self.remask_cap)
        u = view.plan.uniform(Stream.REMASK, view.row_step)
        return view.is_decoded & (u.double() < sigma[:, None])

    def stays(self, view: StepView) -> Tensor:
        """Return the rows whose block has steps left: a token decoded early may still be masked again."""
        has_steps = view.step + 1 < view.steps
        return has_steps if self.remask_cap > 0.0 else torch.zeros_like(has_steps)
