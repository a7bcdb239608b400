"""The types and ranges of upstream's keys, which its parser does not look at where they come from a YAML."""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...utils.keys import boolean, integer, number
from ...utils.registry import unknown_choice
from .diffusion import DiffusionArguments

# Inclusive bounds of what a run counts, divides by or draws from; None is unbounded.
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "cutoff_len": (2, None),  # with shift the first token of a row is given
    "max_samples": (1, None),
    "preprocessing_num_workers": (1, None),
    "preprocessing_batch_size": (1, None),
    "buffer_size": (1, None),
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "dataloader_num_workers": (0, None),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "lora_rank": (1, None),
    "save_total_limit": (0, None),  # 0 keeps all
    "top_k": (0, None),  # 0 keeps all
    "max_new_tokens": (1, None),
}
_NUMBERS = {
    "learning_rate": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "max_grad_norm": (0.0, math.inf),
    "lora_dropout": (0.0, 1.0),
    "val_size": (0.0, math.inf),
    "neftune_noise_alpha": (0.0, math.inf),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0.0, 1.0)),
}
# Steps from one to the next -> the key that must be `steps` for them to count, and its default.
_INTERVALS = {
    "logging_steps": ("logging_strategy", "steps"),
    "save_steps": ("save_strategy", "steps"),
    "eval_steps": ("eval_strategy", "no"),
}


def checked_values(kinds: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a YAML with numbers and booleans in the types that upstream declares.

    Args:
        kinds: upstream's dataclasses.
        args: what the YAML says.
    Raises:
        ValueError: naming the key, for a value of another type or out of range, or none where one is needed.
    """
    checked = dict(args)
    ours = {spec.name for spec in fields(DiffusionArguments)}  # which check their values themselves
    for kind in kinds:
        hints = get_type_hints(kind)
        for spec in fields(kind):
            if spec.name in args and args[spec.name] is None:
                _check_empty(spec, hints[spec.name])
            elif spec.name in args and spec.name not in ours:
                checked[spec.name] = _checked(spec.name, hints[spec.name], args[spec.name])
    for name, (strategy, default) in _INTERVALS.items():
        if checked.get(strategy, default) == "steps":
            _check_above_zero(name, checked.get(name))
    _check_above_zero("num_train_epochs", checked.get("num_train_epochs"))
    if checked.get("output_dir") == "":
        raise ValueError("output_dir: is empty; name a folder")
    if checked.get("freeze_trainable_layers") == 0 and checked.get("finetuning_type") == "freeze":
        raise ValueError("freeze_trainable_layers: 0 trains nothing; set how many of the last layers to train")
    steps = checked.get("max_steps", -1)
    if steps < 1 and steps != -1:
        raise ValueError(
            f"max_steps: {steps} is no number of steps; set one of at least 1, or remove it and set num_train_epochs"
        )
    if checked.get("load_best_model_at_end") and checked.get("eval_strategy", "no") == "no":
        raise ValueError(
            "load_best_model_at_end: true needs evaluations to choose by; set eval_strategy: steps or epoch"
        )
    return checked


def _check_empty(spec: Any, hint: Any) -> None:
    may_be_none = type(None) in get_args(hint) or spec.default is None
    if not may_be_none and (spec.default is not MISSING or spec.default_factory is not MISSING):
        raise ValueError(f"{spec.name}: is left empty; give it a value, or remove the key")


def _checked(name: str, hint: Any, value: Any) -> Any:
    options = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        hint = options[0] if len(options) == 1 else None
    if name.endswith("_strategy") and value is False:
        return "no"  # as YAML reads a no without quotes
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = tuple(member.value for member in hint)
    if choices and value not in choices:
        # Upstream would take any word of a YAML, and do something of its own with it.
        raise ValueError(unknown_choice(name, value, choices))
    if hint is int or name in _INTEGERS:
        value = integer(name, value, *_INTEGERS.get(name, (-(2**63), None)))
    elif hint is float:
        value = number(name, value, *_NUMBERS.get(name, (-math.inf, math.inf)))
    elif hint is bool:
        value = boolean(name, value)
    return value


def _check_above_zero(name: str, value: object) -> None:
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")
