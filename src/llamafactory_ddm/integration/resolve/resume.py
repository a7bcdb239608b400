"""Finds the checkpoint that a run resumes from, which is never one that a kill or a full disk left incomplete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints.adapters import ADAPTER_CONFIG
from ...checkpoints.weights import BrokenCheckpointError, last_complete_checkpoint, verify_checkpoint
from ...modeling.diffusion_config import DiffusionConfig
from ..logs import get_logger

logger = get_logger(__name__)
_FINETUNING_KEYS = ("train_on_padding", "sep_token", "sep_token_id", "variable_length")
_FIXED_KEYS = (
    *("mask_token", "mask_token_id", "shift", "noise_schedule", "noise_process", "uniform_ratio"),
    *("attention", "train_block_length"),
    *_FINETUNING_KEYS,
)


def resolve_resume(training_args: Any, finetuning_args: Any) -> str | None:
    """Return the folder to resume from, or None to start over.

    A checkpoint that the user names must be complete. `resume_from_checkpoint: true`, or an output_dir that is not
    overwritten, selects the newest complete checkpoint; incomplete ones are logged.

    Raises:
        ValueError: if the named folder is missing or incomplete, or `true` finds no checkpoint.
    """
    if not training_args.do_train:
        return None
    requested = finetuning_args.parsed.resume
    if requested is not None and not _is_true(requested):
        if _is_false(requested):
            return None
        folder = Path(str(requested))
        if not folder.is_dir():
            raise ValueError(
                f"resume_from_checkpoint: {requested} does not exist; name a checkpoint-N folder, or set it to true"
            )
        try:
            verify_checkpoint(folder, resume=True)
        except BrokenCheckpointError as error:
            raise ValueError(
                f"resume_from_checkpoint: {requested} cannot be resumed: {error}. Name another checkpoint, or set "
                "resume_from_checkpoint: true to take the last complete one in output_dir"
            ) from error
        _check_finetuning_type(folder, finetuning_args)
        return str(folder)
    if requested is None and training_args.resume_from_checkpoint is None:
        return None
    newest, incomplete = last_complete_checkpoint(training_args.output_dir)
    for folder, reason in incomplete:
        logger.warning_rank0(f"Skipping the incomplete checkpoint {folder}: {reason}")
    if newest is None and requested is not None:
        raise ValueError(
            f"resume_from_checkpoint: true, but output_dir: {training_args.output_dir} has no complete checkpoint; "
            "set resume_from_checkpoint: null to start over"
        )
    if newest is None:
        logger.warning_rank0(f"No complete checkpoint in {training_args.output_dir}: training starts over.")
        return None
    logger.info_rank0(f"Resuming from {newest}.")
    _check_finetuning_type(newest, finetuning_args)
    return str(newest)


def _check_finetuning_type(folder: Path, finetuning_args: Any) -> None:
    """Check that a checkpoint holds an adapter if the run saves an adapter, and a model if it saves a model.

    Raises:
        ValueError: if it does not.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter != (finetuning_args.finetuning_type == "lora"):
        raise ValueError(
            f"finetuning_type: {finetuning_args.finetuning_type} cannot resume {folder}, which holds "
            f"{'an adapter' if is_adapter else 'a model'}; set the finetuning_type of that run, or another output_dir"
        )


def resume_hint(training_args: Any) -> str:
    """Return how to continue a run that was interrupted."""
    if training_args.do_train:
        newest, _ = last_complete_checkpoint(training_args.output_dir)
        if newest is not None:
            return f"Run the same command with resume_from_checkpoint=true to continue from {newest}."
        return "No checkpoint was saved, so the same command starts over; save_steps sets how often one is saved."
    if training_args.do_predict:
        return "Finished texts are kept; run the same command to generate the remaining ones."
    return ""


def check_resumed(config: DiffusionConfig, folder: str) -> None:
    """Check that this run has the diffusion config of the checkpoint in `folder`.

    Raises:
        ValueError: if a key differs, naming it and both values.
    """
    stored_config = DiffusionConfig.load(folder)
    for key in _FIXED_KEYS:
        value, stored = getattr(config, key), getattr(stored_config, key)
        if value != stored and (stored is not None or key not in _FINETUNING_KEYS):
            keys = (
                "variable_length, cutoff_len and the pad_* keys"
                if key == "variable_length"
                else key.removesuffix("_id")
            )
            raise ValueError(
                f"{key}: {value} contradicts the checkpoint to resume from, {folder}, which has {key}: {stored}; set "
                f"{keys} as in its run, or set another output_dir"
            )


def _is_true(value: Any) -> bool:
    return value is True or str(value).lower() == "true"


def _is_false(value: Any) -> bool:
    return value is False or str(value).lower() in ("false", "null", "none", "")
