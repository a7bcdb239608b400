"""Diffusion models that a hub holds: their folder in Hugging Face's cache, and the name that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils.hub import cached_file

from ..modeling.diffusion_config import FILE_NAME
from .families import detect_family, raw_config
from .weights import first_line

# Weights, config and tokenizer; nothing else is downloaded, code least of all.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt")
_OLD_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_SUBFOLDERS = ("*/*",)  # such as the checkpoints of a training run


def local_folder(
    name: str | Path, *, revision: str = "main", download_dir: str | None = None, token: str | None = None
) -> str:
    """Return the folder that a diffusion model or adapter on a hub is downloaded to; any other name as it is.

    The files beside its weights are needed as well: diffusion_config.json, or the config.json of a family such as
    LLaDA.

    Args:
        name: a folder, or a name on Hugging Face's hub.
        revision: of the latter.
        download_dir: where the hub's files are kept; by default where Hugging Face keeps them.
        token: for the hub.
    Raises:
        ValueError: if the files cannot be downloaded.
    """
    name = str(name)
    if Path(name).is_dir() or not may_be_on_a_hub(name):
        return name
    where: dict[str, Any] = {"revision": revision, "cache_dir": download_dir, "token": token}
    if not _is_diffusion_model(name, where):
        return name
    try:
        folder = Path(_download(name, _FILES, where))
        if not any(folder.glob("*.safetensors")):
            _download(name, _OLD_WEIGHTS, where)
        return str(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is a diffusion model, and its files could not be downloaded ({first_line(error)}); check the "
            "connection, or download it and name its folder"
        ) from error


def _is_diffusion_model(name: str, where: dict[str, Any]) -> bool:
    """Tell whether a repository holds diffusion_config.json, or the config.json of a family."""
    try:
        if cached_file(name, FILE_NAME, _raise_exceptions_for_missing_entries=False, **where) is not None:
            return True
        config = cached_file(name, "config.json", **where)
        return config is not None and detect_family(raw_config(Path(config).parent)) is not None
    except (OSError, ValueError):  # upstream looks for it too, and reports the fault
        return False


def _download(name: str, files: tuple[str, ...], where: dict[str, Any]) -> str:
    """Download the files of a repository's top folder that match, and return that folder."""
    return snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(_SUBFOLDERS), **where)


def origin_of(folder: str | Path) -> str:
    """Return the hub's name of a folder that is the newest download of a repository; any other folder as it is.

    This is what adapters name as their base model: another machine finds it.
    """
    snapshot = Path(folder)
    name = repository_of(snapshot)
    if name is None or snapshot.parents[2] != Path(HF_HUB_CACHE):
        return str(folder)
    newest = snapshot.parents[1] / "refs" / "main"
    is_newest = newest.is_file() and newest.read_text(encoding="utf-8") == snapshot.name
    return name if is_newest else str(folder)


def repository_of(folder: str | Path) -> str | None:
    """Return owner/name of a folder CACHE/models--owner--name/snapshots/REVISION, None for any other.

    The folder need not exist.
    """
    path = Path(folder)
    kind, *words = path.parents[1].name.split("--") if path.parent.name == "snapshots" else [""]
    return "/".join(words) if kind == "models" else None


def may_be_on_a_hub(name: str) -> bool:
    """Tell whether `name` looks like gpt2 or owner/name; any other path can only be a folder."""
    owner, _, rest = name.partition("/")
    if not rest:
        return True
    return "/" not in rest and not name.startswith((".", "/", "~")) and not Path(owner).is_dir()
