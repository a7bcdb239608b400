"""The plugin's YAML keys, as a dataclass of its own that is mixed into LLaMA-Factory's finetuning arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ...diffusion.schedules import SCHEDULES
from ...objectives import OBJECTIVES
from ...utils.plugins import load_plugins
from ...utils.registry import Registry, unknown_choice
from . import length as length_keys
from . import sampling as sampling_arguments
from . import sft as finetuning_keys

_CHOICES: dict[str, Collection[str]] = {
    "noise_process": OBJECTIVES,
    "noise_schedule": SCHEDULES,
    "loss_weighting": ("elbo", "uniform"),
    "loss_norm": ("tokens", "masked", "sequence"),
    **length_keys.CHOICES,
    **sampling_arguments.CHOICES,
}
# Inclusive bounds; None is unbounded.
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "anneal_steps": (0, None),
    "eval_time_samples": (1, None),
    "stop_after_nan_steps": (0, None),
    **length_keys.INTEGERS,
    **sampling_arguments.INTEGERS,
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "uniform_ratio": (0.0, 1.0),
    "time_epsilon": (0.0, 0.5),
    "random_truncate_ratio": (0.0, 1.0),
    **length_keys.NUMBERS,
    **sampling_arguments.NUMBERS,
}
_BOOLEANS = ("antithetic_time", "allow_common_mask_token", *length_keys.BOOLEANS, *sampling_arguments.BOOLEANS)
_BOOLEANS_OR_NONE = ("shift", "train_on_padding", "split_digits")
# Keys that take text -> whether a number is fine too.
_TEXTS = {"mask_token": True, "sep_token": True, "suppress_tokens": True, "checkpoint_dir": False}


@dataclass
class DiffusionArguments(finetuning_keys.FinetuningKeys, length_keys.LengthKeys, sampling_arguments.SamplingArguments):
    """Arguments of the diffusion stages; a key left at None takes what the checkpoint's diffusion_config.json says."""

    # YAML may also hold a list; the annotation is for the command line's parser, which takes one type.
    plugins: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: modules or .py files of your own to import first, which add a denoising_strategy, a "
                "noise_schedule or a noise_process; a list, or separated by commas."
            )
        },
    )
    # An id may come as an int from YAML.
    mask_token: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: the [MASK] token: a token of the vocabulary, an id, or a new special token to add "
                "such as '<|mask|>'. Defaults to the checkpoint's, then to the tokenizer's own mask token."
            )
        },
    )
    allow_common_mask_token: bool = field(
        default=False,
        metadata={
            "help": (
                "Diffusion: train even if the mask token is more than one in 10,000 tokens of the data. Where it "
                "stands there it is never learnt, so the model cannot write what it stands for."
            )
        },
    )
    shift: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: keep the autoregressive convention that the logits at position i predict token i + 1. "
                "Defaults to the checkpoint's, then to true."
            )
        },
    )
    anneal_steps: int = field(
        default=10000,
        metadata={
            "help": (
                "Diffusion: optimiser steps over which attention grows from causal to full; 0 is full from the start. "
                "A checkpoint whose attention is already full does not anneal again."
            )
        },
    )
    noise_schedule: str | None = field(
        default=None,
        metadata={"help": "Diffusion: linear or cosine. Defaults to the checkpoint's, then to linear."},
    )
    noise_process: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: masked, where noise is [MASK], or mixed, where a share uniform_ratio of it is random "
                "tokens, so that sampling may correct what it wrote. Defaults to the checkpoint's, then to masked; "
                "set, it also lets a checkpoint go on under other noise."
            )
        },
    )
    uniform_ratio: float | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: share of noised tokens that become a random token instead of [MASK], in [0, 1]; with "
                "noise_process: mixed. Defaults to the checkpoint's, then to 0.1."
            )
        },
    )
    random_truncate_ratio: float = field(
        default=0.0,
        metadata={
            "help": (
                "Diffusion: share of the training rows of stage: ddm that are cut to a random length, as LLaDA does "
                "with 0.01, so that the model knows texts shorter than cutoff_len."
            )
        },
    )
    time_epsilon: float = field(
        default=1e-3,
        metadata={"help": "Diffusion: the smallest noise time that training draws, in [0, 0.5]."},
    )
    loss_weighting: str = field(
        default="elbo",
        metadata={"help": "Diffusion: weight of a token, elbo (the evidence bound; 1/t if linear) or uniform."},
    )
    loss_norm: str = field(
        default="tokens",
        metadata={
            "help": (
                "Diffusion: what the summed loss is divided by: tokens (the evidence bound per token), masked "
                "(DiffuLLaMA's code; with mixed noise the tokens that it changed) or sequence (each row by its own "
                "length, then by the rows)."
            )
        },
    )
    antithetic_time: bool = field(
        default=False,
        metadata={"help": "Diffusion: stratify the noise times over the rows of an optimiser step (lower variance)."},
    )
    eval_time_samples: int = field(
        default=4,
        metadata={"help": "Diffusion: noise levels per evaluated row, stratified over the time axis."},
    )
    stop_after_nan_steps: int = field(
        default=2,
        metadata={
            "help": (
                "Diffusion: stop when the loss was NaN or infinite in this many optimiser steps in a row; 0 goes on. "
                "Neither such a step nor weights that are not finite are ever saved."
            )
        },
    )
    checkpoint_dir: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: folder of a diffusion checkpoint whose weights are used in place of those of "
                "model_name_or_path (DiffuLLaMA's key)."
            )
        },
    )

    def validate(self) -> None:
        """Check and coerce every key.

        Raises:
            ValueError: naming the key, the value given, what is accepted and, for a misspelt choice, the nearest one.
        """
        self.plugins = ",".join(load_plugins(self.plugins)) or None
        for spec in fields(DiffusionArguments):
            default = _default(spec)
            if getattr(self, spec.name) is None and default is not None:
                raise ValueError(f"{spec.name} is empty; write a value, or remove the key (its default is {default})")
        for key, takes_number in _TEXTS.items():
            _check_text(key, getattr(self, key), takes_number=takes_number)
        for key, choices in _CHOICES.items():
            value = getattr(self, key)
            if value is None or value in choices:
                continue
            raise ValueError(
                choices.unknown(value) if isinstance(choices, Registry) else unknown_choice(key, value, choices)
            )
        for key, (low, high) in _INTEGERS.items():
            if getattr(self, key) is not None:
                setattr(self, key, integer(key, getattr(self, key), low, high))
        for key, (least, most) in _NUMBERS.items():
            if getattr(self, key) is not None:
                setattr(self, key, number(key, getattr(self, key), least, most))
        for key in (*_BOOLEANS, *_BOOLEANS_OR_NONE):
            if getattr(self, key) is not None:
                setattr(self, key, boolean(key, getattr(self, key)))
        self.strategy_args = mapping("strategy_args", self.strategy_args)  # type: ignore[assignment]
        self.check_sampling()

    def changed_keys(self) -> list[str]:
        """Return the keys that differ from their defaults, in the order of the dataclass; plugins apart."""
        own = [f for f in fields(DiffusionArguments) if f.name != "plugins"]  # a checkpoint may need them in any stage
        return [f.name for f in own if getattr(self, f.name) != _default(f)]


def _default(spec: Any) -> Any:
    return None if spec.default is MISSING else spec.default


def _check_text(key: str, value: object, *, takes_number: bool) -> None:
    """Check the type of a key that takes text; YAML makes others of what is not in quotes.

    Raises:
        ValueError: saying how to write it.
    """
    if value is None or isinstance(value, str):
        if value is not None and not value.strip() and key == "checkpoint_dir":
            raise ValueError(f"{key} is empty; write the path of a folder, or remove the key")
        return
    if takes_number and isinstance(value, (bool, int)):
        return  # an id; a truth value gets its own words when the token is looked for
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) and key != "suppress_tokens":
        text = value[0]
        written = f"'[{text}]' or '{text}'" if text.isprintable() else json.dumps(text)
        raise ValueError(
            f"{key}: {value!r} is a list, as YAML reads brackets; write {key}: {written}, with the quotes"
        )
    if key == "suppress_tokens" and isinstance(value, list):
        raise ValueError(f"{key}: {value!r} is a list; write tokens or ids in one text, separated by commas: '5,7'")
    if takes_number and isinstance(value, float) and value.is_integer():
        raise ValueError(f"{key}: {value!r} is a number with a fraction; write the id as a whole number: {int(value)}")
    wanted = "a token in quotes, or an id" if takes_number else "the path of a folder"
    raise ValueError(f"{key}: {value!r} is of type {type(value).__name__}; write {wanted}")


def integer(key: str, value: object, low: int, high: int | None) -> int:
    """Return a whole number, also of a string that spells one.

    Raises:
        ValueError: naming the key and its bounds, `high` being None for none.
    """
    try:
        found = int(value)  # type: ignore[call-overload]
        whole = not isinstance(value, bool) and found == float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise ValueError(f"{key} must be a whole number, got {value!r}")
    if found < low or (high is not None and found > high):
        raise ValueError(
            f"{key} must be at least {low}{'' if high is None else f' and at most {high}'}, got {value!r}"
        )
    return int(found)


def number(key: str, value: object, least: float, most: float) -> float:
    """Return a finite number between the bounds, also of a string that spells one.

    Raises:
        ValueError: naming the key and the bounds.
    """
    try:
        found = float("nan") if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not (math.isfinite(found) and least <= found <= most):
        said = f"lie in {sampling_arguments.OPEN_RANGES.get(key, f'[{least:g}, {most:g}]')}"
        if most == math.inf:
            said = "be a number" if least == -math.inf else f"be a number of at least {least:g}"
        raise ValueError(f"{key} must {said}, got {value!r}")
    return found


def boolean(key: str, value: object) -> bool:
    """Return true or false, also of a string that spells one.

    Raises:
        ValueError: naming the key.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(f"{key} must be true or false, got {value!r}")


def mapping(key: str, value: object) -> dict[str, Any] | None:
    """Return a mapping with names for keys, also of a text that spells one in JSON.

    Raises:
        ValueError: naming the key.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = value
    if found is not None and not (isinstance(found, Mapping) and all(isinstance(name, str) for name in found)):
        raise ValueError(f"{key} must be a mapping of names to values, such as {{window: 4}}, got {value!r}")
    return dict(found) if found else None
