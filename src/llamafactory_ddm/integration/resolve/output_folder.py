"""What is known of output_dir before a run loads anything: whether it can be written, and what would mix in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...checkpoints.adapters import ADAPTER_CONFIG, holds_model
from ..logs import get_logger

logger = get_logger(__name__)


def check_output_folder(model_args: Any, training_args: Any, finetuning_args: Any) -> None:
    """Check that output_dir can be written, and that what a training run saves would not mix with what is there.

    Raises:
        ValueError: if it is a file, cannot be written, holds the model that an adapter is trained for, or holds a
            model where an adapter is saved, or an adapter where a model is; each with the cure.
    """
    folder = Path(training_args.output_dir)
    _check_writable(folder)
    if not training_args.do_train:
        return
    saves_adapter = finetuning_args.finetuning_type == "lora"
    base = Path(model_args.model_name_or_path)
    if saves_adapter and base.is_dir() and folder.is_dir() and base.samefile(folder):
        raise ValueError(
            f"output_dir: {folder} is the folder of model_name_or_path, and the adapter would mix with the model that "
            "it needs; choose another output_dir"
        )
    there = "a model" if saves_adapter else "an adapter"
    if not (holds_model(folder) if saves_adapter else (folder / ADAPTER_CONFIG).is_file()):
        return
    saved = f"finetuning_type: {finetuning_args.finetuning_type} saves {'an adapter' if saves_adapter else 'a model'}"
    if not training_args.overwrite_output_dir:
        raise ValueError(
            f"output_dir: {folder} holds {there}, and {saved} there, which would mix with it; choose another "
            "output_dir, or set overwrite_output_dir: true to have what is there replaced"
        )
    logger.warning_rank0(f"{folder} holds {there}; {saved} there in its place (overwrite_output_dir: true).")


def _check_writable(folder: Path) -> None:
    """Write a file where the folder is, or would be made."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"output_dir: {folder} cannot be a folder, as {place} is a file; choose another output_dir")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"output_dir: {folder} cannot be written ({error.strerror or error}); choose another output_dir, or make "
            f"{place} writable"
        ) from error
