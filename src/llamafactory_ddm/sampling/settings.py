"""`SamplingSettings`: the keys of generation, with their defaults, bounds and help texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..utils.keys import Key, check_fields, key, keys_of
from .budget import COMMIT_SCHEDULES, CommitSchedule
from .edits import MAX_DEFAULT_RATIO, Edits, edits_of
from .length_predictors import PREDICTORS, PredictorName
from .logits import LogitsConfig
from .strategies import STRATEGIES, Strategy, get_strategy

EarlyStop = Literal["none", "eos", "predict", "grow"]
EARLY_STOPS: tuple[EarlyStop, ...] = get_args(EarlyStop)
KVCache = Literal["none", "prefix", "dual"]
KV_CACHES: tuple[KVCache, ...] = get_args(KVCache)


@dataclass(frozen=True)
class SamplingSettings:
    """How texts are sampled. YAML, the shell command and Python take their keys from this class.

    The help text of each field describes it; `KEYS` holds all of them by YAML key.

    Raises:
        ValueError: naming the key, if a value is not allowed or two values are incompatible.
    """

    denoising_strategy: str = key("low_confidence", "Which masked tokens a sampling step commits.", choices=STRATEGIES)
    strategy_args: Mapping[str, Any] | None = key(
        None, "Parameters of your own denoising_strategy; JSON on the command line.", kind="mapping"
    )
    diffusion_steps: int = key(
        64,
        "Largest number of denoising steps of a canvas, divided among its blocks; with attention: block those of each "
        "block, to which shift adds one for the block's first token.",
        low=1,
        high=100_000,  # the budgets of all steps are computed in advance
    )
    block_length: int | None = key(
        None,
        "Positions in a block; blocks are decoded one after another from left to right. Defaults to the whole canvas.",
        kind="integer",
        low=1,
    )
    kv_cache: KVCache | None = key(
        None,
        "Which positions a forward pass computes; the others keep the keys and values of the block's first pass, "
        "which computes all. none: all. prefix: the current block and what follows it. dual: the current block. "
        "Defaults to none, and with attention: block to prefix, which is exact there and computes no later position.",
        choices=KV_CACHES,
    )
    cache_refresh: int | None = key(
        None,
        "n: compute all positions in every n-th pass of a block too; 1 gives the texts of kv_cache: none. Defaults "
        "to the first pass of each block alone.",
        kind="integer",
        low=1,
        needs=("kv_cache", ("prefix", "dual")),
    )
    commit_schedule: CommitSchedule = key(
        "even",
        "How many tokens each step commits with the strategies random, low_confidence, margin and entropy. even: as "
        "many in each (LLaDA). dream: int(n (1 - s / t)) of the n masked tokens in the step from time t to s, and the "
        "rest in the last (Dream).",
        choices=COMMIT_SCHEDULES,
    )
    confidence_threshold: float = key(
        0.9,
        "Smallest probability with which a token is committed.",
        low=0,
        above_low=True,
        high=1,
        needs=("denoising_strategy", ("confidence_threshold",)),
    )
    entropy_bound: float = key(
        0.1,
        "Upper bound on the joint uncertainty of the tokens that a step commits, in nats.",
        low=0,
        needs=("denoising_strategy", ("entropy_bound",)),
    )
    remask_cap: float = key(
        0.02,
        "Upper bound on the remasking probability of a step; 0 never remasks, like random.",
        low=0,
        high=1,
        needs=("denoising_strategy", ("remdm",)),
    )
    edit_ratio: float | None = key(
        None,
        "r: once n tokens of a block are committed, those of the current step included, up to n r / (1 - r) of them "
        "may be replaced by the model's new prediction, the most confident first. Defaults to the checkpoint's "
        "uniform_ratio, limited to 0.5, and to 0 with edit_threshold.",
        kind="number",
        low=0,
        high=1,
        below_high=True,
    )
    edit_threshold: float | None = key(
        None,
        "Smallest probability of a new prediction that replaces a committed token of the current block (LLaDA2.1). "
        "Defaults to no editing by threshold.",
        kind="number",
        low=0,
        above_low=True,
        high=1,
    )
    edit_steps: int = key(
        0,
        "Largest number of extra steps, beyond diffusion_steps, that edit a fully decoded block; they end when a step "
        "edits nothing. Needs edit_ratio or edit_threshold.",
        low=0,
    )
    early_stop: EarlyStop = key(
        "eos",
        "eos: stop a sequence once EOS and everything before it are decoded; same output unless editing or remasking "
        "is on. predict: also limit the canvas to the predicted length. grow: start with a short canvas and extend "
        "it. none: never stop early.",
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
        "Positions to generate at first, and positions added at each extension. Defaults to the checkpoint's "
        "pad_block_length, else 32.",
        kind="integer",
        low=1,
        needs=("early_stop", ("grow",)),
    )
    eos_last: bool = key(
        False,
        "Commit EOS and padding only when nothing else in their block is masked, as LLaDA's instruction model does.",
    )
    seed: int = key(0, "Seed of all random draws.", is_upstream=True)
    logits: LogitsConfig = field(default_factory=lambda: LogitsConfig(temperature=0.95, top_p=0.9))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.early_stop in ("predict", "grow") and self.logits.guidance_scale != 1.0:
            raise ValueError(
                f"early_stop: {self.early_stop} is incompatible with guidance_scale: {self.logits.guidance_scale}, as "
                "lengths are predicted without guidance; set early_stop: eos, or guidance_scale: 1"
            )
        strategy = self.strategy()
        if self.eos_last and not strategy.measures:
            raise ValueError(
                f"eos_last: true needs a denoising_strategy that scores positions, and {self.denoising_strategy} does "
                "not; set denoising_strategy: low_confidence, or remove eos_last"
            )
        check_scores(strategy, self.commit_schedule, self.logits.score_distribution)
        self.edits(MAX_DEFAULT_RATIO)  # raises for what would be wrong with any checkpoint

    @property
    def may_idle(self) -> bool:
        """Whether a step may decode no position, so that more steps than tokens have an effect."""
        return self.denoising_strategy in ("random", "remdm")

    def strategy(self) -> Strategy:
        """Return the strategy with its parameters.

        Raises:
            ValueError: if no strategy has this name, or a parameter is unknown or out of range.
        """
        parameters = {
            name: getattr(self, name)
            for name, spec in keys_of(self).items()
            if spec.needs == ("denoising_strategy", (self.denoising_strategy,))
        }
        strategy_args = self.strategy_args or {}
        for name in parameters.keys() & strategy_args.keys():
            raise ValueError(
                f"strategy_args: {name} is a key outside strategy_args; write {name}: {strategy_args[name]} there"
            )
        return get_strategy(self.denoising_strategy, **parameters, **strategy_args)

    def edits(self, uniform_ratio: float = 0.0) -> Edits:
        """Return which decoded tokens are edited with a checkpoint of this `uniform_ratio`.

        Raises:
            ValueError: naming the keys, see `Edits`.
        """
        return edits_of(self.edit_ratio, self.edit_threshold, self.edit_steps, default=uniform_ratio)


def check_scores(strategy: Strategy, commit_schedule: str, score_distribution: str) -> None:
    """Check that the strategy reads commit_schedule and score_distribution if they differ from their defaults.

    Args:
        strategy: the denoising strategy.
        commit_schedule: see `SamplingSettings`.
        score_distribution: see `LogitsConfig`.
    Raises:
        ValueError: if one has no effect.
    """
    if commit_schedule != "even" and getattr(strategy, "has_own_pace", False):
        raise ValueError(
            f"commit_schedule: {commit_schedule} has no effect on denoising_strategy: {strategy.name}; set "
            "denoising_strategy to entropy, margin, low_confidence or random, or remove commit_schedule"
        )
    if score_distribution != "model" and not strategy.measures:
        raise ValueError(
            f"score_distribution: {score_distribution} has no effect on denoising_strategy: {strategy.name}; set "
            "denoising_strategy to entropy, margin or low_confidence, or remove score_distribution"
        )


def _keys() -> dict[str, Key]:
    """Return the keys of generation by YAML key, with the defaults of `SamplingSettings`."""
    settings = SamplingSettings()
    return {
        spec.name or name: replace(spec, default=None if spec.kind == "tokens" else getattr(holder, name))
        for holder in (settings, settings.logits)
        for name, spec in keys_of(holder).items()
    }


KEYS = _keys()
