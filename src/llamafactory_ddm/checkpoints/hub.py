"""Diffusion models on the Hub: the folder in Hugging Face's cache for a name, and the name for a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.hub import cached_file

from ..modeling.diffusion_config import FILE_NAME
from .families import detect_family, raw_config
from .weights import first_line

# Weights, config and tokenizer; no code is downloaded.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt")
_OLD_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_SUBFOLDERS = ("*/*",)  # such as the checkpoints of a training run; not downloaded


def local_folder(
    name: str | Path, *, revision: str = "main", download_dir: str | None = None, token: str | None = None
) -> str:
    """Download a diffusion model or adapter from the Hub and return its folder; return any other name unchanged.

    A repository counts as a diffusion model if it holds diffusion_config.json or the config.json of a family such as
    LLaDA.

    Args:
        name: a folder, or a name on the Hub.
        revision: revision of the repository.
        download_dir: folder for downloads; by default Hugging Face's cache.
        token: access token for the Hub.
    Raises:
        ValueError: if the files cannot be downloaded, or the model is not supported.
    """
    name = str(name)
    if Path(name).is_dir() or not may_be_on_hub(name):
        return name
    download_args: dict[str, Any] = {"revision": revision, "cache_dir": download_dir, "token": token}
    if not _is_diffusion_model(name, download_args):
        return name
    try:
        folder = Path(_download(name, _FILES, download_args))
        if not any(folder.glob("*.safetensors")):
            _download(name, _OLD_WEIGHTS, download_args)
        return str(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the files of the diffusion model {name} could not be downloaded ({first_line(error)}); check the "
            "connection, or download them yourself and give their folder"
        ) from error


def _is_diffusion_model(name: str, download_args: dict[str, Any]) -> bool:
    """Tell whether a repository holds diffusion_config.json, or the config.json of a family.

    Raises:
        ValueError: if the family does not support its config.json, before its weights are downloaded.
    """
    try:
        if cached_file(name, FILE_NAME, _raise_exceptions_for_missing_entries=False, **download_args) is not None:
            return True
        config = cached_file(name, "config.json", **download_args)
        raw = {} if config is None else raw_config(Path(config).parent)
    except (OSError, ValueError):  # LLaMA-Factory then looks for the model, and reports the error
        return False
    family = detect_family(raw)
    if family is not None:
        family.checked_config(raw)
    return family is not None


def _download(name: str, patterns: tuple[str, ...], download_args: dict[str, Any]) -> str:
    """Download the matching files of a repository's top folder, and return that folder."""
    return snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(_SUBFOLDERS), **download_args)


def origin_of(folder: str | Path) -> str:
    """Return the Hub name of a folder that is the newest download of a repository; any other folder unchanged.

    Adapters record this name as their base model, since it is valid on another machine.
    """
    snapshot = Path(folder)
    name = repository_of(snapshot)
    if name is None or snapshot.parents[2] != Path(HF_HUB_CACHE):
        return str(folder)
    newest = snapshot.parents[1] / "refs" / "main"
    is_newest = newest.is_file() and newest.read_text(encoding="utf-8") == snapshot.name
    return name if is_newest else str(folder)


def repository_of(folder: str | Path) -> str | None:
    """Return owner/name for a path CACHE/models--owner--name/snapshots/REVISION, None for any other path.

    The path need not exist.
    """
    path = Path(folder)
    kind, *name_parts = path.parents[1].name.split("--") if path.parent.name == "snapshots" else [""]
    return "/".join(name_parts) if kind == "models" else None


def may_be_on_hub(name: str) -> bool:
    """Tell whether `name` has the form of a Hub name, such as gpt2 or owner/name, and is not in a local folder."""
    owner, _, repository = name.partition("/")
    if not repository:
        return True
    return "/" not in repository and not name.startswith((".", "/", "~")) and not Path(owner).is_dir()
