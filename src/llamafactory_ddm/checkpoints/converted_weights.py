"""The weights of a checkpoint that is converted: the same values under other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .diffullama import AnyLayout
from .rename import write_renamed
from .weights import read_weights, weight_files


def renamer(layout: AnyLayout | None, published: AnyLayout | None) -> Callable[[str], str | None]:
    """Return what gives a key its new name: of the published layout, or of an ordinary model if that is None."""
    if published is not None:
        return published.to_published
    return (lambda key: key) if layout is None else layout.to_standard


def write_weights(source: Path, scratch: Path, rename: Callable[[str], str | None]) -> None:
    """Write each file of weights anew, as safetensors, with other names."""
    files = weight_files(source)
    index: dict[str, str] = {}
    size = 0
    for path in files:
        stem = path.name.replace("pytorch_model", "model") if path.suffix == ".bin" else path.name
        name = Path(stem).with_suffix(".safetensors").name
        if path.suffix == ".safetensors":
            sizes = write_renamed(path, scratch / name, rename)
        else:
            kept = {key: value.contiguous().clone() for key, value in _kept(path, rename).items()}
            save_file(kept, scratch / name, metadata={"format": "pt"})
            sizes = {key: value.numel() * value.element_size() for key, value in kept.items()}
        index |= dict.fromkeys(sizes, name)
        size += sum(sizes.values())
    if len(files) > 1:
        table = {"metadata": {"total_size": size}, "weight_map": index}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def _kept(path: Path, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    renamed = {rename(key): value for key, value in read_weights(path).items()}
    return {key: value for key, value in renamed.items() if key is not None}
