"""The YAML keys of generation, as a dataclass that is mixed into the diffusion keys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ...modeling.special_tokens import escape_hint
from ...sampling import STRATEGIES, LogitsConfig, SamplingSettings
from ...sampling.budget import COMMIT_SCHEDULES
from ...sampling.length_predictors import PREDICTORS
from ...sampling.logits import SCORE_DISTRIBUTIONS
from ...sampling.settings import EARLY_STOPS, MOST_STEPS, STRATEGY_KEYS, check_scores
from ...sampling.state import MOST_ROWS
from . import editing as editing_keys

CHOICES: dict[str, Collection[str]] = {
    "denoising_strategy": STRATEGIES,
    "commit_schedule": COMMIT_SCHEDULES,
    "score_distribution": SCORE_DISTRIBUTIONS,
    "generate_from": ("noise", "prefix", "infill", "prompt"),
    "early_stop": EARLY_STOPS,
    "length_predictor": tuple(PREDICTORS),
}
INTEGERS: dict[str, tuple[int, int | None]] = {
    "diffusion_steps": (1, MOST_STEPS),
    "block_length": (1, None),
    **editing_keys.INTEGERS,
    "num_samples": (1, MOST_ROWS),
    "prefix_length": (1, None),
    "grow_length": (1, None),
}
NUMBERS: dict[str, tuple[float, float]] = {
    "logits_temp": (0.0, float("inf")),
    "topp_temp": (0.0, 1.0),
    "guidance_scale": (0.0, float("inf")),
    "confidence_threshold": (0.0, 1.0),
    "entropy_bound": (0.0, float("inf")),
    **editing_keys.NUMBERS,
    "length_coverage": (0.0, 1.0),
    "eos_penalty": (float("-inf"), float("inf")),
}
OPEN_RANGES = dict.fromkeys(("topp_temp", "confidence_threshold", "length_coverage"), "(0, 1]")
OPEN_RANGES |= editing_keys.OPEN_RANGES
BOOLEANS = ("save_trace", "eos_last")
# Upstream's keys of generation that we honour -> ours of the same meaning, or None.
UPSTREAM_KEYS: dict[str, str | None] = {
    "temperature": "logits_temp",
    "top_p": "topp_temp",
    "top_k": None,
    "repetition_penalty": None,
    "max_new_tokens": None,
}
_GROW_LENGTH = 32
# A key of early_stop -> the ways of stopping that read it.
_OF_EARLY_STOP = {
    "length_predictor": ("predict",),
    "length_coverage": ("predict", "grow"),
    "grow_length": ("grow",),
}


@dataclass
class SamplingArguments(editing_keys.EditingKeys):
    """Arguments of `do_predict: true`."""

    generate_from: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: what generation starts from: noise (num_samples texts), prefix (each text of the data set "
                "is continued), infill (markers such as <|infill:8|> in the texts are filled) or prompt (stage: "
                "ddm-sft, its default). stage: ddm starts from noise by default."
            )
        },
    )
    denoising_strategy: str = field(
        default=SamplingSettings.denoising_strategy,
        metadata={
            "help": (
                "Diffusion: which masked tokens a sampling step commits: random, topk, low_confidence, margin, "
                "entropy, confidence_threshold, entropy_bound or remdm."
            )
        },
    )
    # YAML holds a mapping; the annotation is for the command line's parser, which takes one type.
    strategy_args: str | None = field(
        default=None,
        metadata={
            "help": "Diffusion: parameters of a denoising_strategy of your own, a mapping (JSON on the command line)."
        },
    )
    diffusion_steps: int = field(
        default=64,
        metadata={"help": "Diffusion: number of denoising steps in sampling, shared by the blocks of a text."},
    )
    commit_schedule: str = field(
        default="even",
        metadata={
            "help": (
                "Diffusion: how many tokens the steps commit, with denoising_strategy: random, low_confidence, margin "
                "or entropy: even shares (LLaDA), or dream, int(n (1 - s / t)) of the n tokens left in the step from "
                "time t to s, and the rest in the last (Dream)."
            )
        },
    )
    score_distribution: str = field(
        default="model",
        metadata={
            "help": (
                "Diffusion: which distribution confidence, margin and entropy are of: the model's own, or filtered, "
                "what temperature, top_p and top_k leave (Dream)."
            )
        },
    )
    block_length: int | None = field(
        default=None,
        metadata={
            "help": "Diffusion: tokens that are decided together, from left to right. Defaults to all of a text."
        },
    )
    logits_temp: float = field(
        default=0.95,
        metadata={"help": "Diffusion: sampling temperature; 0 takes the most probable token. Same as temperature."},
    )
    topp_temp: float = field(
        default=0.9,
        metadata={"help": "Diffusion: nucleus mass of sampling, in (0, 1]; 1 keeps every token. Same as top_p."},
    )
    guidance_scale: float = field(
        default=1.0,
        metadata={
            "help": (
                "Diffusion: classifier-free guidance, unconditional + scale (conditional - unconditional); 1 is none, "
                "another value doubles the forwards."
            )
        },
    )
    suppress_tokens: str | None = field(
        default=None,
        metadata={"help": "Diffusion: tokens that are never written, as tokens or ids, separated by commas."},
    )
    confidence_threshold: float = field(
        default=0.9,
        metadata={"help": "Diffusion: probability from which denoising_strategy: confidence_threshold commits."},
    )
    entropy_bound: float = field(
        default=0.1,
        metadata={"help": "Diffusion: nats that a step of denoising_strategy: entropy_bound may be unsure of."},
    )
    early_stop: str = field(
        default="eos",
        metadata={
            "help": (
                "Diffusion: eos stops with a text once its end-of-text token and all before it are written, which "
                "leaves a text that is not revised as it is; predict also gives it no more places than it will need; "
                "grow begins with grow_length places and adds to them; none goes on to the edge of the canvas."
            )
        },
    )
    length_predictor: str = field(
        default="belief",
        metadata={
            "help": (
                "Diffusion: with early_stop: predict, what says how long a text will be, before anything is written: "
                "belief (the model's own probabilities), expected (their mean), eos_quantile, or regressor and "
                "token_classifier, which llamafactory-ddm fit-length trains."
            )
        },
    )
    length_coverage: float = field(
        default=0.95,
        metadata={
            "help": (
                "Diffusion: with early_stop: predict and grow, the probability with which a text has to have ended "
                "within its places: by the model's own belief, or, for predict, as llamafactory-ddm fit-length has "
                "measured it."
            )
        },
    )
    grow_length: int | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: with early_stop: grow, the places that a text begins with and that are added to it. "
                "Defaults to the checkpoint's pad_block_length, then 32."
            )
        },
    )
    eos_penalty: float = field(
        default=0.0,
        metadata={
            "help": (
                "Diffusion: nats taken from the logits of the end-of-text and pad tokens, for a model that ends too "
                "early; below 0 for one that ends too late."
            )
        },
    )
    eos_last: bool = field(
        default=False,
        metadata={
            "help": (
                "Diffusion: commit an end-of-text or pad token only when nothing else of its block is left, as LLaDA "
                "does for its instruction model."
            )
        },
    )
    num_samples: int = field(
        default=8,
        metadata={"help": "Diffusion: how many texts `do_predict` generates from noise."},
    )
    prefix_length: int | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: with generate_from: prefix, how many tokens of a text are given; the rest is the label. "
                "Defaults to the whole text."
            )
        },
    )
    save_trace: bool = field(
        default=False,
        metadata={
            "help": "Diffusion: write generated_predictions.html, a page that replays the denoising of each text."
        },
    )

    def check_sampling(self) -> None:
        """Check the keys that depend on each other.

        Raises:
            ValueError: naming both keys.
        """
        if self.topp_temp == 0.0:
            raise ValueError("topp_temp must lie in (0, 1], got 0; for the most probable token set logits_temp: 0")
        if self.confidence_threshold == 0.0:
            raise ValueError("confidence_threshold must lie in (0, 1], got 0; set diffusion_steps: 1 for all at once")
        for key, strategy in STRATEGY_KEYS.items():
            if getattr(self, key) != SamplingArguments.__dataclass_fields__[key].default and (
                self.denoising_strategy != strategy
            ):
                raise ValueError(
                    f"{key} is read by denoising_strategy: {strategy} only, but denoising_strategy is "
                    f"{self.denoising_strategy}; change one or remove {key}"
                )
        chosen = SamplingSettings(
            denoising_strategy=self.denoising_strategy,
            strategy_args=self.strategy_args or {},  # type: ignore[arg-type]
            **{key: getattr(self, key) for key in STRATEGY_KEYS},
        ).strategy()
        check_scores(chosen, self.commit_schedule, self.score_distribution)
        self.check_edits()
        if self.length_coverage == 0.0:
            raise ValueError("length_coverage must lie in (0, 1], got 0")
        for key, ways in _OF_EARLY_STOP.items():
            if getattr(self, key) != SamplingArguments.__dataclass_fields__[key].default and (
                self.early_stop not in ways
            ):
                raise ValueError(
                    f"{key}: {getattr(self, key)} is read by early_stop: {' and '.join(ways)} only, but early_stop is "
                    f"{self.early_stop}; change one or remove {key}"
                )
        stage, source = str(getattr(self, "stage", "ddm")), self.generation_source()
        if (source == "prompt") != (stage == "ddm-sft"):
            raise ValueError(
                f"generate_from: {source} does not go with stage: {stage}; stage: ddm-sft answers prompts, stage: ddm "
                "takes noise, prefix or infill"
            )
        if self.prefix_length is not None and source != "prefix":
            raise ValueError("prefix_length needs generate_from: prefix; set it or remove prefix_length")
        if self.guidance_scale != 1.0 and source == "noise":
            raise ValueError(
                f"guidance_scale: {self.guidance_scale} needs a prompt to guide by, but generate_from is noise; set "
                "generate_from: prefix or infill, or remove guidance_scale"
            )

    def generation_source(self) -> str:
        """Return `generate_from`, or what the stage starts from where it is not set."""
        ours = getattr(self, "diffusion_stage", None) or getattr(self, "stage", "ddm")
        return self.generate_from or ("prompt" if ours == "ddm-sft" else "noise")

    def sampling_settings(
        self, generating_args: Any, given: frozenset[str], *, seed: int, tokenizer: Any, block: int | None = None
    ) -> SamplingSettings:
        """Return what the sampler wants.

        Args:
            generating_args: upstream's, of which the keys in `given` count.
            given: keys that the user wrote.
            seed: of the run.
            tokenizer: finds suppress_tokens.
            block: the model's pad_block_length.
        Raises:
            ValueError: if two keys of the same meaning differ, or a token does not exist.
        """
        values = {"logits_temp": self.logits_temp, "topp_temp": self.topp_temp}
        for theirs, ours in UPSTREAM_KEYS.items():
            if ours is None or theirs not in given:
                continue
            value = getattr(generating_args, theirs)
            if ours in given and value != values[ours]:
                raise ValueError(
                    f"{theirs}: {value} and {ours}: {values[ours]} mean the same and differ; remove one of them"
                )
            values[ours] = value
        top_k = generating_args.top_k if "top_k" in given and generating_args.top_k > 0 else None
        penalty = generating_args.repetition_penalty if "repetition_penalty" in given else 1.0
        return SamplingSettings(
            denoising_strategy=self.denoising_strategy,
            diffusion_steps=self.diffusion_steps,
            block_length=self.block_length,
            commit_schedule=self.commit_schedule,  # type: ignore[arg-type]
            logits=LogitsConfig(
                temperature=values["logits_temp"],
                top_p=values["topp_temp"],
                top_k=top_k,
                repetition_penalty=penalty,
                guidance_scale=self.guidance_scale,
                eos_penalty=self.eos_penalty,
                suppress=_token_ids(self.suppress_tokens, tokenizer),
                score_distribution=self.score_distribution,  # type: ignore[arg-type]
            ),
            confidence_threshold=self.confidence_threshold,
            entropy_bound=self.entropy_bound,
            remask_cap=self.remask_cap,
            strategy_args=self.strategy_args or {},  # type: ignore[arg-type]
            edit_ratio=self.edit_ratio,
            edit_threshold=self.edit_threshold,
            edit_steps=self.edit_steps,
            early_stop=self.early_stop,  # type: ignore[arg-type]
            length_predictor=self.length_predictor,  # type: ignore[arg-type]
            length_coverage=self.length_coverage,
            grow_length=self.grow_length or block or _GROW_LENGTH,
            eos_last=self.eos_last,
            seed=seed,
        )


def _token_ids(words: str | None, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the tokens in a list separated by commas.

    Raises:
        ValueError: naming what is no token.
    """
    if words is None:
        return ()
    vocabulary = tokenizer.get_vocab()
    ids = []
    for word in (part.strip() for part in str(words).split(",")):
        if word in vocabulary:
            ids.append(vocabulary[word])
        elif word.isdigit() and int(word) < len(tokenizer):
            ids.append(int(word))
        else:
            raise ValueError(
                f"suppress_tokens: {word!r} is neither a token of the vocabulary nor an id"
                f"{escape_hint('suppress_tokens', word)}"
            )
    return tuple(ids)
