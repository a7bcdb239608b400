"""Resolves the variable-length format and its collator, and drops rows that have no room for EOS."""

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
_N_COLORS = 7


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


def resolve_length_plan(
    config: DiffusionConfig | None, data_args: Any, training_args: Any, finetuning_args: Any
) -> LengthPlan | None:
    """Return the variable-length format of the YAML or the checkpoint; None if there is none. Turn packing off.

    Raises:
        ValueError: if the YAML contradicts the checkpoint or itself, naming both keys.
    """
    stored = None if config is None else config.variable_length
    requested = finetuning_args.variable_length
    if stored is not None and requested is not None and requested != stored.format:
        raise ValueError(
            f"variable_length: {requested} contradicts the checkpoint, which was trained with variable_length: "
            f"{stored.format}; remove the key from the YAML, or start from another checkpoint"
        )
    name = requested or (stored.format if stored is not None else "none")
    _check_effects(name, stored, finetuning_args)
    if name == "none":
        return None
    _check_conflicts(name, config, data_args, training_args, finetuning_args)
    data_args.packing = False  # LLaMA-Factory's default for stage: pt is true
    n_stored = len(stored.pad_tokens) if stored is not None else _N_COLORS
    return LengthPlan(
        name,
        finetuning_args.rainbow_colors or n_stored,
        data_args.cutoff_len,
        finetuning_args.pad_block_length or (None if stored is None else stored.block),
        _resolve_extra_blocks(stored, finetuning_args),
        finetuning_args.drop_overlong,
    )


def _check_effects(name: str, stored: VariableLength | None, finetuning_args: Any) -> None:
    """Refuse keys that have no effect without another key."""
    has_block = finetuning_args.pad_block_length is not None or (stored is not None and stored.block is not None)
    for key, needed in NEEDS.items():
        if key in finetuning_args.parsed.user_keys and (
            name == "none"
            or (needed.endswith("rainbow") and name != "rainbow")
            or (needed == "pad_block_length" and not has_block)
            or (needed == "pad_mask_ratio" and finetuning_args.pad_mask_ratio is None)
            or (needed == "eos_window_ratio" and not finetuning_args.eos_window_ratio)
        ):
            value = " above 0" if needed == "eos_window_ratio" else ""
            raise ValueError(f"{key}: has no effect without {needed}; set {needed}{value}, or remove {key}")


def _check_conflicts(
    name: str, config: DiffusionConfig | None, data_args: Any, training_args: Any, finetuning_args: Any
) -> None:
    """Refuse keys that contradict `variable_length: name`, each other, or the checkpoint."""
    user_keys = finetuning_args.parsed.user_keys
    block, cutoff_len = finetuning_args.pad_block_length, data_args.cutoff_len
    if training_args.do_train and "pad_block_length" in user_keys and block > cutoff_len:
        raise ValueError(
            f"pad_block_length: {block} exceeds cutoff_len: {cutoff_len}, so no row could end at a multiple of it; "
            "lower pad_block_length, raise cutoff_len, or remove pad_block_length"
        )
    if finetuning_args.random_truncate_ratio:
        raise ValueError(
            f"random_truncate_ratio: {finetuning_args.random_truncate_ratio} cuts off EOS, which variable_length: "
            f"{name} trains; remove one of them"
        )
    if finetuning_args.eval_eos and not training_args.do_eval:
        raise ValueError("eval_eos: has no effect without do_eval; set do_eval: true and eval_dataset, or remove it")
    if data_args.packing and {"packing", "neat_packing"} & user_keys:
        raise ValueError(
            f"variable_length: {name} needs one text per row, but packing: true puts several into one; set packing: "
            "false"
        )
    if finetuning_args.variable_length is not None and config is not None and config.train_on_padding is False:
        raise ValueError(
            f"variable_length: {name} trains on padding, but the checkpoint was trained with train_on_padding: false; "
            "remove variable_length, or start from another checkpoint"
        )
    if finetuning_args.train_on_padding is False:
        raise ValueError(
            f"variable_length: {name} trains on padding, which train_on_padding: false excludes; remove one of them"
        )
    stored, colors = None if config is None else config.variable_length, finetuning_args.rainbow_colors
    if stored is not None and colors is not None and colors != len(stored.pad_tokens):
        raise ValueError(
            f"rainbow_colors: {colors} contradicts the checkpoint, which was trained with {len(stored.pad_tokens)} "
            "padding tokens; remove the key from the YAML"
        )


def _resolve_extra_blocks(stored: VariableLength | None, finetuning_args: Any) -> int | None:
    if stored is None or {"pad_block_length", "pad_extra_blocks"} & finetuning_args.parsed.user_keys:
        extra: int | None = finetuning_args.pad_extra_blocks
        return extra
    return stored.extra


def resolve_canvas(
    config: DiffusionConfig, plan: LengthPlan, tokenizer: Any, *, answers: bool, trains: bool
) -> tuple[DiffusionConfig, VariableLengthCollator]:
    """Return the diffusion config with the variable-length format, and the collator.

    The tokenizer must have the padding tokens. A run that does not train keeps the checkpoint's format.
    """
    names = pad_names(tokenizer, plan.format, plan.colors, config.variable_length)
    ids = tuple(int(tokenizer.convert_tokens_to_ids(name)) for name in names)
    variable_length = VariableLength(plan.format, names, ids, canvas=plan.canvas, block=plan.block, extra=plan.extra)
    start_id = None
    if config.shift and not answers:
        start_id = start_token_id(tokenizer) if config.start_token_id is None else config.start_token_id
    collator = VariableLengthCollator(
        eos_id=int(tokenizer.eos_token_id),
        stop_ids=tuple(config.end_token_ids or ()),
        pad_ids=ids,
        canvas=plan.canvas,
        start_id=start_id,
        block=plan.block,
        extra=plan.extra,
    )
    if not trains and config.variable_length is not None:
        if plan.canvas != config.variable_length.canvas:
            logger.info_rank0(
                f"cutoff_len: {plan.canvas}: the model was trained on canvases of up to "
                f"{config.variable_length.canvas} tokens."
            )
        return config, collator
    # Training on documents leaves train_on_padding open for a later finetuning.
    train_on_padding = True if answers else config.train_on_padding
    return replace(config, variable_length=variable_length, train_on_padding=train_on_padding), collator


def drop_overlong(
    dataset_module: dict[str, Any],
    collator: VariableLengthCollator,
    plan: LengthPlan,
    data_args: Any,
    training_args: Any,
) -> dict[str, Any]:
    """Drop rows that have no room for EOS, and log how many.

    Raises:
        ValueError: if no row is left, or a row has no room with drop_overlong: false.
    """

    def filter_rows(dataset: Any) -> Any:
        if not hasattr(dataset, "__len__"):
            return dataset.filter(collator.fits)
        with training_args.main_process_first(desc="drop long rows", local=not data_args.data_shared_file_system):
            return dataset.filter(
                collator.fits,
                num_proc=data_args.preprocessing_num_workers,
                load_from_cache_file=not data_args.overwrite_cache or training_args.local_process_index != 0,
                desc="Dropping rows without room for EOS",
            )

    return {name: _drop_from(dataset, name, filter_rows, plan) for name, dataset in dataset_module.items()}


def _drop_from(dataset: Any, name: str, filter_rows: Callable[[Any], Any], plan: LengthPlan) -> Any:
    if isinstance(dataset, dict):
        return {key: _drop_from(part, f"{name} {key}", filter_rows, plan) for key, part in dataset.items()}
    if not hasattr(dataset, "filter"):
        return dataset
    if not hasattr(dataset, "__len__"):  # streamed; the collator refuses rows that do not fit
        return filter_rows(dataset) if plan.drop_overlong else dataset
    fitting = filter_rows(dataset)
    n_rows, n_dropped = len(dataset), len(dataset) - len(fitting)
    no_room = f"{name}: {n_dropped} of {n_rows} rows have no room for EOS within cutoff_len: {plan.canvas}"
    if n_dropped and not plan.drop_overlong:
        raise ValueError(f"{no_room}; raise cutoff_len, or set drop_overlong: true")
    if n_dropped == n_rows:
        raise ValueError(f"{no_room}; raise cutoff_len")
    logger.info_rank0(f"{no_room} and are dropped." if n_dropped else f"{name}: all {n_rows} rows have room for EOS.")
    return fitting
