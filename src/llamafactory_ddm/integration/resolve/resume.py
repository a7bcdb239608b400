"""The checkpoint that a run resumes from; never one that a kill or a full disk left incomplete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints.adapters import ADAPTER_CONFIG
from ...checkpoints.weights import BrokenCheckpointError, last_complete_checkpoint, verify_checkpoint
from ...modeling.diffusion_config import DiffusionConfig
from ..logs import get_logger

logger = get_logger(__name__)
_OF_FINETUNING = ("train_on_padding", "sep_token", "sep_token_id", "variable_length")
_AGREEING = (
    *("mask_token", "mask_token_id", "shift", "noise_schedule", "noise_process", "uniform_ratio"),
    *_OF_FINETUNING,
)


def resolve_resume(training_args: Any, finetuning_args: Any) -> str | None:
    """Return the folder to resume from, or None to start over.

    A folder that the user names must be complete. `resume_from_checkpoint: true`, and LLaMA-Factory's own search in an
    output_dir that is not overwritten, take the newest complete checkpoint, and log the incomplete ones they skip.

    Raises:
        ValueError: if the named folder is missing or incomplete, or `true` finds no checkpoint.
    """
    if not training_args.do_train:
        return None
    asked = finetuning_args.parsed.resume
    if asked is not None and not _is_true(asked):
        if _is_false(asked):
            return None
        folder = Path(str(asked))
        if not folder.is_dir():
            raise ValueError(
                f"resume_from_checkpoint: {asked} does not exist; name a checkpoint-N folder, or set it to true"
            )
        try:
            verify_checkpoint(folder, resume=True)
        except BrokenCheckpointError as error:
            raise ValueError(
                f"resume_from_checkpoint: {asked} cannot be resumed: {error}. Name another checkpoint, or set "
                "resume_from_checkpoint: true to take the last complete one in output_dir"
            ) from error
        return _of_kind(folder, finetuning_args)
    found = training_args.resume_from_checkpoint
    if asked is None and found is None:
        return None
    best, skipped = last_complete_checkpoint(training_args.output_dir)
    for folder, reason in skipped:
        logger.warning_rank0(f"Passing over the incomplete checkpoint {folder}: {reason}")
    if best is None and asked is not None:
        raise ValueError(
            f"resume_from_checkpoint: true found no complete checkpoint in output_dir: {training_args.output_dir}; "
            "set it to null to start over"
        )
    if best is None:
        logger.warning_rank0(f"No complete checkpoint in {training_args.output_dir}: training starts over.")
        return None
    logger.info_rank0(f"Resuming from {best}.")
    return _of_kind(best, finetuning_args)


def _of_kind(folder: Path, finetuning_args: Any) -> str:
    """Return the folder if it holds the kind of weights that the run saves.

    Raises:
        ValueError: if it holds an adapter and the run saves a model, or the reverse.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter != (finetuning_args.finetuning_type == "lora"):
        raise ValueError(
            f"the checkpoint to resume from, {folder}, holds {'an adapter' if is_adapter else 'a model'}, which "
            f"finetuning_type: {finetuning_args.finetuning_type} does not go on with; set finetuning_type as it was, "
            "or choose another output_dir"
        )
    return str(folder)


def how_to_go_on(training_args: Any) -> str:
    """Return how to resume a run that was interrupted."""
    if training_args.do_train:
        best, _ = last_complete_checkpoint(training_args.output_dir)
        if best is not None:
            return f"The same command with resume_from_checkpoint=true goes on from {best}."
        return "No checkpoint was saved, so the same command starts over; save_steps says how often one is."
    if training_args.do_predict:
        return "Texts that are done are kept, and the same command goes on with the others."
    return ""


def check_resumed(config: DiffusionConfig, folder: str) -> None:
    """Check that this run has the diffusion config of the checkpoint in `folder`.

    Raises:
        ValueError: if a key differs, naming it and both values.
    """
    stored = DiffusionConfig.load(folder)
    for key in _AGREEING:
        here, there = getattr(config, key), getattr(stored, key)
        if here != there and (there is not None or key not in _OF_FINETUNING):
            raise ValueError(
                f"{key}: {here} contradicts the checkpoint to resume from, {folder}, which says {key}: {there}; "
                f"set {key} as it was, or choose another output_dir"
            )


def _is_true(value: Any) -> bool:
    return value is True or str(value).lower() == "true"


def _is_false(value: Any) -> bool:
    return value is False or str(value).lower() in ("false", "null", "none", "")
