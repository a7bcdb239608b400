"""Detection of the layout of a folder's weights: a published one, or Hugging Face's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .diffullama import _ADAPTER_PREFIX, DIFFUGPT, LAYOUTS, WRAPPED_LLAMA, Layout
from .llada_dream import LLADA, LladaLayout
from .weights import keys_of, shapes_of, weight_files

AnyLayout = Layout | LladaLayout


def layout_of(keys: Iterable[str]) -> AnyLayout | None:
    """Return the published layout with these names of weights, or None for Hugging Face's own."""
    bare = {key.removeprefix(_ADAPTER_PREFIX) for key in keys}
    if any(key.startswith("denoise_model.layers.") for key in bare):
        return WRAPPED_LLAMA
    if any(key.startswith("denoise_model.") for key in bare):
        return DIFFUGPT
    if any(key.startswith("model.transformer.blocks.") for key in bare):
        return LLADA
    return None


def layout_of_folder(folder: str | Path) -> AnyLayout | None:
    """Return the published layout of a folder's weights, or None for Hugging Face's own.

    Raises:
        BrokenCheckpointError: if the folder holds no weights.
    """
    return layout_of(key for path in weight_files(Path(folder)) for key in keys_of(path))


def stored_num_embeddings(folder: str | Path, layout: AnyLayout | None) -> int:
    """Return the number of input embeddings in a folder's weights, 0 if they are not found."""
    names = {kind.embedding + "weight" for kind in LAYOUTS.values()}
    for path in weight_files(Path(folder)):
        for key, shape in shapes_of(path).items():
            if (key if layout is None else layout.to_standard(key)) in names:
                return shape[0]
    return 0


def is_model_folder(folder: str | Path) -> bool:
    """Tell whether Hugging Face can load the folder's model without a conversion."""
    return (Path(folder) / "config.json").is_file() and layout_of_folder(folder) is None
