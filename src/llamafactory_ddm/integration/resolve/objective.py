"""Builds the objective of a run, noise and loss, from the YAML and the checkpoint's config."""

from __future__ import annotations

from typing import Any

from ...diffusion.eos_noise import EosNoise
from ...diffusion.schedules import get_schedule
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.model_info import max_positions, text_config
from ...objectives import OBJECTIVES, Objective
from ...objectives.block import BlockObjective
from .variable_length import LengthPlan


def build_objective(
    config: DiffusionConfig,
    tokenizer: Any,
    model: Any,
    lengths: LengthPlan | None,
    training_args: Any,
    finetuning_args: Any,
) -> Objective:
    """Return the objective of a run."""
    common: dict[str, Any] = {
        "mask_id": config.mask_token_id,
        "shift": config.shift,
        "schedule": get_schedule(config.noise_schedule),
        "weighting": finetuning_args.loss_weighting,
        "norm": finetuning_args.loss_norm,
        "time_epsilon": finetuning_args.time_epsilon,
        "antithetic": finetuning_args.antithetic_time,
        "seed": training_args.seed % 2**64,
        "truncate_ratio": finetuning_args.random_truncate_ratio,
    }
    if config.attention == "block":
        return BlockObjective(
            **common,
            block_length=config.train_block_length or 1,
            block_noise=finetuning_args.block_noise,
            n_positions=max_positions(model.config),
        )
    # A model may have more embeddings than its tokenizer has tokens, and a tokenizer tokens without an embedding.
    n_ids = min(max(tokenizer.get_vocab().values()) + 1, int(text_config(model).vocab_size))
    return OBJECTIVES.get(config.noise_process).build(
        common, uniform_ratio=config.uniform_ratio, n_ids=n_ids, eos_noise=_build_eos_noise(lengths, finetuning_args)
    )


def _build_eos_noise(plan: LengthPlan | None, finetuning_args: Any) -> EosNoise | None:
    """Return how noise depends on the position of EOS; None if it does not."""
    if plan is None or (finetuning_args.pad_mask_ratio is None and not finetuning_args.eos_window_ratio):
        return None
    return EosNoise(
        pad_mask_ratio=finetuning_args.pad_mask_ratio,
        pad_anneal_steps=finetuning_args.pad_anneal_steps,
        pad_mask_method=finetuning_args.pad_mask_method,
        eos_window_ratio=finetuning_args.eos_window_ratio,
        eos_window_max=finetuning_args.eos_window_max,
        eos_window_anneal_steps=finetuning_args.eos_window_anneal_steps,
    )
