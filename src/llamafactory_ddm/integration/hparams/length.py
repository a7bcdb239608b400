"""The keys of variable length: how a model learns where a text ends."""

from __future__ import annotations

from dataclasses import dataclass, field

CHOICES = {
    "variable_length": ("none", "eos_pad", "eos_eos", "rainbow"),
    "pad_mask_method": ("elbo", "counts"),
}
INTEGERS: dict[str, tuple[int, int | None]] = {
    "rainbow_colors": (1, 1000),
    "pad_block_length": (1, None),
    "pad_extra_blocks": (0, None),
    "pad_anneal_steps": (0, None),
    "eos_window_max": (0, None),
    "eos_window_anneal_steps": (0, None),
}
NUMBERS = {"pad_mask_ratio": (0.0, 1.0), "eos_window_ratio": (0.0, 1.0)}
BOOLEANS = ("drop_overlong", "eval_eos")
# Key -> the key without which it says nothing.
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
    """Arguments of variable length; a key left at None takes what the checkpoint says."""

    variable_length: str | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: one text a row with its end and padding behind it that the model learns to write: eos_pad "
                "(a pad token of its own), eos_eos (the end-of-text token again), rainbow (several pad tokens in "
                "turn), or none. Defaults to the checkpoint's, then to none."
            )
        },
    )
    rainbow_colors: int | None = field(
        default=None,
        metadata={"help": "Diffusion: pad tokens of variable_length: rainbow. Defaults to the checkpoint's, then 7."},
    )
    pad_block_length: int | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: with variable_length, pad a row to a multiple of so many tokens only, and hide what lies "
                "behind. Defaults to padding up to cutoff_len."
            )
        },
    )
    pad_extra_blocks: int | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: with pad_block_length, the most blocks that a row may get beyond those it fills; how many "
                "is drawn for each row. Defaults to as many as cutoff_len allows. With 0 rows cost least, but the "
                "size of a canvas gives away how long the text is."
            )
        },
    )
    drop_overlong: bool = field(
        default=True,
        metadata={
            "help": (
                "Diffusion: with variable_length, leave out rows that have no room for their end within cutoff_len; "
                "false makes the first of them an error."
            )
        },
    )
    pad_mask_ratio: float | None = field(
        default=None,
        metadata={
            "help": (
                "Diffusion: with variable_length, the share of masked and scored tokens that are padding, in [0, 1]. "
                "Defaults to treating padding as text."
            )
        },
    )
    pad_anneal_steps: int = field(
        default=0,
        metadata={"help": "Diffusion: optimiser steps over which that share rises from 0 to pad_mask_ratio."},
    )
    pad_mask_method: str = field(
        default="elbo",
        metadata={
            "help": (
                "Diffusion: how pad_mask_ratio is reached: elbo (some padding is not scored; what is left is terms "
                "of the evidence bound) or counts (so many tokens of each kind, as variable-length DiffuGPT)."
            )
        },
    )
    eos_window_ratio: float = field(
        default=0.0,
        metadata={
            "help": (
                "Diffusion: with variable_length, the share of rows that are masked from a few tokens before their "
                "end onwards in place of the ordinary noise, in [0, 1]."
            )
        },
    )
    eos_window_max: int = field(
        default=100,
        metadata={"help": "Diffusion: the most tokens before the end that such a row has masked."},
    )
    eos_window_anneal_steps: int = field(
        default=0,
        metadata={"help": "Diffusion: optimiser steps over which that number rises from 0."},
    )
    eval_eos: bool = field(
        default=False,
        metadata={
            "help": (
                "Diffusion: with variable_length and do_eval, measure how well the model knows where texts end, into "
                "eos_metrics.json and eos_metrics.png."
            )
        },
    )
