"""How to sample, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from .budget import COMMIT_SCHEDULES, CommitSchedule
from .edits import MOST_BY_DEFAULT, Edits, edits_of
from .length_predictors import PREDICTORS, PredictorName, check_coverage
from .logits import LogitsConfig
from .strategies import Strategy, get_strategy

EarlyStop = Literal["none", "eos", "predict", "grow"]
EARLY_STOPS: tuple[EarlyStop, ...] = get_args(EarlyStop)
# A key that one strategy reads -> that strategy.
STRATEGY_KEYS = {
    "confidence_threshold": "confidence_threshold",
    "entropy_bound": "entropy_bound",
    "remask_cap": "remdm",
}
MOST_STEPS = 100_000  # the budget of every step is laid out ahead


@dataclass(frozen=True)
class SamplingSettings:
    """How texts are sampled; the names are those of the YAML keys where there is one.

    Attributes:
        denoising_strategy: see `sampling.strategies`.
        diffusion_steps: denoising steps of a whole canvas, at most; one that grows gets its share for each part.
        block_length: tokens decided together, from left to right; None is all at once.
        commit_schedule: how many tokens each step commits: `even` shares, LLaDA's, or those of `dream`; of the
            strategies that go by number, and of `random` the chances.
        logits: temperature, filters, penalty, guidance, and which distribution is scored.
        confidence_threshold: of the strategy of this name.
        entropy_bound: of the strategy of this name, in nats.
        remask_cap: of the strategy remdm, the most that a token's chance to be masked again may be.
        strategy_args: further parameters of the strategy, by name.
        edit_ratio: see `sampling.edits`; None takes the checkpoint's uniform_ratio, at most one half, or 0 where there
            is an edit_threshold.
        edit_threshold: see there.
        edit_steps: further steps of a block, see there.
        early_stop: `none` goes on to the edge of the canvas; `eos` leaves a text alone once its end and all before it
            are written, it stays the same text unless it would be revised; `predict` also gives each text only the
            places that it will need; `grow` begins with few places and adds to them.
        length_predictor: of `predict`, see `sampling.length`.
        length_coverage: the probability with which a text is to have ended within its places, of `predict` and `grow`.
        grow_length: places to begin with and to add, of `grow`.
        eos_last: whether an end is committed only when nothing else of its block is left.
        seed: of every draw.
    """

    denoising_strategy: str = "low_confidence"
    diffusion_steps: int = 64
    block_length: int | None = None
    commit_schedule: CommitSchedule = "even"
    logits: LogitsConfig = field(default_factory=lambda: LogitsConfig(temperature=0.95, top_p=0.9))
    confidence_threshold: float = 0.9
    entropy_bound: float = 0.1
    remask_cap: float = 0.02
    strategy_args: Mapping[str, Any] = field(default_factory=dict)
    edit_ratio: float | None = None
    edit_threshold: float | None = None
    edit_steps: int = 0
    early_stop: EarlyStop = "eos"
    length_predictor: PredictorName = "belief"
    length_coverage: float = 0.95
    grow_length: int = 32
    eos_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.diffusion_steps <= MOST_STEPS:
            raise ValueError(
                f"diffusion_steps must be at least 1 and at most {MOST_STEPS}, got {self.diffusion_steps}; a step "
                "beyond one for each token changes little"
            )
        if self.early_stop not in EARLY_STOPS:
            raise ValueError(f"early_stop must be one of {', '.join(EARLY_STOPS)}, got {self.early_stop!r}")
        if self.length_predictor not in PREDICTORS:
            raise ValueError(f"length_predictor must be one of {', '.join(PREDICTORS)}, got {self.length_predictor!r}")
        check_coverage(self.length_coverage)
        if self.grow_length < 1:
            raise ValueError(f"grow_length must be at least 1, got {self.grow_length}")
        if self.early_stop in ("predict", "grow") and self.logits.guidance_scale != 1.0:
            raise ValueError(
                f"early_stop: {self.early_stop} does not go with guidance_scale: {self.logits.guidance_scale}, as "
                "lengths are predicted without guidance; take early_stop: eos, or leave guidance_scale at 1"
            )
        strategy = self.strategy()
        if self.eos_last and not strategy.measures:
            raise ValueError(
                f"eos_last: true needs a denoising_strategy that goes by certainty, which {self.denoising_strategy} "
                "does not; take low_confidence, or remove eos_last"
            )
        check_scores(strategy, self.commit_schedule, self.logits.score_distribution)
        self.edits(MOST_BY_DEFAULT)  # whatever the checkpoint says, the rest has to fit

    def strategy(self) -> Strategy:
        """Return the strategy with its own parameter.

        Raises:
            ValueError: if there is none of this name, or the parameter is out of range.
        """
        own = {key: getattr(self, key) for key, owner in STRATEGY_KEYS.items() if owner == self.denoising_strategy}
        for key in own.keys() & self.strategy_args.keys():
            raise ValueError(
                f"strategy_args: {key} is a key of its own; write {key}: {self.strategy_args[key]} instead"
            )
        return get_strategy(self.denoising_strategy, **own, **self.strategy_args)

    def edits(self, uniform_ratio: float = 0.0) -> Edits:
        """Return which decided tokens are rewritten, with a checkpoint of that `uniform_ratio`.

        Raises:
            ValueError: naming the keys, if there are further steps and nothing to do in them.
        """
        return edits_of(self.edit_ratio, self.edit_threshold, self.edit_steps, default=uniform_ratio)


def check_scores(strategy: Strategy, commit_schedule: str, score_distribution: str) -> None:
    """Look at the keys commit_schedule and score_distribution.

    Args:
        strategy: the denoising strategy.
        commit_schedule: see `SamplingSettings`.
        score_distribution: see `LogitsConfig`.
    Raises:
        ValueError: if one has no effect, or there is no such schedule.
    """
    if commit_schedule not in COMMIT_SCHEDULES:
        raise ValueError(f"commit_schedule must be one of {', '.join(COMMIT_SCHEDULES)}, got {commit_schedule!r}")
    if commit_schedule != "even" and getattr(strategy, "has_own_pace", False):
        raise ValueError(
            f"commit_schedule: {commit_schedule} has no effect, as denoising_strategy: {strategy.name} has a pace of "
            "its own; take entropy, margin, low_confidence or random, or remove commit_schedule"
        )
    if score_distribution != "model" and not strategy.measures:
        raise ValueError(
            f"score_distribution: {score_distribution} has no effect, as denoising_strategy: {strategy.name} scores "
            "no position; take entropy, margin or low_confidence, or remove score_distribution"
        )
