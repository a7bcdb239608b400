"""Models and adapters that a run names by the hub, or as a LLaDA or Dream was published: their folder is named."""

from __future__ import annotations

from typing import Any

from llamafactory.extras.misc import try_download_model_from_other_hub

from ...checkpoints.plain_copy import plain_folder
from ..logs import get_logger

logger = get_logger(__name__)


def resolve_model_names(model_args: Any) -> None:
    """Have `model_name_or_path` and `adapter_name_or_path` name folders where they name diffusion models.

    A LLaDA or Dream as published gives way to its plain copy, a model or adapter of this package on a hub to the
    folder that it is downloaded to; anything else stays.

    Raises:
        ValueError: if the files are not whole or cannot be had, or the copy has no room.
        OSError: if the copy cannot be written.
    """
    # As upstream is about to do: the name of a model on ModelScope becomes its folder.
    name = try_download_model_from_other_hub(model_args)
    folder = _folder(name, model_args)
    if folder != name:
        logger.info_rank0(f"{name} is used from {folder}.")
        model_args.model_name_or_path = folder
    if model_args.adapter_name_or_path and not model_args.adapter_folder:
        model_args.adapter_name_or_path = [_folder(name, model_args) for name in model_args.adapter_name_or_path]


def _folder(name: str, model_args: Any) -> str:
    return plain_folder(
        name,
        revision=model_args.model_revision,  # of adapters too, as LLaMA-Factory has it
        download_dir=model_args.cache_dir,
        token=model_args.hf_hub_token,
        say=logger.info,  # by whichever rank comes first, and is the only one to say it
    )
