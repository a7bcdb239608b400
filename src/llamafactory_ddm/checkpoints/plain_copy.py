"""Models by name: one of ours on a hub becomes its folder; a published LLaDA or Dream a plain copy, made once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]
from transformers.utils.hub import cached_file

from ..modeling.diffusion_config import FILE_NAME
from .convert import convert
from .llada_dream import OwnCode, kind_of, raw_config
from .rename import first_line
from .weights import verify_checkpoint, weight_files

CACHE = "LLAMAFACTORY_DDM_CACHE"
ORIGIN_NAME = "converted_from.json"
# To be raised when `convert` makes something else of a LLaDA or Dream.
_CONVERSION = 2
# Weights, config and tokenizer; of a hub nothing else is fetched, code least of all.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt")
_OLD_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
_SUBFOLDERS = ("*/*",)  # such as the checkpoints of a training run
_BESIDE_WEIGHTS = 2**26  # bytes: config and tokenizer
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Published:
    """A folder as it was published.

    Attributes:
        folder: its absolute path.
        kind: see there.
        name: by which the result is to be known.
        origin: path or hub name under which a later run finds it.
    """

    folder: Path
    kind: OwnCode
    name: str
    origin: str


def plain_folder(
    name: str | Path,
    *,
    revision: str = "main",
    download_dir: str | None = None,
    token: str | None = None,
    say: Callable[[str], None] = _logger.warning,
) -> str:
    """Return where transformers finds a model: `name` itself, or the folder of one that is a diffusion model.

    A model or adapter of this package on a hub is downloaded, as its diffusion_config.json is read beside its
    weights. Of a LLaDA or Dream a plain copy is made the first time, in `cache_root()`; other processes wait for it.
    None of the published code is run, and a model of another kind is not touched.

    Args:
        name: a folder, or a name on Hugging Face's hub.
        revision: of the latter.
        download_dir: where the hub's files are kept; by default where Hugging Face keeps them.
        token: for the hub.
        say: called before a copy is made.
    Raises:
        ValueError: if the files cannot be had or do not fit their config, or the copy has no room; nothing is left of
            it.
        OSError: if the copy cannot be written.
    """
    ours = None if Path(name).is_dir() else _downloaded(str(name), revision, download_dir, token)
    if ours is not None:
        return str(ours)
    found = _published(name, revision, download_dir, token)
    if found is None:
        return str(name)
    root = cache_root()
    target = root / f"{found.name}-{_fingerprint(found.folder)}"
    if _is_whole(target):
        return str(target)
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(root / f".{target.name}.lock"))
        except OSError as error:
            raise ValueError(
                f"{name} is {found.kind.name} as it was published, and {root}, where a plain copy is to be made, "
                f"cannot be written ({error}); set {CACHE} to a folder that can"
            ) from error
        if not _is_whole(target):
            _make(found, target, say)
    return str(target)


def cache_root() -> Path:
    """Return the folder for plain copies: $LLAMAFACTORY_DDM_CACHE, else llamafactory_ddm in Hugging Face's own."""
    return Path(os.environ.get(CACHE) or Path(HF_HOME) / "llamafactory_ddm").expanduser().absolute()


def origin_of(folder: str | Path) -> str:
    """Return the path or name of what a plain copy was made from, or a hub's folder downloaded from.

    Any other folder is its own origin. This is what adapters name as their base model: it outlives the cache.
    """
    path = Path(folder) / ORIGIN_NAME
    if path.is_file():
        return str(json.loads(path.read_text(encoding="utf-8"))["origin"])
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


def _downloaded(name: str, revision: str, download_dir: str | None, token: str | None) -> Path | None:
    """Return the folder of a model or adapter of this package on a hub, or None if it is something else."""
    if not may_be_on_a_hub(name):
        return None
    where: dict[str, Any] = {"revision": revision, "cache_dir": download_dir, "token": token}
    try:
        if cached_file(name, FILE_NAME, _raise_exceptions_for_missing_entries=False, **where) is None:
            return None
    except (OSError, ValueError):  # upstream will look for it too, and say what is wrong
        return None
    try:
        folder = Path(_snapshot(name, _FILES, **where))
        if not any(folder.glob("*.safetensors")):
            _snapshot(name, _OLD_WEIGHTS, **where)
        return folder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is a diffusion model, and its files could not be downloaded ({first_line(error)}); check the "
            "connection, or download it and name its folder"
        ) from error


def _snapshot(name: str, files: tuple[str, ...], **where: Any) -> str:
    """Download the files of a repository's top folder that match, and return that folder."""
    return snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(_SUBFOLDERS), **where)


def _published(name: str | Path, revision: str, download_dir: str | None, token: str | None) -> _Published | None:
    """Return a model that was published with code of its own, its files at hand, or None for any other."""
    if Path(name).is_dir():
        kind = kind_of(raw_config(name))
        folder = Path(name).resolve()  # one copy, however it is named
        return None if kind is None else _Published(folder, kind, folder.name, str(folder))
    if not may_be_on_a_hub(str(name)):
        return None
    try:
        config = cached_file(str(name), "config.json", revision=revision, cache_dir=download_dir, token=token)
        kind = None if config is None else kind_of(raw_config(Path(config).parent))
    except (OSError, ValueError):  # upstream will look for it too, and say what is wrong
        return None
    if kind is None:
        return None
    try:
        folder = Path(_snapshot(str(name), _FILES, revision=revision, cache_dir=download_dir, token=token))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} is {kind.name} as it was published, and its files could not be downloaded ({first_line(error)})"
        ) from error
    is_usual = revision == "main" and download_dir is None
    return _Published(folder, kind, str(name).rpartition("/")[2], str(name) if is_usual else str(folder))


def _fingerprint(folder: Path) -> str:
    """Return a short name of the files in a folder, other if one of them is exchanged."""
    paths = {path for pattern in (*_FILES, "*.bin") for path in folder.glob(pattern) if path.is_file()}
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return hashlib.sha256(json.dumps([_CONVERSION, str(folder), files]).encode()).hexdigest()[:12]


def _is_whole(target: Path) -> bool:
    """Tell whether a copy is there and nothing of it was lost since it was made."""
    if not (target / ORIGIN_NAME).is_file():
        return False
    try:
        verify_checkpoint(target)
        written = json.loads((target / ORIGIN_NAME).read_text(encoding="utf-8"))["files"]
        return {name: (target / name).stat().st_size for name in written} == written and bool(origin_of(target))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return False


def _make(found: _Published, target: Path, say: Callable[[str], None]) -> None:
    """Make the copy; the caller holds its lock.

    Raises:
        ValueError: if there is no room, or what is to be copied is not whole.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    for path in list(target.parent.iterdir()):
        # What a killed process has left (`convert` writes beside its target), or what has lost a file.
        if path == target or path.name.startswith((unfinished.name, f".{unfinished.name}")):
            shutil.rmtree(path)
    needed = sum(path.stat().st_size for path in weight_files(found.folder)) + _BESIDE_WEIGHTS
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise ValueError(
            f"{found.origin} is {found.kind.name} as it was published; a plain copy of it takes {_size(needed)}, and "
            f"{target.parent} has {_size(free)} left; free some, or set {CACHE} to a folder on a larger disk"
        )
    say(
        f"{found.origin} is {found.kind.name} as it was published, with code of its own. Without running that, a "
        f"plain model is made of it, once, in {target} ({_size(needed)}; {CACHE} names another place). "
        f"llamafactory-ddm convert {found.folder} OUT makes the same in a folder of your choice."
    )
    try:
        convert(found.folder, unfinished)
        files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        origin = {"origin": found.origin, "folder": str(found.folder), "files": files}
        (unfinished / ORIGIN_NAME).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.0f} MB"
