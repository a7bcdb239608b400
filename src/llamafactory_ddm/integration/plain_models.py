"""A LLaDA or Dream that a run names as it was published: the plain copy takes its place."""

from __future__ import annotations

from typing import Any

from llamafactory.extras.misc import try_download_model_from_other_hub

from ..modeling.recognition import plain_folder
from .logs import get_logger

logger = get_logger(__name__)


def settle_plain_model(model_args: Any) -> None:
    """Have `model_name_or_path` name a plain copy if it names a LLaDA or Dream as published; else it stays.

    Raises:
        ValueError: if the files are not whole or cannot be had, or the copy has no room.
        OSError: if the copy cannot be written.
    """
    # As upstream is about to do: the name of a model on ModelScope becomes its folder.
    name = try_download_model_from_other_hub(model_args)
    folder = plain_folder(
        name,
        revision=model_args.model_revision,
        download_dir=model_args.cache_dir,
        token=model_args.hf_hub_token,
        say=logger.info,  # by whichever rank comes first, and is the only one to say it
    )
    if folder != name:
        logger.info_rank0(f"{name} is used from its plain copy, {folder}.")
        model_args.model_name_or_path = folder
