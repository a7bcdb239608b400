"""Atomic saving: a kill or a full disk at any moment leaves the old file or checkpoint, or the complete new one."""

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
_OF_ADAPTER = re.compile(r"adapter_(config\.json|model\.(safetensors|bin))")
_OF_MODEL = ("config.json", "generation_config.json")  # beside the weights
_CARD = "README.md"


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of `path` when it is complete and on disk; makes the folder if need be.

    Args:
        path: the file, with the permissions of any new file (umask).
        mode: "w" for UTF-8 text with line feeds, or "wb".
    Raises:
        OSError: if writing fails (disk full, no permission), naming the file; the old file is untouched.
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
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        with suppress(OSError):
            scratch.unlink()


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, which is absent or empty, when all its files are on disk.

    Raises:
        OSError: if writing fails; `target` is as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as private:
        scratch = Path(private) / target.name
        scratch.mkdir()  # with ordinary permissions
        yield scratch
        _flush(scratch)
        if target.exists():
            target.rmdir()
        os.replace(scratch, target)


def _rank(name: str, last: str) -> tuple[int, str]:
    """Order of publication: weights first, then what describes them, `last` at the very end."""
    if name == last:
        return (3, name)
    if name.endswith(".index.json"):
        return (1, name)
    return (0 if _WEIGHTS.fullmatch(name) else 2, name)


@contextmanager
def published_together(folder: str | Path, *, last: str) -> Iterator[Path]:
    """Yield an empty folder inside `folder`; on success its files replace those of the same name in `folder`.

    Every file is complete on disk before the first one is moved, each move is atomic, and what an earlier save left
    that would make another model of the new one is deleted at the end: further weights, an adapter beside a model, a
    model beside an adapter.

    Args:
        folder: where the files end up; made if absent.
        last: name of the file that is moved last, the mark of a complete save.
    Raises:
        OSError: if writing fails (disk full, no permission), naming the folder; what was in `folder` is untouched.
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
    """A file could not be written; the message names the folder and the cure."""


@contextmanager
def explain_disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn the errors of a full disk, of which torch and safetensors have their own, into one that says what to do.

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
            f"could not save to {folder}: {error}. Free some space or choose another output_dir; "
            "checkpoints saved earlier are complete, and resume_from_checkpoint: true continues from the last of them."
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
    misleading = {path.name for path in target.iterdir() if path.name not in names and _misleads(path.name, names)}
    if any(map(_OF_ADAPTER.fullmatch, misleading)) and (target / _CARD).is_file():
        misleading.add(_CARD)  # the adapter's, whose library PEFT is asked to write the next one
    for name in misleading:
        (target / name).unlink()


def _misleads(name: str, saved: list[str]) -> bool:
    """Tell whether a file of an earlier save would be taken for a part of the model or adapter that was saved now."""
    if any(_WEIGHTS.fullmatch(one) for one in saved):
        return bool(_WEIGHTS.fullmatch(name) or _OF_ADAPTER.fullmatch(name))
    if any(_OF_ADAPTER.fullmatch(one) for one in saved):
        return bool(_WEIGHTS.fullmatch(name) or _OF_ADAPTER.fullmatch(name)) or name in _OF_MODEL
    return False
