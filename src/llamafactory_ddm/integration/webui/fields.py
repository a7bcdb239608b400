"""Fields of the web pages for diffusion keys, made from the project's one definition of each key."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ...utils.keys import Key
from ..hparams.diffusion import KEYS
from ..hparams.sft import KEYS as FINETUNING_KEYS

PREFIX = "ddm_"  # of a field's name, as upstream's fields and texts share one space of names
UNSET = "default"  # in a dropdown: leave the key out
# Keys of the training tab, by row.
TRAINING_ROWS = (
    ("attention", "train_block_length", "anneal_steps", "shift", "mask_token"),
    ("noise_process", "uniform_ratio", "noise_schedule", "random_truncate_ratio", "antithetic_time"),
    ("variable_length", "pad_block_length", "pad_mask_ratio", "eos_window_ratio", "drop_overlong"),
    ("loss_weighting", "loss_norm", "train_on_padding", "sep_token", "split_digits"),
    ("sample_steps", "sample_count", "sample_length", "eval_time_samples", "eval_eos"),
)
TRAINING_KEYS = tuple(name for row in TRAINING_ROWS for name in row)
SAMPLING_KEYS = ("diffusion_steps", "denoising_strategy", "confidence_threshold", "block_length", "kv_cache")
PREDICT_KEYS = (*SAMPLING_KEYS, "save_trace")
# Fields of the chat that are no keys of YAML, or start at another default there.
_CHAT_ONLY = {
    "chat_steps": Key(
        0, "Largest number of denoising steps; 0 for as many as suit the answer.", "integer", low=0, high=256
    ),
    "seed": Key(
        None, "Seed of all random draws; a new one for each message by default.", "integer", low=0, high=2**32 - 1
    ),
}
CHAT_KEYS = ("chat_steps", *SAMPLING_KEYS[1:], "seed")
# Largest value that a slider offers; other values are set as YAML keys.
_SLIDER_ENDS = {"diffusion_steps": 256}
# Key -> the one stage that reads it.
ONE_STAGE = {**dict.fromkeys(FINETUNING_KEYS, "ddm-sft"), "random_truncate_ratio": "ddm"}


def spec_of(name: str) -> Key:
    """Return the definition of a key."""
    return _CHAT_ONLY.get(name) or KEYS[name]


def shown_value(name: str, value: Any) -> Any:
    """Return what the field of a key shows for a value; None is an unset key."""
    if value is not None:
        return value if spec_of(name).default is not None or _is_choice(spec_of(name)) else str(value)
    return UNSET if _is_choice(spec_of(name)) else ""


def _is_choice(spec: Key) -> bool:
    return spec.choices is not None or (spec.kind == "boolean" and spec.default is None)


def make_field(name: str) -> Any:
    """Return the gradio component of a key, at its default."""
    import gradio as gr

    spec = spec_of(name)
    value = shown_value(name, spec.default)
    if _is_choice(spec):
        choices = list(spec.choices or ("true", "false"))
        return gr.Dropdown(choices=choices if spec.default is not None else [UNSET, *choices], value=value)
    if spec.kind == "boolean":
        return gr.Checkbox(value=value)
    if spec.kind in ("integer", "number") and spec.default is not None:
        step, high = (1 if spec.kind == "integer" else 0.01), _SLIDER_ENDS.get(name, spec.high)
        if high is None or spec.low is None:
            return gr.Number(value=value, minimum=spec.low, maximum=spec.high, precision=0 if step == 1 else None)
        low = spec.low + step if spec.above_low else spec.low
        return gr.Slider(minimum=low, maximum=max(high, value), value=value, step=step)
    # A gr.Number sends 0 where it is empty.
    return gr.Textbox(value=value, placeholder=UNSET)


def effective_keys(values: Mapping[str, Any], *, stage: str | None = None) -> dict[str, Any]:
    """Return the keys whose fields are set, without those that another stage reads or whose `needs` are not met.

    Args:
        values: of the fields, by key.
        stage: that the keys are for; None for all.
    """
    chosen = {name: _typed(name, value) for name, value in values.items() if value not in (None, "", UNSET)}

    def has_effect(name: str) -> bool:
        needs = spec_of(name).needs
        return (stage is None or ONE_STAGE.get(name, stage) == stage) and (
            needs is None or chosen.get(needs[0]) in needs[1]
        )

    return {name: value for name, value in chosen.items() if has_effect(name)}


def _typed(name: str, value: Any) -> Any:
    """Return the number that a text box holds; the text, which the run refuses, if it is none."""
    spec = spec_of(name)
    if isinstance(value, str) and spec.kind in ("integer", "number"):
        with contextlib.suppress(ValueError):
            return spec.checked(name, value)
    return value


def chat_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a request that the fields of `CHAT_KEYS` set."""
    keys = effective_keys(values)
    steps = keys.pop("chat_steps", 0)
    return {"diffusion_steps": steps, **keys} if steps else keys


def changed_keys(values: Mapping[str, Any], *, stage: str) -> dict[str, Any]:
    """Return the effective keys whose fields differ from their defaults, as values of a YAML.

    Upstream drops false from the commands that it writes, so false is the text "false", which our keys take too.
    """
    effective = effective_keys(values, stage=stage)
    return {
        name: "false" if value is False else value
        for name, value in effective.items()
        if value != spec_of(name).default
    }
