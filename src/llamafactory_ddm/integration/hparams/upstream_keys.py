"""Checks of the types and ranges of upstream's YAML keys, which its parser does not check."""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...utils.keys import boolean, integer, number
from ...utils.registry import unknown_choice
from .diffusion import DiffusionArguments

# Inclusive bounds of integer keys; None is no bound.
_INTEGERS: dict[str, tuple[int, int | None]] = {
    "cutoff_len": (2, None),  # with shift the first token of a row is never predicted
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
# Key of an interval in steps -> the key that must be `steps` for it to be used, and that key's default.
_INTERVALS = {
    "logging_steps": ("logging_strategy", "steps"),
    "save_steps": ("save_strategy", "steps"),
    "eval_steps": ("eval_strategy", "no"),
}


def check_values(dataclass_types: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a YAML with numbers and booleans converted to the types that upstream declares.

    Args:
        dataclass_types: upstream's dataclasses.
        args: the keys and values of the YAML.
    Raises:
        ValueError: naming the key, for a value of another type or out of range, or an empty one where one is needed.
    """
    checked = dict(args)
    our_keys = {spec.name for spec in fields(DiffusionArguments)}  # `DiffusionArguments.validate` checks these
    for dataclass_type in dataclass_types:
        hints = get_type_hints(dataclass_type)
        for spec in fields(dataclass_type):
            if spec.name in args and args[spec.name] is None:
                _check_empty(spec, hints[spec.name])
            elif spec.name in args and spec.name not in our_keys:
                checked[spec.name] = _check_value(spec.name, hints[spec.name], args[spec.name])
    for name, (strategy, default) in _INTERVALS.items():
        if checked.get(strategy, default) == "steps":
            _check_above_zero(name, checked.get(name))
    _check_above_zero("num_train_epochs", checked.get("num_train_epochs"))
    if checked.get("output_dir") == "":
        raise ValueError("output_dir is empty; set it to the folder to write to")
    if checked.get("freeze_trainable_layers") == 0 and checked.get("finetuning_type") == "freeze":
        raise ValueError("freeze_trainable_layers: 0 trains nothing; set the number of last layers to train")
    steps = checked.get("max_steps", -1)
    if steps < 1 and steps != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 to use num_train_epochs, got {steps}")
    if checked.get("load_best_model_at_end") and checked.get("eval_strategy", "no") == "no":
        raise ValueError("load_best_model_at_end: true needs evaluations; set eval_strategy: steps or epoch")
    return checked


def _check_empty(spec: Any, hint: Any) -> None:
    may_be_none = type(None) in get_args(hint) or spec.default is None
    if not may_be_none and (spec.default is not MISSING or spec.default_factory is not MISSING):
        raise ValueError(f"{spec.name} is empty; write a value, or remove the key")


def _check_value(name: str, hint: Any, value: Any) -> Any:
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        hint = options[0] if len(options) == 1 else None
    if name.endswith("_strategy") and value is False:
        return "no"  # YAML reads an unquoted no as false
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if isinstance(hint, type) and issubclass(hint, Enum):
        choices = tuple(member.value for member in hint)
    if choices and value not in choices:
        # Upstream does not check the choices of a key that comes from a YAML.
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
