"""The YAML keys of variable length, with which a model learns to generate EOS and the padding after it."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.keys import key

# Key -> the key without which it has no effect.
NEEDS = {
    "rainbow_colors": "variable_length: rainbow",
    "pad_block_length": "variable_length",
    "pad_extra_blocks": "pad_block_length",
    "drop_overlong": "variable_length",
    "pad_mask_ratio": "variable_length",
    "eval_eos": "variable_length",
    "eos_window_ratio": "variable_length",
    "pad_anneal_steps": "pad_mask_ratio",
    "pad_mask_method": "pad_mask_ratio",
    "eos_window_max": "eos_window_ratio",
    "eos_window_anneal_steps": "eos_window_ratio",
}


@dataclass
class LengthKeys:
    """Keys of variable length; a key that is None takes its value from the checkpoint."""

    variable_length: str | None = key(
        None,
        "Train on rows of one text, EOS and padding that the model learns to generate: eos_pad (a padding token), "
        "eos_eos (EOS repeated), rainbow (several padding tokens in turn) or none (no variable length). Defaults to "
        "the checkpoint's, then to none.",
        choices=("none", "eos_pad", "eos_eos", "rainbow"),
    )
    rainbow_colors: int | None = key(
        None,
        "Number of padding tokens of variable_length: rainbow. Defaults to the checkpoint's, then to 7.",
        kind="integer",
        low=1,
        high=1000,
    )
    pad_block_length: int | None = key(
        None,
        "With variable_length, pad each row to a multiple of this many tokens, and hide the positions after it from "
        "the model. Defaults to padding up to cutoff_len.",
        kind="integer",
        low=1,
    )
    pad_extra_blocks: int | None = key(
        None,
        "With pad_block_length, upper bound on the number of further blocks of padding, drawn for each row. Defaults "
        "to as many as cutoff_len allows. 0 is cheapest, but then the length of the canvas tells the model the length "
        "of the text.",
        kind="integer",
        low=0,
    )
    drop_overlong: bool = key(
        True,
        "With variable_length, drop rows without room for EOS within cutoff_len; with false, such a row is an error.",
    )
    pad_mask_ratio: float | None = key(
        None,
        "With variable_length, target fraction of padding among scored masked tokens. Defaults to treating padding as "
        "text.",
        kind="number",
        low=0,
        high=1,
    )
    pad_anneal_steps: int = key(0, "Optimiser steps over which pad_mask_ratio rises from 0.", low=0)
    pad_mask_method: str = key(
        "elbo",
        "How pad_mask_ratio is reached: elbo (a random subset of padding is not scored; the rest are terms of the "
        "evidence bound) or counts (masks fixed numbers of text and padding tokens, as variable-length DiffuGPT).",
        choices=("elbo", "counts"),
    )
    eos_window_ratio: float = key(
        0.0,
        "With variable_length, fraction of rows masked from a random point up to eos_window_max tokens before EOS "
        "onwards, in place of the ordinary noise.",
        low=0,
        high=1,
    )
    eos_window_max: int = key(
        100, "With eos_window_ratio, upper bound on the number of tokens before EOS that are masked.", low=0
    )
    eos_window_anneal_steps: int = key(0, "Optimiser steps over which eos_window_max rises from 0.", low=0)
    eval_eos: bool = key(
        False,
        "With variable_length and do_eval, measure how well the model predicts EOS, and write eos_metrics.json and "
        "eos_metrics.png.",
    )
