"""Fields of the web pages for diffusion keys, made from the project's one definition of each key."""

from __future__ import annotations

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
SAMPLING_KEYS = ("denoising_strategy", "confidence_threshold", "diffusion_steps", "block_length", "kv_cache")
PREDICT_KEYS = (*SAMPLING_KEYS, "save_trace")
CHAT_KEYS = (*SAMPLING_KEYS, "seed")
# A seed of one message is a key of chats, and upstream's key in YAML.
_SEED = Key(
    None, "Seed of all random draws. Defaults to a new one for each message.", "integer", low=0, high=2**32 - 1
)
# Largest value that a slider offers; other values are set as YAML keys.
_SLIDER_ENDS = {"diffusion_steps": 256}
# Key -> the one stage that reads it.
ONE_STAGE = {**dict.fromkeys(FINETUNING_KEYS, "ddm-sft"), "random_truncate_ratio": "ddm"}


def spec_of(name: str) -> Key:
    """Return the definition of a key."""
    return _SEED if name == "seed" else KEYS[name]


def make_field(name: str, value: Any = None) -> Any:
    """Return the gradio component of a key.

    Args:
        name: of the key.
        value: present value; None for the key's default.
    """
    import gradio as gr

    spec = spec_of(name)
    value = spec.default if value is None else value
    if spec.choices is not None or (spec.kind == "boolean" and spec.default is None):
        choices = list(spec.choices or ("true", "false"))
        if spec.default is None:
            choices, value = [UNSET, *choices], UNSET if value is None else value
        return gr.Dropdown(choices=choices, value=value)
    if spec.kind == "boolean":
        return gr.Checkbox(value=value)
    if spec.kind in ("integer", "number"):
        whole = spec.kind == "integer"
        high = _SLIDER_ENDS.get(name, spec.high)
        if spec.default is not None and spec.low is not None and high is not None:
            step = 1 if whole else 0.01
            low = spec.low + step if spec.above_low else spec.low
            return gr.Slider(minimum=low, maximum=max(high, value), value=value, step=step)
        return gr.Number(value=value, minimum=spec.low, maximum=spec.high, precision=0 if whole else None)
    return gr.Textbox(value=value or "")


def effective_keys(values: Mapping[str, Any], *, stage: str | None = None) -> dict[str, Any]:
    """Return the keys whose fields are set, without those that another stage reads or whose `needs` are not met.

    Args:
        values: of the fields, by key.
        stage: that the keys are for; None for all.
    """
    chosen = {name: value for name, value in values.items() if value not in (None, "", UNSET)}

    def has_effect(name: str) -> bool:
        needs = spec_of(name).needs
        return (stage is None or ONE_STAGE.get(name, stage) == stage) and (
            needs is None or chosen.get(needs[0]) in needs[1]
        )

    return {name: value for name, value in chosen.items() if has_effect(name)}


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
