"""Checks that a checkpoint is complete, by headers and sizes; and loading of weights with exact names."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..modeling.diffusion_config import FILE_NAME, DiffusionConfig

# In the order in which transformers searches for them.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_FOLDER = re.compile(r"checkpoint-(\d+)")
_ZIPPED = ("optimizer.pt", "scheduler.pt", "training_args.bin")
# DeepSpeed and FSDP keep the optimizer in folders of their own.
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*", "rank*-of-*-optimizer.pt")
_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # the magic number of torch.save's old format
_LISTED = 8
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class BrokenCheckpointError(ValueError):
    """A checkpoint folder lacks a file, or a file in it is truncated or invalid."""


def verify_checkpoint(folder: str | Path, *, resume: bool = False) -> None:
    """Check that every file of a checkpoint exists and is complete, by headers and sizes, without loading weights.

    Args:
        folder: an ordinary Hugging Face folder.
        resume: also check the files that resuming a training run needs.
    Raises:
        BrokenCheckpointError: naming the file and the fault.
    """
    folder = Path(folder)
    table = _weight_table(folder)
    for path, keys in table.items():
        if path.suffix == ".safetensors":
            _verify_safetensors(path, keys)
        elif not _is_legacy(path):
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{state} is not readable ({error})") from error
    if not (folder / FILE_NAME).is_file():
        raise BrokenCheckpointError(
            f"{folder / FILE_NAME} is missing: not a checkpoint of a diffusion stage, or not saved to the end"
        )
    if not any(any(folder.glob(pattern)) for pattern in _OPTIMIZER):
        raise BrokenCheckpointError(
            f"{folder} holds no optimizer.pt, so training would go on with a fresh optimizer: it was saved with "
            "save_only_model: true, or is no checkpoint-N folder; start a new run from it with model_name_or_path"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of `folder`; all of them exist.

    Raises:
        BrokenCheckpointError: if there are none, or a file that the index names is missing.
    """
    return list(_weight_table(folder))


def _weight_table(folder: Path) -> dict[Path, set[str]]:
    """Return each file of weights with the keys that the index lists for it; the set is empty without an index.

    If there are several candidates, the first in transformers' search order counts.
    """
    named = _named_by_config(folder)
    for name in named or (*_NAMES, *_ADAPTER):
        if not (folder / name).is_file():
            continue
        return _shards(folder, folder / name) if name.endswith(".index.json") else {folder / name: set()}
    if named:
        raise BrokenCheckpointError(f"{folder / 'config.json'} names {named[0]}, not found there; copy it again")
    shards = sorted(path.name for path in folder.glob("*-of-*.safetensors"))
    if shards:
        raise BrokenCheckpointError(
            f"{folder} holds {shards[0]} but no model.safetensors.index.json, which says what each shard holds; "
            "download or copy it again"
        )
    if (folder / "adapter_config.json").is_file():
        raise BrokenCheckpointError(
            f"{folder} holds adapter_config.json but no weights of an adapter (none of {', '.join(_ADAPTER)}); copy "
            "or save it again"
        )
    raise BrokenCheckpointError(f"{folder} holds no weights (none of {', '.join(_NAMES)})")


def _named_by_config(folder: Path) -> tuple[str, ...]:
    """Return the file of weights that config.json names, which transformers reads instead of the usual ones.

    Raises:
        BrokenCheckpointError: if it is not a file name within this folder.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # an adapter has no config.json; other code reports a broken one
        return ()
    name = raw.get("transformers_weights") if isinstance(raw, dict) else None
    return () if name is None else (_own_file(folder / "config.json", name),)


def _own_file(source: Path, name: Any) -> str:
    """Return `name`, which the file `source` refers to, if it is a bare file name.

    Anything else is refused, as a downloaded folder could otherwise name any file of the machine. Links are followed:
    in the hub's cache every file is one.

    Raises:
        BrokenCheckpointError: if `name` is not a bare file name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BrokenCheckpointError(
            f"{source} names {name!r}, which is not a file name within its folder; download the folder again from a "
            "source that you trust, or do not use it"
        )
    return name


def _shards(folder: Path, index: Path) -> dict[Path, set[str]]:
    """Return each file that an index names, with the keys that it lists for the file."""
    table: dict[Path, set[str]] = {}
    try:
        for key, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            table.setdefault(folder / _own_file(index, shard), set()).add(key)
    except BrokenCheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{index} is not a readable index of weights ({error})") from error
    missing = [path.name for path in table if not path.is_file()]
    if missing or not table:
        raise BrokenCheckpointError(
            f"{index} names {', '.join(missing) or 'no shard'}, not found in {folder}; download or copy it again"
        )
    return table


def _verify_safetensors(path: Path, keys: set[str]) -> None:
    """Check the header, that the file has exactly the size that the header gives, and that it holds `keys`."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > size:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(header_length))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{path} is not a safetensors file ({error}); copy or save it again") from error
    expected = 8 + header_length + max(ends, default=0)
    if size != expected:
        raise BrokenCheckpointError(
            f"{path} has {size} bytes, its header says {expected}: truncated or altered; copy or save it again"
        )
    try:
        with safe_open(path, framework="pt"):  # checks shapes, types and gaps; reads no tensor
            pass
    except SafetensorError as error:
        raise BrokenCheckpointError(f"{path} is not a safetensors file ({error}); copy or save it again") from error
    absent = sorted(keys - header.keys())
    if absent:
        raise BrokenCheckpointError(
            f"{path} lacks {some(absent)}, which the index places there: not of the same save; copy or save it again"
        )


def _is_legacy(path: Path) -> bool:
    """Tell whether `path` has the format of torch.save before 1.6, which has no directory to check."""
    with open(path, "rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY


def _verify_zip(path: Path) -> None:
    """Check the directory at the end of a zip file, the format of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            whole = bool(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        whole = False
    if not whole:
        raise BrokenCheckpointError(f"{path} is truncated or not a file that torch.save wrote; copy or save it again")


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete `checkpoint-N` of `output_dir`, and newer, broken ones with their faults."""
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


def stored_dtype(folder: str | Path) -> torch.dtype:
    """Return the floating dtype of the weights in `folder`, from its first file.

    Raises:
        BrokenCheckpointError: if a file is missing, truncated or holds no floating weights.
    """
    path = weight_files(Path(folder))[0]
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                found = [_FLOATS.get(file.get_slice(key).get_dtype()) for key in file.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise BrokenCheckpointError(f"{path} is truncated or altered ({error}); copy it again") from error
    else:
        found = [value.dtype if value.is_floating_point() else None for value in read_weights(path).values()]
    for dtype in found:
        if dtype is not None:
            return dtype
    raise BrokenCheckpointError(f"{path} holds no floating-point weights")


def load_weights(model: nn.Module, folder: str | Path, *, rename: Callable[[str], str | None] | None = None) -> None:
    """Load the weights of a folder into `model`; every key must match exactly.

    Args:
        model: receives the weights in its own dtype; tied weights may be absent from the files.
        folder: holds safetensors or `.bin` weights, whole or sharded.
        rename: returns the model's name of a key in the files, or None to skip it.
    Raises:
        BrokenCheckpointError: if a file is missing or truncated.
        ValueError: if a key is missing or unexpected, a shape differs, or tied weights differ in the files, listing
            them. The model is then unchanged.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(Path(folder)):
        part = read_weights(path)
        if rename is not None:
            part = {name: value for key, value in part.items() if (name := rename(key)) is not None}
        twice = sorted(state.keys() & part.keys())
        if twice:
            raise BrokenCheckpointError(f"{path} repeats {some(twice)} of another shard; copy or save them again")
        state.update(part)
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError(f"{type(model).__name__} is on the meta device, which holds no weights; load it with memory")
    missing = [key for key in own if key not in state and not _has_twin(key, own, state)]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    faults = [f"missing {some(missing)}"] if missing else []
    faults += [f"unexpected {some(unexpected)}"] if unexpected else []
    faults += [f"of another shape {some(shapes)}"] if shapes else []
    if not faults:
        untied = _untied(own, state)
        faults += [f"tied in the model but different in the files {some(untied)}"] if untied else []
    if faults:
        raise ValueError(
            f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(faults)}. "
            "model_name_or_path must be the model that checkpoint_dir was trained from"
        )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights onto the CPU.

    Raises:
        BrokenCheckpointError: if it cannot be read, or does not hold tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read ({error}); copy or save it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BrokenCheckpointError(f"{path} must hold a dict of tensors by name, and holds something else")
    return state


def read_weight(path: Path, key: str) -> Tensor:
    """Read one weight of a file onto the CPU; from a safetensors file, nothing else is read."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    return read_weights(path)[key]


def _has_twin(key: str, own: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Tell whether `key` shares memory with a key in the files, as a tied output embedding does."""
    return any(other != key and other in state and _are_tied(own[other], own[key]) for other in own)


def _untied(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Return pairs of keys that share memory in the model but differ in the files."""
    seen: dict[tuple[int, torch.Size], str] = {}
    untied = []
    for key in state:
        first = seen.setdefault((own[key].data_ptr(), own[key].shape), key)
        if first != key and _are_tied(own[first], own[key]) and not torch.equal(state[first], state[key]):
            untied.append(f"{first} and {key}")
    return untied


def _are_tied(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors share their memory, as tied weights do; empty tensors have none."""
    return one.data_ptr() == other.data_ptr() != 0 and one.shape == other.shape and one.device == other.device


def some(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def keys_of(path: Path) -> list[str]:
    """Return the names of the weights in a file."""
    return list(shapes_of(path))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each weight in a file."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return {key: tuple(value.shape) for key, value in read_weights(path).items()}


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]
