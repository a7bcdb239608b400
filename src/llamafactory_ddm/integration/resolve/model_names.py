"""Diffusion models that a run names by their Hub name: their local folder is used, and published code is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamafactory.extras.misc import try_download_model_from_other_hub

from ...checkpoints.families import detect_family, raw_config
from ...checkpoints.hub import local_folder
from ..logs import get_logger

logger = get_logger(__name__)


def resolve_model_names(model_args: Any) -> None:
    """Replace Hub names of diffusion models in `model_name_or_path` and `adapter_name_or_path` by local folders.

    Of a LLaDA or Dream the published code is not run, whatever `trust_remote_code` says.

    Raises:
        ValueError: if the files cannot be downloaded, or a config.json is not readable.
    """
    name = model_args.model_name_or_path
    # As upstream is about to do: the name of a model on ModelScope becomes its folder.
    folder = _folder(try_download_model_from_other_hub(model_args), model_args)
    if folder != name:
        logger.info_rank0(f"{name} is used from {folder}.")
        model_args.model_name_or_path = folder
    if model_args.adapter_name_or_path and not model_args.adapter_folder:
        model_args.adapter_name_or_path = [_folder(name, model_args) for name in model_args.adapter_name_or_path]
    family = detect_family(raw_config(folder)) if Path(folder).is_dir() else None
    if family is None:
        return
    # Adapters record it as their base, to be found from any folder.
    model_args.model_name_or_path = str(Path(folder).absolute())
    if model_args.trust_remote_code:
        logger.info_rank0(f"{name} is loaded as a plain {family.model_class.__name__}; its own code is not run.")
        model_args.trust_remote_code = False


def _folder(name: str, model_args: Any) -> str:
    return local_folder(
        name,
        revision=model_args.model_revision,  # of adapters too, as LLaMA-Factory has it
        download_dir=model_args.cache_dir,
        token=model_args.hf_hub_token,
    )
