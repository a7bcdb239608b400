"""Detection of the layout of a folder's weights: a published layout, or Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .diffullama import DIFFUGPT, LAYOUTS, WRAPPED_LLAMA, Layout
from .families import MODEL_FAMILIES, WeightNames, detect_family, raw_config
from .weights import ADAPTER_PREFIX, keys_of, shapes_of, weight_files

AnyLayout = Layout | WeightNames


def layout_of(keys: Iterable[str]) -> AnyLayout | None:
    """Return the published layout that has these names of weights, or None for Hugging Face's own."""
    bare = {key.removeprefix(ADAPTER_PREFIX) for key in keys}
    if any(key.startswith("denoise_model.layers.") for key in bare):
        return WRAPPED_LLAMA
    if any(key.startswith("denoise_model.") for key in bare):
        return DIFFUGPT
    families = (MODEL_FAMILIES.get(name).weight_names for name in MODEL_FAMILIES)
    return next((names for names in families if names is not None and names.is_published(bare)), None)


def layout_of_folder(folder: str | Path) -> AnyLayout | None:
    """Return the published layout of a folder's weights, or None for Hugging Face's own.

    Raises:
        BrokenCheckpointError: if the folder holds no weights.
    """
    return layout_of(key for path in weight_files(Path(folder)) for key in keys_of(path))


def stored_num_embeddings(folder: str | Path, layout: AnyLayout | None) -> int:
    """Return the number of input embeddings in a folder's weights, 0 if the files hold none."""
    names = {published.embedding + "weight" for published in LAYOUTS.values()}
    for path in weight_files(Path(folder)):
        for key, shape in shapes_of(path).items():
            if (key if layout is None else layout.to_standard(key)) in names:
                return shape[0]
    return 0


def is_model_folder(folder: str | Path) -> bool:
    """Tell whether Hugging Face's Auto classes can load the folder's model; registered families count."""
    return (Path(folder) / "config.json").is_file() and unreadable_layout(folder) is None


def unreadable_layout(folder: str | Path) -> AnyLayout | None:
    """Return the published layout of a folder's weights if Hugging Face's Auto classes cannot load it, else None."""
    layout = layout_of_folder(folder)
    family = detect_family(raw_config(folder))
    return None if family is not None and layout == family.weight_names else layout
