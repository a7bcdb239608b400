"""The plugin's YAML keys, as a dataclass of its own that is mixed into LLaMA-Factory's finetuning arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from ...diffusion.schedules import SCHEDULES
from ...objectives import OBJECTIVES
from ...utils.keys import Key, key, keys_of
from ...utils.plugins import load_plugins
from .length import LengthKeys
from .sampling import SamplingArguments
from .sft import FinetuningKeys


@dataclass
class DiffusionArguments(FinetuningKeys, LengthKeys, SamplingArguments):
    """Arguments of the diffusion stages; a key left at None takes what the checkpoint's diffusion_config.json says."""

    # YAML may also hold a list; the annotation is for the command line's parser, which takes one type.
    plugins: str | None = key(
        None,
        "Modules or .py files of your own to import first; each may add a denoising_strategy, noise_schedule or "
        "noise_process. A list, or separated by commas.",
        kind="modules",
    )
    # An id may come as an int from YAML.
    mask_token: str | None = key(
        None,
        "[MASK]: a token of the vocabulary, an id, or a new one such as <|mask|>. Defaults to the checkpoint's, then "
        "to the tokenizer's own mask token.",
        kind="token",
    )
    allow_common_mask_token: bool = key(
        False,
        "Train even if [MASK] makes up more than one in 10,000 tokens of the data; the model then never generates "
        "that token.",
    )
    shift: bool | None = key(
        None,
        "Logits at position i predict token i + 1, as the autoregressive model was trained. Defaults to the "
        "checkpoint's, then to true.",
        kind="boolean",
    )
    anneal_steps: int = key(
        10000,
        "Optimiser steps over which attention anneals from causal to full; 0 is full at once. A checkpoint with full "
        "attention does not anneal again.",
        low=0,
    )
    noise_schedule: str | None = key(
        None, "Share of tokens kept at time t. Defaults to the checkpoint's, then to linear.", choices=SCHEDULES
    )
    noise_process: str | None = key(
        None,
        "masked: noised tokens become [MASK]. mixed: a share uniform_ratio of them become random tokens, so that "
        "sampling can edit. Defaults to the checkpoint's, then to masked; set it to continue a checkpoint under other "
        "noise.",
        choices=OBJECTIVES,
    )
    uniform_ratio: float | None = key(
        None,
        "Share of noised tokens that become a random token instead of [MASK], with noise_process: mixed. Defaults to "
        "the checkpoint's, then to 0.1.",
        kind="number",
        low=0,
        high=1,
    )
    random_truncate_ratio: float = key(
        0.0,
        "stage: ddm only: share of the training rows that are cut to a random length (LLaDA: 0.01), so that the model "
        "sees texts shorter than cutoff_len.",
        low=0,
        high=1,
    )
    time_epsilon: float = key(1e-3, "Smallest noise time that training draws.", low=0, high=0.5)
    loss_weighting: str = key(
        "elbo",
        "Weight of a token in the loss: elbo (the evidence bound; 1/t if linear) or uniform.",
        choices=("elbo", "uniform"),
    )
    loss_norm: str = key(
        "tokens",
        "What the summed loss is divided by: tokens (the evidence bound per token), masked (the masked tokens, as "
        "DiffuLLaMA's code; with mixed noise the tokens that it changed) or sequence (each row by its own length, "
        "then by the rows).",
        choices=("tokens", "masked", "sequence"),
    )
    antithetic_time: bool = key(
        False, "Stratify the noise times over the rows of an optimiser step, for less variance."
    )
    eval_time_samples: int = key(4, "Noise levels per evaluated row, stratified over the time axis.", low=1)
    stop_after_nan_steps: int = key(
        2,
        "Stop after this many consecutive optimiser steps with NaN or infinite loss; 0 never stops. None of these "
        "steps is saved.",
        low=0,
    )
    checkpoint_dir: str | None = key(
        None,
        "Folder of a diffusion checkpoint with the weights to use in place of model_name_or_path's (DiffuLLaMA's "
        "key).",
        kind="path",
    )

    def validate(self) -> None:
        """Check and coerce every key.

        Raises:
            ValueError: naming the key, the value given, what is accepted and, for a misspelt choice, the nearest one.
        """
        self.plugins = ",".join(load_plugins(self.plugins)) or None
        for name, one in KEYS.items():
            setattr(self, name, one.checked(name, getattr(self, name)))
        self.check_sampling()

    def changed_keys(self) -> list[str]:
        """Return the keys that differ from their defaults, in the order of the dataclass; plugins apart."""
        # A checkpoint may need its plugins in any stage.
        return [name for name, one in KEYS.items() if name != "plugins" and getattr(self, name) != one.default]


def _hand_over(arguments: Any) -> dict[str, Key]:
    """Return the keys of a dataclass, and leave in its fields what upstream's parser makes a command line of."""
    keys = keys_of(arguments)
    for spec in fields(arguments):
        spec.metadata = MappingProxyType({"help": f"Diffusion: {keys[spec.name].help}"})  # type: ignore[misc]
    return keys


KEYS = _hand_over(DiffusionArguments)
