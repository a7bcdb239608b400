"""Renaming of weights: checks of their names, and rewriting of safetensors files without loading their weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from .layouts import AnyLayout
from .weights import abbreviated, first_line, read_weights, shapes_of, weight_files

_CHUNK_BYTES = 2**24


def write_renamed(source: Path, target: Path, rename: Callable[[str], str | None]) -> dict[str, int]:
    """Copy a safetensors file bit for bit with new names of weights, a few MB at a time.

    Args:
        source: a file that `verify_checkpoint` has checked.
        target: the file to write.
        rename: returns the new name of a weight, or None to drop the weight.
    Returns:
        The new names with their sizes in bytes.
    Source: the safetensors format, a JSON header followed by the weights.
    """
    with open(source, "rb") as old, open(target, "wb") as new:
        (length,) = struct.unpack("<Q", old.read(8))
        header: dict[str, Any] = json.loads(old.read(length))
        header.pop("__metadata__", None)
        data_start = 8 + length
        entries: dict[str, Any] = {}
        ranges: list[tuple[int, int]] = []
        offset = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            name = rename(key)
            if name is None:
                continue
            begin, end = entry["data_offsets"]
            entries[name] = {**entry, "data_offsets": [offset, offset + end - begin]}
            ranges.append((data_start + begin, data_start + end))
            offset += end - begin
        new_header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        new_header += b" " * (-len(new_header) % 8)
        new.write(struct.pack("<Q", len(new_header)) + new_header)
        for begin, end in ranges:
            _copy(old, new, begin, end)
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}


def _copy(old: BinaryIO, new: BinaryIO, begin: int, end: int) -> None:
    old.seek(begin)
    while begin < end:
        chunk = old.read(min(_CHUNK_BYTES, end - begin))
        if not chunk:
            raise ValueError(f"{old.name} is shorter than its header says; copy or download it again")
        new.write(chunk)
        begin += len(chunk)


def renamer(layout: AnyLayout | None, published: AnyLayout | None) -> Callable[[str], str | None]:
    """Return the function that renames keys of `layout` to `published`; None stands for Hugging Face's layout."""
    if published is not None:
        return published.to_published
    return (lambda key: key) if layout is None else layout.to_standard


def write_weights(source: Path, scratch: Path, rename: Callable[[str], str | None]) -> None:
    """Write each file of weights to `scratch` as safetensors with new names."""
    files = weight_files(source)
    index: dict[str, str] = {}
    total_size = 0
    for path in files:
        stem = path.name.replace("pytorch_model", "model") if path.suffix == ".bin" else path.name
        name = Path(stem).with_suffix(".safetensors").name
        if path.suffix == ".safetensors":
            sizes = write_renamed(path, scratch / name, rename)
        else:
            weights = {key: value.contiguous().clone() for key, value in _read_renamed(path, rename).items()}
            save_file(weights, scratch / name, metadata={"format": "pt"})
            sizes = {key: value.numel() * value.element_size() for key, value in weights.items()}
        index |= dict.fromkeys(sizes, name)
        total_size += sum(sizes.values())
    if len(files) > 1:
        table = {"metadata": {"total_size": total_size}, "weight_map": index}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _read_renamed(path: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    renamed = {rename(key): value for key, value in read_weights(path).items()}
    return {key: value for key, value in renamed.items() if key is not None}


def check_keys(source: Path, layout: AnyLayout | None, config: Any) -> None:
    """Check names and shapes in the files against those of the model.

    Raises:
        ValueError: if weights are missing, unexpected, duplicate, or of another shape, listing them.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if is_tied(config) else set()
    _check_shapes(source, layout, expected, optional=tied, model_name=config.model_type)


def _check_shapes(
    source: Path,
    layout: AnyLayout | None,
    expected: dict[str, tuple[int, ...]],
    *,
    optional: set[str],
    model_name: str,
) -> None:
    stored: dict[str, tuple[int, ...]] = {}
    repeated = []
    for path in weight_files(source):
        for key, shape in shapes_of(path).items():
            standard = key if layout is None else layout.to_standard(key)
            if standard is None:
                continue
            if standard in stored:
                repeated.append(standard)
            stored[standard] = shape
    missing = sorted(expected.keys() - stored.keys() - optional)
    unexpected = sorted(stored.keys() - expected.keys())
    shapes = [
        f"{key} {stored[key]} instead of {expected[key]}"
        for key in sorted(stored.keys() & expected.keys())
        if stored[key] != expected[key]
    ]
    faults = {"missing": missing, "unexpected": unexpected, "repeated": repeated, "wrong shape": shapes}
    messages = [f"{fault} {abbreviated(names)}" for fault, names in faults.items() if names]
    if messages:
        raise ValueError(f"the weights in {source} do not fit {model_name}: {'; '.join(messages)}")


def check_adapter_keys(source: Path, layout: AnyLayout | None, settings: dict[str, Any]) -> None:
    """Check names and shapes in the files against those that PEFT gives the adapter on its base model.

    Raises:
        ValueError: if the base has no config, or weights are missing, unexpected or of another shape, listing them.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    base = str(settings.get("base_model_name_or_path"))
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is an adapter of {base}, whose config.json cannot be loaded ({first_line(error)}); name its "
            "base model with --base"
        ) from error
    lora_keys = {field.name for field in fields(LoraConfig)}
    lora = LoraConfig(**{key: value for key, value in settings.items() if key in lora_keys and key != "peft_type"})
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), lora, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {key: tuple(value.shape) for key, value in state.items()}
    _check_shapes(source, layout, expected, optional=set(), model_name=f"an adapter of {base}")


def is_tied(config: Any) -> bool:
    """Tell whether the config ties input and output embedding."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
