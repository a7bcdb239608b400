"""Checks that a checkpoint is complete, by headers and sizes, and loading of weights by exact names."""

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

ADAPTER_PREFIX = "base_model.model."  # of the names of an adapter's weights, as PEFT saves them
# In the order in which transformers searches for them.
_MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ZIP_FILES = ("optimizer.pt", "scheduler.pt", "training_args.bin")
# DeepSpeed and FSDP keep the optimizer in folders of their own.
_OPTIMIZER_PATTERNS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*", "rank*-of-*-optimizer.pt")
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # the magic number of torch.save's old format
_MAX_LISTED = 8
_FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class BrokenCheckpointError(ValueError):
    """A checkpoint folder lacks a file, or a file in it is truncated or invalid."""


def verify_checkpoint(folder: str | Path, *, resume: bool = False) -> None:
    """Check that every file of a checkpoint exists and is complete, by headers and sizes, without loading weights.

    Args:
        folder: a Hugging Face folder with a model or an adapter.
        resume: also check the files that resuming a training run needs.
    Raises:
        BrokenCheckpointError: if a file is missing, truncated or invalid, naming it.
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
    for path in [*(folder / name for name in _ZIP_FILES), *sorted(folder.glob("rng_state*.pth"))]:
        if path.is_file():
            _verify_zip(path)
    if resume:
        _verify_resumable(folder)


def _verify_resumable(folder: Path) -> None:
    state = folder / "trainer_state.json"
    if not state.is_file():
        raise BrokenCheckpointError(f"{state} is missing, so saving was interrupted; resume from another checkpoint")
    try:
        if not isinstance(json.loads(state.read_text(encoding="utf-8"))["global_step"], int):
            raise ValueError("no global_step")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{state} is not readable ({error}); resume from another one") from error
    if not (folder / FILE_NAME).is_file():
        raise BrokenCheckpointError(
            f"{folder / FILE_NAME} is missing, so this is no checkpoint of a diffusion stage or saving was "
            "interrupted; resume from another checkpoint"
        )
    if not any(any(folder.glob(pattern)) for pattern in _OPTIMIZER_PATTERNS):
        raise BrokenCheckpointError(
            f"{folder} holds no optimizer.pt, which resuming needs: it was saved with save_only_model: true, or is "
            "not a checkpoint-N folder; start a new run from it with model_name_or_path"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights in `folder`, after checking that they exist.

    Raises:
        BrokenCheckpointError: if `folder` holds no weights, or a file that the index names is missing.
    """
    return list(_weight_table(folder))


def _weight_table(folder: Path) -> dict[Path, set[str]]:
    """Return each file of weights with the keys that the index lists for it; the set is empty without an index.

    Of several candidates, the first in transformers' search order is used.
    """
    named_in_config = _named_by_config(folder)
    for name in named_in_config or (*_MODEL_FILES, *_ADAPTER_FILES):
        if not (folder / name).is_file():
            continue
        return _shards(folder, folder / name) if name.endswith(".index.json") else {folder / name: set()}
    if named_in_config:
        raise BrokenCheckpointError(
            f"{folder / 'config.json'} names {named_in_config[0]}, which is not in its folder; copy that file again"
        )
    shards = sorted(path.name for path in folder.glob("*-of-*.safetensors"))
    if shards:
        raise BrokenCheckpointError(
            f"{folder} holds {shards[0]} but no model.safetensors.index.json, which lists the weights of each shard; "
            "download or copy the folder again"
        )
    if (folder / "adapter_config.json").is_file():
        raise BrokenCheckpointError(
            f"{folder} holds adapter_config.json but no adapter weights (none of {', '.join(_ADAPTER_FILES)}); copy "
            "or save the adapter again"
        )
    raise BrokenCheckpointError(
        f"{folder} holds no weights (none of {', '.join(_MODEL_FILES)}); check the path, or copy the weights again"
    )


def _named_by_config(folder: Path) -> tuple[str, ...]:
    """Return the file of weights that config.json names in `transformers_weights`, or nothing.

    Transformers reads this file instead of the usual ones.

    Raises:
        BrokenCheckpointError: if it is not a bare file name.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # adapters have none; a broken one is reported elsewhere
        return ()
    name = raw.get("transformers_weights") if isinstance(raw, dict) else None
    return () if name is None else (_bare_file_name(folder / "config.json", name),)


def _bare_file_name(source: Path, name: Any) -> str:
    """Return `name`, read from the file `source`, after checking that it is a bare file name.

    Otherwise a downloaded folder could name any file on the machine. Symbolic links are followed, as every file in
    the Hub's cache is one.

    Raises:
        BrokenCheckpointError: if `name` is not a bare file name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise BrokenCheckpointError(
            f"{source} names {name!r}, and may name only files of its own folder; download the folder from a source "
            "that you trust"
        )
    return name


def _shards(folder: Path, index: Path) -> dict[Path, set[str]]:
    """Return each file that an index names, with the keys that it lists for the file."""
    table: dict[Path, set[str]] = {}
    try:
        for key, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            table.setdefault(folder / _bare_file_name(index, shard), set()).add(key)
    except BrokenCheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(
            f"{index} is not a readable index of weights ({error}); download or copy it again"
        ) from error
    missing = [path.name for path in table if not path.is_file()]
    if missing or not table:
        raise BrokenCheckpointError(
            f"{index} names {', '.join(missing) or 'no shard'}, not found in {folder}; download or copy it again"
        )
    return table


def _verify_safetensors(path: Path, keys: set[str]) -> None:
    """Check that the header is valid, gives exactly the size of the file, and lists `keys`."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (header_length,) = struct.unpack("<Q", file.read(8))
            if header_length > size:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(header_length))
        end_offsets = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{path} is not a safetensors file ({error}); copy or save it again") from error
    expected = 8 + header_length + max(end_offsets, default=0)
    if size != expected:
        raise BrokenCheckpointError(
            f"{path} has {size} bytes, but {expected} according to its header; copy or save it again"
        )
    try:
        with safe_open(path, framework="pt"):  # checks shapes, dtypes and gaps; reads no tensor
            pass
    except SafetensorError as error:
        raise BrokenCheckpointError(f"{path} is not a safetensors file ({error}); copy or save it again") from error
    missing = sorted(keys - header.keys())
    if missing:
        raise BrokenCheckpointError(
            f"{path} lacks {abbreviated(missing)}, which the index lists for it; copy or save both again"
        )


def _is_legacy(path: Path) -> bool:
    """Tell whether `path` has the format of torch.save before PyTorch 1.6, which is not a zip file."""
    with open(path, "rb") as file:
        return file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC


def _verify_zip(path: Path) -> None:
    """Check the directory at the end of a zip file, the format of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            is_complete = bool(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        is_complete = False
    if not is_complete:
        raise BrokenCheckpointError(f"{path} is truncated or not a file that torch.save wrote; copy or save it again")


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest complete `checkpoint-N` in `output_dir`, and the newer broken ones with their errors."""
    root = Path(output_dir)
    checkpoints = [
        (int(m.group(1)), path)
        for path in root.glob("checkpoint-*")
        if (m := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    skipped: list[tuple[Path, str]] = []
    for _, path in sorted(checkpoints, reverse=True):
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
                dtypes = [_FLOAT_DTYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise BrokenCheckpointError(
                f"{path} is not a safetensors file ({error}); copy or save it again"
            ) from error
    else:
        dtypes = [value.dtype if value.is_floating_point() else None for value in read_weights(path).values()]
    for dtype in dtypes:
        if dtype is not None:
            return dtype
    raise BrokenCheckpointError(f"{path} holds no floating-point weights; copy or save it again")


def load_weights(model: nn.Module, folder: str | Path, *, rename: Callable[[str], str | None] | None = None) -> None:
    """Load the weights of a folder into `model`; every key must match exactly.

    Args:
        model: receives the weights in its own dtype; tied weights may be absent from the files.
        folder: holds safetensors or `.bin` weights, whole or sharded.
        rename: returns the model's name for a key in the files, or None to skip the key.
    Raises:
        BrokenCheckpointError: if a file is missing or truncated.
        ValueError: if a key is missing or unexpected, a shape differs, or tied weights differ in the files, listing
            them. The model is then unchanged.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(Path(folder)):
        shard = read_weights(path)
        if rename is not None:
            shard = {name: value for key, value in shard.items() if (name := rename(key)) is not None}
        repeated = sorted(state.keys() & shard.keys())
        if repeated:
            raise BrokenCheckpointError(
                f"{path} repeats {abbreviated(repeated)} of another shard; copy or save them again"
            )
        state.update(shard)
    model_state = model.state_dict()
    if any(value.is_meta for value in model_state.values()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, which holds no weights; create it on another device"
        )
    missing = [key for key in model_state if key not in state and not _has_tied_key(key, model_state, state)]
    unexpected = [key for key in state if key not in model_state]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(model_state[key].shape)}"
        for key in state
        if key in model_state and state[key].shape != model_state[key].shape
    ]
    faults = [f"missing {abbreviated(missing)}"] if missing else []
    faults += [f"unexpected {abbreviated(unexpected)}"] if unexpected else []
    faults += [f"wrong shape {abbreviated(shapes)}"] if shapes else []
    if not faults:
        untied = _untied(model_state, state)
        faults += [f"tied in the model but different in the files: {abbreviated(untied)}"] if untied else []
    if faults:
        raise ValueError(
            f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(faults)}; "
            "model_name_or_path must be the model that checkpoint_dir was trained from"
        )
    with torch.no_grad():
        for key, value in state.items():
            model_state[key].copy_(value)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights onto the CPU.

    Raises:
        BrokenCheckpointError: if it cannot be read, or is not a dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read ({error}); copy or save it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BrokenCheckpointError(
            f"{path} must hold a dict of tensors, got {type(state).__name__}; copy or save it again"
        )
    return state


def read_weight(path: Path, key: str) -> Tensor:
    """Read one weight of a file onto the CPU; only a `.bin` file is read as a whole."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    return read_weights(path)[key]


def _has_tied_key(key: str, model_state: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Tell whether `key` shares memory with a key in the files, as a tied output embedding does."""
    return any(
        other != key and other in state and _are_tied(model_state[other], model_state[key]) for other in model_state
    )


def _untied(model_state: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Return pairs of keys that share memory in the model but differ in the files."""
    seen: dict[tuple[int, torch.Size], str] = {}
    untied = []
    for key in state:
        first = seen.setdefault((model_state[key].data_ptr(), model_state[key].shape), key)
        if (
            first != key
            and _are_tied(model_state[first], model_state[key])
            and not torch.equal(state[first], state[key])
        ):
            untied.append(f"{first} and {key}")
    return untied


def _are_tied(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors share memory, as tied weights do; empty tensors have no memory."""
    return first.data_ptr() == second.data_ptr() != 0 and first.shape == second.shape and first.device == second.device


def abbreviated(names: list[str]) -> str:
    """Return the first names as text, with the number of the others."""
    return ", ".join(names[:_MAX_LISTED]) + (
        f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    )


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
