"""Adapters on disk: their base model, checks that they load as they were trained, and merging."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.embeddings import num_embeddings, resize_embeddings
from ..modeling.lora import embedding_names, tie_again
from .families import find_diffusion_config
from .load_model import load_whole, load_whole_adapter
from .weights import shapes_of, weight_files

ADAPTER_CONFIG = "adapter_config.json"


# Keys in which an adapter and its base model must agree.
_AGREEING = ("mask_token", "mask_token_id", "shift", "noise_schedule")


# Intermediate adapters of pissa_convert: they belong to the residual of a decomposition, not to the base model.
_HALVES = ("pissa_init", "pissa_backup")


_WEIGHTS = ("safetensors", "bin")  # suffixes of files of weights


def holds_model(folder: str | Path) -> bool:
    """Tell whether `folder` holds the weights of a whole model."""
    return any(any(Path(folder).glob(f"{kind}*.{end}")) for kind in ("model", "pytorch_model") for end in _WEIGHTS)


def refuse_both(folder: str | Path) -> None:
    """Refuse a folder that holds both a model and an adapter, as programs differ in which one they load.

    Raises:
        ValueError: if it does, naming the file.
    """
    if (Path(folder) / ADAPTER_CONFIG).is_file() and holds_model(folder):
        raise ValueError(
            f"{folder} holds the weights of a model and an adapter ({ADAPTER_CONFIG}), so it is not known which is "
            "meant: move one of them to another folder, with its own diffusion_config.json and tokenizer"
        )


def base_of(folder: str | Path) -> str:
    """Return the folder or name of the model that an adapter was trained on."""
    return str(_settings(folder)["base_model_name_or_path"])


def _settings(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's adapter_config.json.

    Raises:
        ValueError: if it is not readable, or names no base model.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        named = isinstance(settings["base_model_name_or_path"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        named = False
    if not named:
        raise ValueError(
            f"{path} is not readable, or names no base_model_name_or_path, the model that the adapter was trained on; "
            "copy or save the adapter again"
        )
    return settings


def check_agreement(found: Sequence[tuple[str, DiffusionConfig]]) -> None:
    """Check that adapter, checkpoint and base model have the same diffusion process.

    Args:
        found: folder and config of each that has one, the newest first.
    Raises:
        ValueError: if two disagree, naming both.
    """
    for folder, config in found[1:]:
        for key in _AGREEING:
            ours, theirs = getattr(found[0][1], key), getattr(config, key)
            if ours != theirs:
                raise ValueError(
                    f"{found[0][0]} was trained with {key}: {ours}, but {folder} says {key}: {theirs}; use the "
                    "adapter with the model that it was trained on"
                )


def check_adapter(folder: str | Path) -> None:
    """Check that an adapter loads as it was trained.

    Raises:
        ValueError: if it is part of a PiSSA decomposition whose residual is not the base model.
    """
    folder = Path(folder)
    converted = folder.parent / "pissa_converted" if folder.name in _HALVES else folder / "pissa_converted"
    cure = f"use {converted}" if converted.is_dir() else "train with pissa_convert: true and use its pissa_converted"
    if folder.name in _HALVES:
        raise ValueError(
            f"{folder} is an intermediate adapter of pissa_convert, and on the base model it is not the model that "
            f"was trained; {cure}"
        )
    if str(_settings(folder).get("init_lora_weights")).startswith("pissa_niter"):
        raise ValueError(
            f"{folder} was trained with pissa_init and an approximate decomposition (pissa_iter), which PEFT draws "
            f"again when it loads the adapter: that gives another model than was trained; {cure}, or train with "
            "pissa_iter: -1"
        )


def merged_with_base(folder: str | Path, config: DiffusionConfig, *, base: str, dtype: Any) -> Any:
    """Load the base model of an adapter, and merge the adapter into it.

    Args:
        folder: holds adapter_config.json and the adapter's weights.
        config: the adapter's diffusion config.
        base: folder or name of the base model, as transformers loads it.
        dtype: dtype of the model's weights, as from_pretrained takes it.
    Raises:
        ValueError: if the base model cannot be loaded, or is not the one that the adapter was trained on.
    """
    from peft import PeftModel

    check_adapter(folder)
    config_of_base = find_diffusion_config(base)
    if config_of_base is not None:
        check_agreement([(str(folder), config), (base, config_of_base)])
    try:
        model: Any = load_whole(AutoModelForCausalLM, pretrained_model_name_or_path=base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is an adapter of {base}, which cannot be loaded ({str(error).strip().splitlines()[0]}); start "
            "where that path is right, or change base_model_name_or_path in its adapter_config.json"
        ) from error
    fit_embeddings(model, folder, own=num_embeddings(model))
    merged = load_whole_adapter(PeftModel, model, folder).merge_and_unload()
    tie_again(merged)
    return merged


def fit_embeddings(model: Any, folder: str | Path, *, own: int) -> None:
    """Resize the embeddings of a base model to those that the adapter in `folder` holds, if it holds any.

    Args:
        model: the base model.
        folder: the adapter's folder.
        own: number of embeddings in the saved base model; an adapter with fewer belongs to another model.
    """
    rows = adapter_num_embeddings(model, folder)
    if rows is not None and rows >= own:
        resize_embeddings(model, rows)


def adapter_num_embeddings(model: Any, folder: str | Path) -> int | None:
    """Return the number of embeddings that the adapter in `folder` holds, or None if it holds none."""
    ends = [name for name in embedding_names(model) if name is not None]
    for path in weight_files(Path(folder)):
        for key, shape in shapes_of(path).items():
            for name in ends:
                if key.endswith((f".{name}.weight", f".{name}.lora_B.weight", f".{name}.base_layer.weight")):
                    return shape[0]
    return None
