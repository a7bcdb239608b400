"""The attention of a run, full or in blocks: the YAML's, else the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.model_info import window_of_config
from ..logs import get_logger

logger = get_logger(__name__)
# Keys that have no meaning in blocks -> why.
_REFUSED = {
    "antithetic_time": "each block has a noise level of its own",
    "pad_mask_ratio": "it changes the noise of a whole row",
    "eos_window_ratio": "it masks a row across its blocks",
    "eval_eos": "it masks a row across its blocks",
}


def with_attention(
    config: DiffusionConfig,
    stored: DiffusionConfig | None,
    model_config: Any,
    model_args: Any,
    data_args: Any,
    training_args: Any,
    finetuning_args: Any,
) -> DiffusionConfig:
    """Return the diffusion config of this run's checkpoints with `attention` and `train_block_length`.

    A model that becomes a block model needs no annealing: its attention ratio is 1.

    Args:
        config: the diffusion config of the run so far.
        stored: the checkpoint's; None for an autoregressive model.
        model_config: transformers' config of the model.
        model_args: LLaMA-Factory's.
        data_args: LLaMA-Factory's.
        training_args: LLaMA-Factory's.
        finetuning_args: LLaMA-Factory's, with this package's keys.
    Raises:
        ValueError: if the keys contradict each other, the checkpoint or the model, naming them.
    """
    attention, length = finetuning_args.attention or config.attention, finetuning_args.train_block_length
    trains, user_keys = training_args.do_train, finetuning_args.parsed.user_keys
    if attention == "full":
        _check_full(config, finetuning_args)
        return config
    if config.attention == "block":
        config.check_against(train_block_length=length)
        length = config.train_block_length
    elif stored is not None and not trains:
        config.check_against(attention=attention)
    if length is None:
        raise ValueError(
            f"attention: block needs train_block_length, the tokens in a block; set it to 1..{data_args.cutoff_len} "
            "(cutoff_len), such as 4 or 32"
        )
    if trains and length > data_args.cutoff_len:
        raise ValueError(
            f"train_block_length: {length} exceeds cutoff_len: {data_args.cutoff_len}; set it to "
            f"1..{data_args.cutoff_len}, or raise cutoff_len"
        )
    window = window_of_config(model_config)
    if window is not None:
        raise ValueError(
            f"attention: block needs a model without sliding windows, but {model_args.model_name_or_path} has "
            f"sliding_window: {window}; use another model, or attention: full"
        )
    if trains and "anneal_steps" in user_keys and finetuning_args.anneal_steps:
        raise ValueError(
            f"anneal_steps: {finetuning_args.anneal_steps} anneals attention to full, which attention: block has not; "
            "remove one of them"
        )
    _check_block_keys(config, finetuning_args)
    if trains and stored is not None and config.attention != "block":
        logger.info_rank0(
            f"{model_args.model_name_or_path} was trained with full attention; this run trains it further as a block "
            f"model (train_block_length: {length})."
        )
    return replace(config, attention="block", train_block_length=length, attention_ratio=1.0)


def _check_full(config: DiffusionConfig, finetuning_args: Any) -> None:
    """Check the keys of a run with full attention."""
    config.check_against(attention=finetuning_args.attention)
    given = [
        key
        for key in ("train_block_length", "block_noise", "sparse_attention")
        if key in finetuning_args.parsed.user_keys
    ]
    given = [key for key in given if getattr(finetuning_args, key) not in (None, False)]
    if given:
        raise ValueError(
            f"{given[0]}: {getattr(finetuning_args, given[0])} has no effect with attention: full; set attention: "
            f"block, or remove {given[0]}"
        )


def _check_block_keys(config: DiffusionConfig, finetuning_args: Any) -> None:
    """Refuse keys that do not work in blocks."""
    if config.noise_process != "masked":
        raise ValueError(
            f"noise_process: {config.noise_process} does not work with attention: block, whose blocks have masked "
            "noise; set noise_process: masked, or attention: full"
        )
    for key, reason in _REFUSED.items():
        value = getattr(finetuning_args, key)
        if value is not None and value is not False and value != 0.0:
            raise ValueError(f"{key}: {value} does not work with attention: block, as {reason}; remove one of them")
    if finetuning_args.block_noise == "counts" and "time_epsilon" in finetuning_args.parsed.user_keys:
        raise ValueError(
            f"time_epsilon: {finetuning_args.time_epsilon} has no effect with block_noise: counts, which draws no "
            "times; remove it, or set block_noise: times"
        )
