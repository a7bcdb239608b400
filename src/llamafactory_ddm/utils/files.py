"""Atomic saving: after a kill or a full disk, either the old file or checkpoint is there, or the complete new one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

_PREFIX = ".unfinished-"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_ADAPTER_FILE = re.compile(r"adapter_(config\.json|model\.(safetensors|bin))")
_MODEL_CONFIGS = ("config.json", "generation_config.json")
_CARD = "README.md"


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when it is complete and on disk; create the folder if it is absent.

    One process at a time may write a path.

    Args:
        path: the file; it gets the permissions of a new file (umask).
        mode: "w" for UTF-8 text with line feeds, or "wb".
    Raises:
        OSError: if writing fails (disk full, no permission), naming the file; the old file is unchanged.
    """
    path = Path(path)
    scratch = path.with_name(f"{path.name}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)  # not set when the disk is full
        raise
    finally:
        with suppress(OSError):
            scratch.unlink()


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when all its files are on disk; `target` must be absent or empty.

    Raises:
        OSError: if writing fails; `target` is unchanged.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as parent:
        scratch = Path(parent) / target.name
        scratch.mkdir()  # with ordinary permissions
        yield scratch
        _flush(scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)


def _rank(name: str, last: str) -> tuple[int, str]:
    """Sort key for moving files: weights first, then their index, then other files, `last` at the end."""
    if name == last:
        return (3, name)
    if name.endswith(".index.json"):
        return (1, name)
    return (0 if _WEIGHTS.fullmatch(name) else 2, name)


@contextmanager
def published_together(folder: str | Path, *, last: str) -> Iterator[Path]:
    """Yield an empty folder inside `folder`; on success its files replace those of the same name in `folder`.

    Every file is complete on disk before the first one is moved, and each move is atomic. At the end, files of an
    earlier save that would be loaded together with the new ones are deleted: other weights, an adapter beside a new
    model, a model beside a new adapter.

    Args:
        folder: destination of the files; created if absent.
        last: name of the file that is moved last and so marks a complete save.
    Raises:
        OSError: if writing fails (disk full, no permission), naming the folder; the files in `folder` are unchanged.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob(f"{_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target))
    try:
        with explain_disk_errors(target):
            yield scratch
            _flush(scratch)
            _move(scratch, target, last)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class CouldNotSave(OSError):
    """A file could not be written; the message names the folder and what to do."""


_REMEDIES = {
    "output_dir": "Earlier checkpoints are complete: resume_from_checkpoint: true continues from the last one",
    "tokenized_path": "What is finished is kept, and the same command goes on",
}


@contextmanager
def explain_disk_errors(folder: str | Path, *, key: str = "output_dir") -> Iterator[None]:
    """Turn the errors of a full disk, including those of torch and safetensors, into one that says what to do.

    Args:
        folder: where the block writes.
        key: the key that names it, output_dir or tokenized_path.
    Raises:
        CouldNotSave: naming `folder`.
    """
    try:
        yield
    except CouldNotSave:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "file" not in str(error):
            raise
        raise CouldNotSave(
            f"could not save to {folder}: {error}; free disk space or choose another {key}. {_REMEDIES[key]}"
        ) from error


def _flush(scratch: Path) -> None:
    for path in scratch.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _move(scratch: Path, target: Path, last: str) -> None:
    names = sorted(
        (p.relative_to(scratch).as_posix() for p in scratch.rglob("*") if p.is_file()), key=lambda n: _rank(n, last)
    )
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(scratch / name, target / name)
    outdated = {path.name for path in target.iterdir() if path.name not in names and _is_outdated(path.name, names)}
    if any(map(_ADAPTER_FILE.fullmatch, outdated)) and (target / _CARD).is_file():
        outdated.add(_CARD)  # the card of the old adapter, which PEFT would update
    for name in outdated:
        (target / name).unlink()


def _is_outdated(name: str, saved: list[str]) -> bool:
    """Tell whether a file of an earlier save would be loaded as part of the model or adapter that was just saved."""
    if any(_WEIGHTS.fullmatch(file) for file in saved):
        return bool(_WEIGHTS.fullmatch(name) or _ADAPTER_FILE.fullmatch(name))
    if any(_ADAPTER_FILE.fullmatch(file) for file in saved):
        return bool(_WEIGHTS.fullmatch(name) or _ADAPTER_FILE.fullmatch(name)) or name in _MODEL_CONFIGS
    return False
