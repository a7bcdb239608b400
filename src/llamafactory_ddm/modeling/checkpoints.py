"""Telling a complete checkpoint from a truncated one, cheaply, and reading weights with an exact key table."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .diffusion_config import FILE_NAME, DiffusionConfig

_SINGLE, _INDEX = (
    ("model.safetensors", "pytorch_model.bin"),
    ("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_FOLDER = re.compile(r"checkpoint-(\d+)")
_ZIPPED = ("optimizer.pt", "scheduler.pt", "training_args.bin")
_LISTED = 8


class BrokenCheckpointError(ValueError):
    """A checkpoint folder lacks a file or holds one that is not whole."""


def verify_checkpoint(folder: str | Path, *, resume: bool = False) -> None:
    """Check that every file of a checkpoint is there and whole, by headers and sizes, without loading weights.

    Args:
        folder: an ordinary Hugging Face folder.
        resume: also demand what continuing a training run needs.
    Raises:
        BrokenCheckpointError: naming the file and the fault.
    """
    folder = Path(folder)
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            _verify_safetensors(path)
        else:
            _verify_zip(path)
    try:
        DiffusionConfig.find(folder)
    except ValueError as error:
        raise BrokenCheckpointError(str(error)) from error
    for path in [*(folder / name for name in _ZIPPED), *sorted(folder.glob("rng_state*.pth"))]:
        if path.is_file():
            _verify_zip(path)
    if resume:
        _verify_resumable(folder)


def _verify_resumable(folder: Path) -> None:
    state = folder / "trainer_state.json"
    if not state.is_file():
        raise BrokenCheckpointError(f"{state} is missing: the checkpoint was not saved to the end")
    try:
        if not isinstance(json.loads(state.read_text(encoding="utf-8"))["global_step"], int):
            raise ValueError("no global_step")
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpointError(f"{state} is not readable ({error})") from error
    if not (folder / FILE_NAME).is_file():
        raise BrokenCheckpointError(
            f"{folder / FILE_NAME} is missing: not a checkpoint of a diffusion stage, or not saved to the end"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of `folder`, all of which exist.

    Raises:
        BrokenCheckpointError: if there are none, or one that the index names is missing.
    """
    for name in (*_SINGLE, *_ADAPTER):
        if (folder / name).is_file():
            return [folder / name]
    for name in _INDEX:
        index = folder / name
        if not index.is_file():
            continue
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenCheckpointError(f"{index} is not a readable index of weights ({error})") from error
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing or not shards:
            raise BrokenCheckpointError(f"{index} names {', '.join(missing) or 'no shard'}, not found in {folder}")
        return [folder / shard for shard in shards]
    raise BrokenCheckpointError(f"{folder} holds no weights (none of {', '.join((*_SINGLE, *_INDEX))})")


def _verify_safetensors(path: Path) -> None:
    """Check the header and that the file is exactly as long as the header says."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > size:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(header_length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise BrokenCheckpointError(f"{path} is not a safetensors file ({error}); copy or save it again") from error
    expected = 8 + header_length + max(ends, default=0)
    if size != expected:
        raise BrokenCheckpointError(
            f"{path} has {size} bytes, its header says {expected}: truncated or altered; copy or save it again"
        )


def _verify_zip(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise BrokenCheckpointError(f"{path} is truncated or not a file that torch.save wrote; copy or save it again")


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete `checkpoint-N` of `output_dir`, and the newer ones passed over with what they "
    "lack."""
    root = Path(output_dir)
    found = [
        (int(m.group(1)), path)
        for path in root.glob("checkpoint-*")
        if (m := _FOLDER.fullmatch(path.name)) and path.is_dir()
    ]
    skipped: list[tuple[Path, str]] = []
    for _, path in sorted(found, reverse=True):
        try:
            verify_checkpoint(path, resume=True)
        except BrokenCheckpointError as error:
            skipped.append((path, str(error)))
        else:
            return path, skipped
    return None, skipped


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a folder into `model`; every key must match exactly.

    Args:
        model: gets the weights, in its own dtype; tied weights may be absent from the files.
        folder: with safetensors or `.bin` weights, whole or sharded.
    Raises:
        BrokenCheckpointError: if a file is missing or truncated.
        ValueError: if a key is missing or unexpected or a shape differs, listing them.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(Path(folder)):
        state.update(_read(path))
    own = model.state_dict()
    missing = [key for key in own if key not in state and not _has_twin(key, own, state)]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    faults = [f"missing {_some(missing)}"] * bool(missing) + [f"unexpected {_some(unexpected)}"] * bool(unexpected)
    faults += [f"of another shape {_some(shapes)}"] * bool(shapes)
    if faults:
        raise ValueError(
            f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(faults)}. "
            "model_name_or_path must be the model that checkpoint_dir was trained from"
        )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read ({error}); copy or save it again") from error


def _has_twin(key: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Tell whether `key` shares its memory with a key that the files hold, as a tied output embedding does."""
    return any(own[other].data_ptr() == own[key].data_ptr() and other != key for other in own if other in state)


def _some(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
