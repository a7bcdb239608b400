"""Variable length in a run: its format, its collator, and rows that are dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...data.collators import VariableLengthCollator, start_token_id
from ...modeling.diffusion_config import DiffusionConfig, VariableLength
from ...modeling.special_tokens import pad_names
from ..hparams.length import NEEDS
from ..logs import get_logger

logger = get_logger(__name__)
_COLORS = 7


@dataclass(frozen=True)
class LengthPlan:
    """The variable-length format of a run.

    Attributes:
        format: `eos_pad`, `eos_eos` or `rainbow`.
        colors: number of padding tokens of `rainbow`.
        canvas: largest number of tokens in a row.
        block: `VariableLengthCollator.block`.
        extra: `VariableLengthCollator.extra`.
        drop_overlong: whether rows without room for EOS are dropped.
    """

    format: str
    colors: int
    canvas: int
    block: int | None
    extra: int | None
    drop_overlong: bool


def resolve_lengths(
    config: DiffusionConfig | None, data_args: Any, training_args: Any, finetuning_args: Any
) -> LengthPlan | None:
    """Return the variable-length format of the YAML or the checkpoint; None if there is none.

    Raises:
        ValueError: if the YAML contradicts the checkpoint or itself, naming both keys.
    """
    stored = None if config is None else config.variable_length
    asked = finetuning_args.variable_length
    if stored is not None and asked is not None and asked != stored.format:
        raise ValueError(
            f"variable_length: {asked} contradicts the checkpoint, which was trained with variable_length: "
            f"{stored.format}; remove the key from the YAML, or start from another checkpoint"
        )
    name = asked or (stored.format if stored is not None else "none")
    given = finetuning_args.parsed.user_keys
    for key, needed in NEEDS.items():
        if key not in given:
            continue
        if name == "none" or (needed.endswith("rainbow") and name != "rainbow"):
            raise ValueError(f"{key}: has no effect without {needed}; set it, or remove {key}")
        has_block = stored is not None and stored.block is not None
        if needed == "pad_block_length" and finetuning_args.pad_block_length is None and not has_block:
            raise ValueError(f"{key}: has no effect without pad_block_length; set it, or remove {key}")
        if needed == "pad_mask_ratio" and finetuning_args.pad_mask_ratio is None:
            raise ValueError(f"{key}: has no effect without pad_mask_ratio; set it, or remove {key}")
        if needed == "eos_window_ratio" and not finetuning_args.eos_window_ratio:
            raise ValueError(f"{key}: has no effect without eos_window_ratio; set it above 0, or remove {key}")
    if name == "none":
        return None
    if (
        training_args.do_train
        and "pad_block_length" in given
        and finetuning_args.pad_block_length > data_args.cutoff_len
    ):
        raise ValueError(
            f"pad_block_length: {finetuning_args.pad_block_length} is more than cutoff_len: {data_args.cutoff_len}, "
            "so no canvas could end at a multiple of it; lower it, raise cutoff_len, or remove it"
        )
    if finetuning_args.random_truncate_ratio:
        raise ValueError(
            f"random_truncate_ratio: {finetuning_args.random_truncate_ratio} cuts off EOS, which "
            f"variable_length: {name} teaches; remove one of them"
        )
    if finetuning_args.eval_eos and not training_args.do_eval:
        raise ValueError("eval_eos: has no effect without do_eval; set do_eval: true and eval_dataset, or remove it")
    if data_args.packing and {"packing", "neat_packing"} & given:
        raise ValueError(
            f"variable_length: {name} needs one text in a row, but packing: true puts several into it; set "
            "packing: false"
        )
    data_args.packing = False  # upstream's default for stage: pt is true
    if asked is not None and config is not None and config.train_on_padding is False:
        raise ValueError(
            f"variable_length: {name} trains on padding, but the checkpoint was trained with train_on_padding: false; "
            "start from another checkpoint, or remove variable_length"
        )
    if finetuning_args.train_on_padding is False:
        raise ValueError(
            f"variable_length: {name} trains on padding, but train_on_padding: false does not; remove one of them"
        )
    colors = finetuning_args.rainbow_colors
    if stored is not None and colors is not None and colors != len(stored.pad_tokens):
        raise ValueError(
            f"rainbow_colors: {colors} contradicts the checkpoint, which was trained with "
            f"{len(stored.pad_tokens)} padding tokens; remove the key from the YAML"
        )
    known = len(stored.pad_tokens) if stored is not None else _COLORS
    return LengthPlan(
        name,
        colors or known,
        data_args.cutoff_len,
        finetuning_args.pad_block_length or (None if stored is None else stored.block),
        _extra_blocks(stored, finetuning_args),
        finetuning_args.drop_overlong,
    )


def _extra_blocks(stored: VariableLength | None, finetuning_args: Any) -> int | None:
    given = {"pad_block_length", "pad_extra_blocks"} & finetuning_args.parsed.user_keys
    if stored is None or given:
        extra: int | None = finetuning_args.pad_extra_blocks
        return extra
    return stored.extra


def resolve_canvas(
    config: DiffusionConfig, plan: LengthPlan, tokenizer: Any, *, answers: bool, trains: bool
) -> tuple[DiffusionConfig, VariableLengthCollator]:
    """Return the config of this run's checkpoints, and its collator; the tokenizer must have the padding tokens.

    A run that does not train keeps the checkpoint's format.
    """
    names = pad_names(tokenizer, plan.format, plan.colors, config.variable_length)
    ids = tuple(int(tokenizer.convert_tokens_to_ids(name)) for name in names)
    ends = VariableLength(plan.format, names, ids, canvas=plan.canvas, block=plan.block, extra=plan.extra)
    start = config.start_token_id
    collator = VariableLengthCollator(
        eos_id=int(tokenizer.eos_token_id),
        end_ids=tuple(config.end_token_ids or ()),
        pad_ids=ids,
        canvas=plan.canvas,
        start_id=(start_token_id(tokenizer) if start is None else start) if config.shift and not answers else None,
        block=plan.block,
        extra=plan.extra,
    )
    if not trains and config.variable_length is not None:
        if plan.canvas != config.variable_length.canvas:
            logger.info_rank0(
                f"The model was trained on canvases of up to {config.variable_length.canvas} tokens, and is used here "
                f"with cutoff_len: {plan.canvas}."
            )
        return config, collator
    # Training on documents does not decide train_on_padding of a later finetuning.
    padding = True if answers else config.train_on_padding
    return replace(config, variable_length=ends, train_on_padding=padding), collator


def drop_overlong(
    dataset_module: dict[str, Any],
    collator: VariableLengthCollator,
    plan: LengthPlan,
    data_args: Any,
    training_args: Any,
) -> dict[str, Any]:
    """Drop rows that have no room for EOS, and log how many.

    Raises:
        ValueError: if no row is left, or with drop_overlong: false if a row has no room.
    """

    def kept(dataset: Any) -> Any:
        if not hasattr(dataset, "__len__"):
            return dataset.filter(collator.fits)
        with training_args.main_process_first(desc="drop long rows", local=not data_args.data_shared_file_system):
            return dataset.filter(
                collator.fits,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache or training_args.local_process_index != 0,
                desc="Dropping rows without room for EOS",
            )

    return {key: _each(key, value, kept, plan) for key, value in dataset_module.items()}


def _each(name: str, dataset: Any, fitting: Callable[[Any], Any], plan: LengthPlan) -> Any:
    if isinstance(dataset, dict):
        return {key: _each(f"{name} {key}", value, fitting, plan) for key, value in dataset.items()}
    if not hasattr(dataset, "filter"):
        return dataset
    if not hasattr(dataset, "__len__"):  # streamed; the collator refuses rows that do not fit
        return fitting(dataset) if plan.drop_overlong else dataset
    kept = fitting(dataset)
    message = (
        f"{name}: {len(dataset) - len(kept)} of {len(dataset)} rows have no room for EOS within cutoff_len: "
        f"{plan.canvas}"
    )
    if len(kept) < len(dataset) and not plan.drop_overlong:
        raise ValueError(f"{message}; raise cutoff_len, or set drop_overlong: true")
    if not len(kept):
        raise ValueError(f"{message}, and no other row is left; raise cutoff_len")
    if len(kept) < len(dataset):
        logger.info_rank0(f"{message} and are dropped; {len(kept)} are kept.")
    else:
        logger.info_rank0(f"{name}: all {len(dataset)} rows have room for EOS.")
    return kept
