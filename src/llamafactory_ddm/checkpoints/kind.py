"""Whether a folder or Hub name holds a diffusion model or an autoregressive one, known before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..modeling.diffusion_config import FILE_NAME, DiffusionConfig
from .adapters import ADAPTER_CONFIG, base_of
from .families import find_diffusion_config
from .hub import local_folder, may_be_on_hub

KINDS = ("diffusion", "ar")


def model_or_adapter(model: str | None, adapter: str | None) -> str:
    """Return what to load: the adapter, which names its model, or the model.

    Args:
        model: value of model_name_or_path.
        adapter: value of adapter_name_or_path.
    Raises:
        ValueError: if the folder holds no adapter, or the adapter names another model.
    """
    if adapter is None:
        return str(model)
    if not (Path(adapter) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"adapter_name_or_path: {adapter} holds no {ADAPTER_CONFIG}; name the folder of an adapter")
    base = base_of(adapter)
    if model is not None and model != base and Path(model).resolve() != Path(base).resolve():
        raise ValueError(
            f"model_name_or_path: {model} is not the model of the adapter {adapter}, which is {base}; remove "
            f"model_name_or_path, or set it to {base}"
        )
    return adapter


def check_kind(path: str, kind: Literal["diffusion", "ar"] | str) -> DiffusionConfig | None:
    """Check that a model is of a kind, and return its diffusion config, None for an autoregressive model.

    Args:
        path: folder or Hub name of a model, or folder of an adapter.
        kind: one of `KINDS`. An adapter with a diffusion config is a diffusion model, whatever its base model is; one
            without is of the kind of its base model.
    Raises:
        ValueError: if there is no such folder, the adapter's base model is missing, or the model is of the other kind.
    """
    folder = _folder(path)
    config = find_diffusion_config(folder) if folder.is_dir() else None
    base = None
    if (folder / ADAPTER_CONFIG).is_file():
        base = base_of(folder)
        if not Path(base).is_dir() and not may_be_on_hub(base):
            raise ValueError(
                f"{path} is an adapter of {base}, which is not a folder in {Path.cwd()}; change the folder that you "
                f"start in, or base_model_name_or_path in {ADAPTER_CONFIG}"
            )
    if kind == "diffusion":
        if config is None:
            raise ValueError(
                f"{path} holds no {FILE_NAME}, so it is no diffusion model; set kind: ar for an autoregressive model"
            )
        return config
    if config is not None:
        raise ValueError(
            f"{path} is a diffusion model, whose attention is bidirectional; remove kind: ar, or name an "
            "autoregressive model"
        )
    if base is not None:
        place = Path(local_folder(base))
        if place.is_dir() and find_diffusion_config(place) is not None:
            raise ValueError(
                f"{path} is an adapter of the diffusion model {base}, whose attention is bidirectional; name an "
                "autoregressive model"
            )
    return None


def _folder(path: str) -> Path:
    """Return the folder of a model; for an autoregressive model on the Hub, a path that does not exist.

    Raises:
        ValueError: if it is neither a folder nor a Hub name.
    """
    folder = Path(local_folder(path))
    if not folder.is_dir() and not may_be_on_hub(path):
        raise ValueError(f"{path} is not a folder; check the path (it is relative to {Path.cwd()})")
    return folder
