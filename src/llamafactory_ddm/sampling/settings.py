"""How to sample, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..utils.keys import Key, check_fields, key, keys_of
from .budget import COMMIT_SCHEDULES, CommitSchedule
from .edits import MOST_BY_DEFAULT, Edits, edits_of
from .length_predictors import PREDICTORS, PredictorName
from .logits import LogitsConfig
from .strategies import STRATEGIES, Strategy, get_strategy

EarlyStop = Literal["none", "eos", "predict", "grow"]
EARLY_STOPS: tuple[EarlyStop, ...] = get_args(EarlyStop)


@dataclass(frozen=True)
class SamplingSettings:
    """How texts are sampled: the one definition of the keys of YAML, the shell command and Python.

    What each attribute does, and which values it takes, stands with it; `KEYS` has them under their names in YAML.

    Raises:
        ValueError: naming the key, if a value is not allowed or two do not go together.
    """

    denoising_strategy: str = key("low_confidence", "Which masked tokens a sampling step commits.", choices=STRATEGIES)
    strategy_args: Mapping[str, Any] | None = key(
        None, "Parameters of a denoising_strategy of your own; JSON on a command line.", kind="mapping"
    )
    diffusion_steps: int = key(
        64,
        "Denoising steps of a whole canvas, at most, shared by its blocks.",
        low=1,
        high=100_000,  # the budget of every step is laid out ahead
    )
    block_length: int | None = key(
        None,
        "Tokens that are decoded together, block by block from left to right. Defaults to the whole canvas.",
        kind="integer",
        low=1,
    )
    commit_schedule: CommitSchedule = key(
        "even",
        "How many tokens each step commits, with the strategies random, low_confidence, margin and entropy: even "
        "shares (LLaDA), or dream: int(n (1 - s / t)) of the n masked ones in the step from time t to s, and the rest "
        "in the last (Dream).",
        choices=COMMIT_SCHEDULES,
    )
    confidence_threshold: float = key(
        0.9,
        "Probability from which a token is committed.",
        low=0,
        above_low=True,
        high=1,
        needs=("denoising_strategy", ("confidence_threshold",)),
    )
    entropy_bound: float = key(
        0.1,
        "Joint uncertainty of the tokens that a step commits, at most, in nats.",
        low=0,
        needs=("denoising_strategy", ("entropy_bound",)),
    )
    remask_cap: float = key(
        0.02,
        "Upper bound on the remasking probability of a step; 0 never remasks, which is random.",
        low=0,
        high=1,
        needs=("denoising_strategy", ("remdm",)),
    )
    edit_ratio: float | None = key(
        None,
        "r: once n tokens of a block are committed, those of the current step included, up to n r / (1 - r) of them "
        "may be replaced by the model's new prediction, the most confident first. Defaults to the checkpoint's "
        "uniform_ratio, at most 0.5, and to 0 with edit_threshold.",
        kind="number",
        low=0,
        high=1,
        below_high=True,
    )
    edit_threshold: float | None = key(
        None,
        "Probability of the new prediction from which a committed token of the current block is replaced (LLaDA2.1). "
        "Defaults to never.",
        kind="number",
        low=0,
        above_low=True,
        high=1,
    )
    edit_steps: int = key(
        0,
        "Extra steps of a block after its last [MASK] is filled, beyond diffusion_steps, as long as the step before "
        "edited something; with edit_ratio or edit_threshold.",
        low=0,
    )
    early_stop: EarlyStop = key(
        "eos",
        "eos: stop a sequence once EOS and everything before it are decoded; same output unless editing or remasking "
        "is on. predict also limits the canvas to the predicted length. grow starts with a short canvas and extends "
        "it. none never stops early.",
        choices=EARLY_STOPS,
    )
    length_predictor: PredictorName = key(
        "eos_cdf",
        "What predicts the length: eos_cdf (EOS probabilities read as P(text has ended)), expected (the mean of that "
        "distribution), eos_quantile (a quantile of the EOS probabilities), or regressor and token_classifier, which "
        "llamafactory-ddm fit-length trains.",
        choices=tuple(PREDICTORS),
        renamed={"belief": "eos_cdf"},
        needs=("early_stop", ("predict",)),
    )
    length_coverage: float = key(
        0.95,
        "Required probability that a text ends within its canvas.",
        low=0,
        above_low=True,
        high=1,
        needs=("early_stop", ("predict", "grow")),
    )
    grow_length: int | None = key(
        None,
        "Initial canvas length, and tokens added at each extension. Defaults to the checkpoint's pad_block_length, "
        "then 32.",
        kind="integer",
        low=1,
        needs=("early_stop", ("grow",)),
    )
    eos_last: bool = key(
        False,
        "Commit EOS and padding only when nothing else of their block is left, as LLaDA's instruction model does.",
    )
    seed: int = key(0, "Of every random draw.", is_upstream=True)
    logits: LogitsConfig = field(default_factory=lambda: LogitsConfig(temperature=0.95, top_p=0.9))

    def __post_init__(self) -> None:
        check_fields(self)
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
        own = {
            name: getattr(self, name)
            for name, one in keys_of(self).items()
            if one.needs == ("denoising_strategy", (self.denoising_strategy,))
        }
        others = self.strategy_args or {}
        for name in own.keys() & others.keys():
            raise ValueError(f"strategy_args: {name} is a key of its own; write {name}: {others[name]} in its place")
        return get_strategy(self.denoising_strategy, **own, **others)

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
        ValueError: if one has no effect.
    """
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


def _keys() -> dict[str, Key]:
    """Return the keys of generation under their names in YAML, with the defaults of `SamplingSettings`."""
    settings = SamplingSettings()
    return {
        one.name or name: replace(one, default=None if one.kind == "tokens" else getattr(holder, name))
        for holder in (settings, settings.logits)
        for name, one in keys_of(holder).items()
    }


KEYS = _keys()
