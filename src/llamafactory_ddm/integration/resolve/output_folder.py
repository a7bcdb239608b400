"""Checks of output_dir before a run loads anything: it is writable, and a model and an adapter do not mix in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...checkpoints.adapters import ADAPTER_CONFIG, holds_model
from ..logs import get_logger

logger = get_logger(__name__)


def check_output_folder(model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Check that output_dir can be written, and that a training run would not mix a model and an adapter in it.

    Raises:
        ValueError: if it is a file, is not writable, is the folder of the adapter's base model, or holds a model where
            the run saves an adapter or the reverse.
    """
    folder = Path(training_args.output_dir)
    _check_writable(folder)
    if not training_args.do_train:
        return
    saves_adapter = finetuning_args.finetuning_type == "lora"
    base = Path(model_args.model_name_or_path)
    if saves_adapter and base.is_dir() and folder.is_dir() and base.samefile(folder):
        raise ValueError(
            f"output_dir: {folder} is the folder of model_name_or_path, where the adapter would mix with its base "
            "model; set another output_dir"
        )
    if not (holds_model(folder) if saves_adapter else (folder / ADAPTER_CONFIG).is_file()):
        return
    old, new = ("a model", "an adapter") if saves_adapter else ("an adapter", "a model")
    saves = f"finetuning_type: {finetuning_args.finetuning_type} saves {new}"
    if not training_args.overwrite_output_dir:
        raise ValueError(
            f"output_dir: {folder} holds {old}, and {saves}, which would mix with it; set another output_dir, or "
            f"overwrite_output_dir: true to replace {old}"
        )
    logger.warning_rank0(f"overwrite_output_dir: true: {folder} holds {old}; {saves} in its place.")


def _check_writable(folder: Path) -> None:
    """Check that a file can be written to the folder, or to its nearest parent that exists."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {folder} cannot be created, as {existing} is a file; set another output_dir")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"output_dir: {folder} is not writable ({error.strerror or error}); set another output_dir, or make "
            f"{existing} writable"
        ) from error
