"""Saved adapters: their base model, checks that they load as they were trained, and merging."""

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
from .weights import first_line, shapes_of, weight_files

ADAPTER_CONFIG = "adapter_config.json"


# Keys whose values must be the same for an adapter and its base model.
_SHARED_KEYS = ("mask_token", "mask_token_id", "shift", "noise_schedule")


# Intermediate adapters of pissa_convert: they fit the residual of a decomposition, not the base model.
_PISSA_INTERMEDIATES = ("pissa_init", "pissa_backup")


_WEIGHT_SUFFIXES = ("safetensors", "bin")


def holds_model(folder: str | Path) -> bool:
    """Tell whether `folder` holds the weights of a whole model."""
    patterns = [f"{stem}*.{suffix}" for stem in ("model", "pytorch_model") for suffix in _WEIGHT_SUFFIXES]
    return any(any(Path(folder).glob(pattern)) for pattern in patterns)


def check_model_or_adapter(folder: str | Path) -> None:
    """Check that a folder does not hold both a model and an adapter: programs differ in which one they load.

    Raises:
        ValueError: if it holds both.
    """
    if (Path(folder) / ADAPTER_CONFIG).is_file() and holds_model(folder):
        raise ValueError(
            f"{folder} holds both the weights of a model and an adapter ({ADAPTER_CONFIG}), and may hold only one of "
            "them; move the other to a folder with its own diffusion_config.json and tokenizer"
        )


def base_of(folder: str | Path) -> str:
    """Return the folder or name of the model that an adapter was trained on."""
    return str(_adapter_settings(folder)["base_model_name_or_path"])


def _adapter_settings(folder: str | Path) -> dict[str, Any]:
    """Return the content of a folder's adapter_config.json.

    Raises:
        ValueError: if it is not valid JSON, or lacks base_model_name_or_path.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_valid = isinstance(settings["base_model_name_or_path"], str)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise ValueError(
            f"{path} is not valid JSON or lacks base_model_name_or_path, the model that the adapter was trained on; "
            "copy or save the adapter again"
        )
    return settings


def check_agreement(configs: Sequence[tuple[str, DiffusionConfig]]) -> None:
    """Check that adapter, checkpoint and base model have the same diffusion process.

    Args:
        configs: pairs of folder and diffusion config, the newest first.
    Raises:
        ValueError: if two configs differ, naming both folders.
    """
    for folder, config in configs[1:]:
        newest_folder, newest_config = configs[0]
        for key in _SHARED_KEYS:
            newest_value, value = getattr(newest_config, key), getattr(config, key)
            if newest_value != value:
                raise ValueError(
                    f"{newest_folder} was trained with {key}: {newest_value}, but {folder} has {key}: {value}; use "
                    "the adapter with the model that it was trained on"
                )
        blocks, blocks_of_newest = ((each.attention, each.train_block_length) for each in (config, newest_config))
        # An adapter may make a block model of one with full attention, but not the reverse.
        if config.attention == "block" and blocks != blocks_of_newest:
            raise ValueError(
                f"{folder} is a block model with train_block_length: {config.train_block_length}, but {newest_folder} "
                f"was trained with attention: {newest_config.attention} and train_block_length: "
                f"{newest_config.train_block_length}; use the adapter with the model that it was trained on"
            )


def check_adapter(folder: str | Path) -> None:
    """Check that an adapter loads as it was trained.

    Raises:
        ValueError: if it is part of a PiSSA decomposition whose residual is not the base model.
    """
    folder = Path(folder)
    converted = (
        folder.parent / "pissa_converted" if folder.name in _PISSA_INTERMEDIATES else folder / "pissa_converted"
    )
    remedy = f"use {converted}" if converted.is_dir() else "train with pissa_convert: true and use its pissa_converted"
    if folder.name in _PISSA_INTERMEDIATES:
        raise ValueError(
            f"{folder} is an intermediate adapter of pissa_convert: loaded on the base model it does not give the "
            f"trained model; {remedy}"
        )
    if str(_adapter_settings(folder).get("init_lora_weights")).startswith("pissa_niter"):
        raise ValueError(
            f"{folder} was trained with pissa_init and an approximate decomposition (pissa_iter), which PEFT computes "
            f"again when it loads the adapter, with another result than in training; {remedy}, or train with "
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
        ValueError: if the base model cannot be loaded, or its diffusion config differs from the adapter's.
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
            f"{folder} is an adapter of {base}, which cannot be loaded ({first_line(error)}); correct "
            "base_model_name_or_path in its adapter_config.json, or run where that path exists"
        ) from error
    fit_embeddings(model, folder, num_stored=num_embeddings(model))
    merged = load_whole_adapter(PeftModel, model, folder).merge_and_unload()
    tie_again(merged)
    return merged


def fit_embeddings(model: Any, folder: str | Path, *, num_stored: int) -> None:
    """Resize the embeddings of a base model to those that the adapter in `folder` holds, if it holds any.

    Args:
        model: the base model.
        folder: the adapter's folder.
        num_stored: number of embeddings in the saved base model; an adapter with fewer belongs to another model.
    """
    num_in_adapter = adapter_num_embeddings(model, folder)
    if num_in_adapter is not None and num_in_adapter >= num_stored:
        resize_embeddings(model, num_in_adapter)


def adapter_num_embeddings(model: Any, folder: str | Path) -> int | None:
    """Return the number of embeddings that the adapter in `folder` holds, or None if it holds none."""
    names = [name for name in embedding_names(model) if name is not None]
    for path in weight_files(Path(folder)):
        for key, shape in shapes_of(path).items():
            for name in names:
                if key.endswith((f".{name}.weight", f".{name}.lora_B.weight", f".{name}.base_layer.weight")):
                    return shape[0]
    return None
