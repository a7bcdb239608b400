"""`DiffusionArguments`, every YAML key of the plugin; `parser.py` mixes it into upstream's finetuning arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from ...diffusion.schedules import SCHEDULES
from ...objectives import OBJECTIVES
from ...utils.keys import Key, key, keys_of
from ...utils.plugins import load_plugins
from .attention import AttentionKeys
from .length import LengthKeys
from .monitoring import MonitoringKeys
from .sampling import SamplingArguments
from .serving import ServingKeys
from .sft import FinetuningKeys


@dataclass
class DiffusionArguments(FinetuningKeys, AttentionKeys, LengthKeys, MonitoringKeys, ServingKeys, SamplingArguments):
    """Keys of the diffusion stages; a key that is None takes its value from the checkpoint's diffusion_config.json."""

    # A YAML may give a list; upstream's command-line parser allows one type in the annotation.
    plugins: str | None = key(
        None,
        "Your own modules or .py files to import first, as a list or separated by commas; they may register a "
        "denoising_strategy, noise_schedule or noise_process.",
        kind="modules",
    )
    # A YAML may give an id as an int.
    mask_token: str | None = key(
        None,
        "The [MASK] token: a token of the vocabulary, its id, or a new token such as <|mask|>. Defaults to the "
        "checkpoint's, then to the tokenizer's mask token.",
        kind="token",
    )
    allow_common_mask_token: bool = key(
        False,
        "Train even if more than one in 10,000 tokens of the data is [MASK]; the model then never generates that "
        "token.",
    )
    shift: bool | None = key(
        None,
        "Keep the shifted prediction of the autoregressive model: logits at position i predict token i + 1. Defaults "
        "to the checkpoint's, then to true.",
        kind="boolean",
    )
    anneal_steps: int = key(
        10000,
        "Optimiser steps over which attention anneals from causal to full; 0 starts with full attention. Has no "
        "effect on a checkpoint with full attention, and none with attention: block.",
        low=0,
    )
    noise_schedule: str | None = key(
        None,
        "alpha(t), the fraction of tokens kept at time t. Defaults to the checkpoint's, then to linear.",
        choices=SCHEDULES,
    )
    noise_process: str | None = key(
        None,
        "masked: noised tokens become [MASK]. mixed: a fraction uniform_ratio of them become random tokens instead, "
        "which teaches the model to edit decoded tokens. Defaults to the checkpoint's, then to masked; set it to "
        "train a checkpoint further with the other process.",
        choices=OBJECTIVES,
    )
    uniform_ratio: float | None = key(
        None,
        "With noise_process: mixed, fraction of noised tokens that become a random token instead of [MASK]. Defaults "
        "to the checkpoint's, then to 0.1.",
        kind="number",
        low=0,
        high=1,
    )
    random_truncate_ratio: float = key(
        0.0,
        "With stage: ddm, fraction of training rows truncated to a random length (LLaDA: 0.01), so that the model "
        "sees texts shorter than cutoff_len.",
        low=0,
        high=1,
    )
    time_epsilon: float = key(1e-3, "Lower bound on the noise times drawn in training.", low=0, high=0.5)
    loss_weighting: str = key(
        "elbo",
        "Weight of a noised token in the loss: elbo (that of the evidence bound; 1/t with noise_schedule: linear) or "
        "uniform (1).",
        choices=("elbo", "uniform"),
    )
    loss_norm: str = key(
        "tokens",
        "What the summed loss is divided by: tokens (all tokens that can be noised, giving the evidence bound per "
        "token), masked (the tokens that noise changed, as in DiffuLLaMA's code) or sequence (each row's loss by its "
        "length, then the sum by the number of rows).",
        choices=("tokens", "masked", "sequence"),
    )
    antithetic_time: bool = key(
        False, "Stratify the noise times over the rows of an optimiser step, which lowers the variance of the loss."
    )
    logits_chunk: int | None = key(
        None,
        "Number of scored tokens whose logits training holds at once; loss and gradients are summed over these "
        "chunks. 0 holds the logits of all. Defaults to a number that suits the device, or 0 where chunks are not "
        "possible: an output embedding that is quantized, has DoRA, or has LoRA sharded by ZeRO-3; logits that the "
        "model changes afterwards (soft-capping).",
        kind="integer",
        low=0,
    )
    sequence_parallel_size: int = key(
        1,
        "Sequence parallelism: number of processes that share each row in training, by DeepSpeed's Ulysses attention. "
        "It must divide the number of processes and the model's key-value heads. Evaluations compute whole rows.",
        low=1,
    )
    eval_time_samples: int = key(
        4, "Number of noise levels at which each row is evaluated, stratified over the time axis.", low=1
    )
    stop_after_nan_steps: int = key(
        2,
        "Stop after this many consecutive optimiser steps with NaN or infinite loss; 0 never stops. No checkpoint is "
        "saved at such a step.",
        low=0,
    )
    peak_tflops: float | None = key(
        None,
        "Peak speed of one device in TFLOP/s (without sparsity, in the dtype of training), to which mfu in the log "
        "relates. Defaults to the data sheet's for known GPUs; for others no mfu is logged.",
        kind="number",
        low=0,
        above_low=True,
    )
    checkpoint_dir: str | None = key(
        None,
        "Folder of a diffusion checkpoint whose weights replace those of model_name_or_path (DiffuLLaMA's key).",
        kind="path",
    )

    def validate(self) -> None:
        """Check every key and convert it to its type.

        Raises:
            ValueError: naming the key, the value, what is allowed and, for a misspelt choice, the nearest one.
        """
        self.plugins = ",".join(load_plugins(self.plugins)) or None
        for name, spec in KEYS.items():
            setattr(self, name, spec.checked(name, getattr(self, name)))
        self.check_sampling()
        self.check_monitoring()

    def changed_keys(self) -> list[str]:
        """Return the keys that differ from their defaults, in the order of the dataclass, without `plugins`."""
        # Any stage may set `plugins`, because a checkpoint may need them.
        return [name for name, spec in KEYS.items() if name != "plugins" and getattr(self, name) != spec.default]


def _take_keys(arguments: Any) -> dict[str, Key]:
    """Return the keys of a dataclass, and put in their place the help texts that upstream's parser reads."""
    keys = keys_of(arguments)
    for spec in fields(arguments):
        spec.metadata = MappingProxyType({"help": f"Diffusion: {keys[spec.name].help}"})  # type: ignore[misc]
    return keys


KEYS = _take_keys(DiffusionArguments)
