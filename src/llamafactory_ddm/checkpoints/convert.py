"""Conversion of published checkpoints to plain Hugging Face folders with diffusion_config.json, and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.special_tokens import resolve_token
from ..utils.files import new_folder
from ..utils.registry import unknown_choice
from .adapters import ADAPTER_CONFIG
from .diffullama import LAYOUTS, Layout, published_config, set_published_padding
from .families import (
    MODEL_FAMILIES,
    ModelFamily,
    detect_family,
    families_of_plain,
    family_of_converted,
    raw_config,
)
from .families.base import load_tokenizer, mask_of, with_start_and_end
from .layouts import AnyLayout, layout_of, stored_num_embeddings
from .rename import check_adapter_keys, check_keys, is_tied, renamer, write_weights
from .weights import first_line, keys_of, read_weight, stored_dtype, verify_checkpoint, weight_files


def convert(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    to_published: bool | str = False,
    mask_token: str | None = None,
    sep_token: str | None = None,
    pad_token: str | None = None,
    shift: bool = True,
) -> None:
    """Convert `source` to the new folder `target`, which appears only once it is complete.

    Args:
        source: a published checkpoint, or with `to_published` a plain one; a model or a LoRA adapter.
        target: folder of the result; it must be absent or empty.
        base: folder or name of the base model, whose config or tokenizer is used where `source` has none.
        to_published: write the published layout; the name of a family, such as sdar, or True for the one that has the
            model's architecture, shift and attention.
        mask_token: spelling or id of [MASK]; by default that of the published model.
        sep_token: spelling or id of the token between prompt and response; by default as for `mask_token`.
        pad_token: spelling or id of the padding token; by default as for `mask_token`.
        shift: whether logits at i predict token i + 1.
    Raises:
        ValueError: if a file is missing or broken, the weights do not fit the model, the mask token is unknown, or
            `target` is not empty.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; check the path (it is relative to {Path.cwd()})")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; name a new folder")
    verify_checkpoint(source)
    with new_folder(target) as scratch:
        if (source / ADAPTER_CONFIG).is_file():
            convert_adapter(source, scratch, base, to_published)
        else:
            tokens = {"mask_token": mask_token, "sep_token": sep_token, "pad_token": pad_token}
            _convert_model(source, scratch, base, to_published, tokens, shift)


def _convert_model(
    source: Path,
    scratch: Path,
    base: str | Path | None,
    to_published: bool | str,
    tokens: dict[str, str | None],
    shift: bool,
) -> None:
    config = source_config(source, base)
    layout = layout_of(key for path in weight_files(source) for key in keys_of(path))
    family = detect_family(raw_config(source))
    diffusion_config = DiffusionConfig.find(source)
    published = layout or family
    if to_published and published is not None:
        name = published.title if isinstance(published, type) else published.name
        raise ValueError(f"--published: {source} has the published layout of {name} already; leave it as it is")
    target_family = _target_family(source, to_published, config.model_type, diffusion_config)
    target_layout = _target_layout(config, target_family) if to_published else None
    num_embeddings = stored_num_embeddings(source, layout) or int(config.vocab_size)
    config.vocab_size = num_embeddings
    check_keys(source, layout, config)
    if is_tied(config) and _output_differs(source, layout):
        config.tie_word_embeddings = False
    write_weights(source, scratch, renamer(layout, target_layout))
    config.dtype = stored_dtype(source)
    config.save_pretrained(scratch)
    tokenizer = source_tokenizer(source, base)
    if diffusion_config is None and family is not None:
        diffusion_config = _config_of_family(source, family, tokenizer, tokens)
    if diffusion_config is not None:
        check_options(diffusion_config, tokenizer, tokens, shift)
    else:
        diffusion_config = config_from_table(config, num_embeddings, tokenizer, tokens, shift, layout)
    _check_mask(tokenizer, diffusion_config)
    diffusion_config = with_start_and_end(diffusion_config, tokenizer)
    diffusion_config.save(scratch)
    if target_family is not None:
        _write_published(target_family, config, diffusion_config, tokenizer, scratch)
    tokenizer.save_pretrained(scratch)


def _check_mask(tokenizer: Any, diffusion_config: DiffusionConfig) -> None:
    """Check the id of the mask token, and add the token if the tokenizer lacks it.

    Raises:
        ValueError: if the tokenizer has it under another id.
    """
    if diffusion_config.mask_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"mask_token": diffusion_config.mask_token})
    mask_id = tokenizer.convert_tokens_to_ids(diffusion_config.mask_token)
    if mask_id != diffusion_config.mask_token_id:
        raise ValueError(
            f"the tokenizer gives the mask token {diffusion_config.mask_token!r} the id {mask_id}, but the weights "
            f"were trained with id {diffusion_config.mask_token_id}; name the model that they were trained from with "
            "--base"
        )


def _write_published(
    family: type[ModelFamily], config: Any, diffusion_config: DiffusionConfig, tokenizer: Any, scratch: Path
) -> None:
    """Write a family's configs and code to `scratch`, and declare the mask token in the tokenizer."""
    contents = {
        "config.json": family.published_config(config, diffusion_config),
        "generation_config.json": family.published_generation_config(config, diffusion_config),
    }
    for name, content in contents.items():
        if content is not None:
            (scratch / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in family.published_code:
        shutil.copyfile(path, scratch / path.name)
    tokenizer.mask_token = diffusion_config.mask_token


def _target_family(
    source: Path, to_published: bool | str, model_type: str, diffusion_config: DiffusionConfig | None
) -> type[ModelFamily] | None:
    """Return the family to whose layout to convert; None for the layout of DiffuGPT and DiffuLLaMA, or for none.

    Raises:
        ValueError: if the named family does not exist, or the model fits none that it could have.
    """
    if not to_published:
        return None
    if isinstance(to_published, str):
        if to_published not in MODEL_FAMILIES:
            names = [name for name in MODEL_FAMILIES if MODEL_FAMILIES.get(name).can_be_written()]
            raise ValueError(unknown_choice("--published", to_published, names))
        family = MODEL_FAMILIES.get(to_published)
        family.check_publishable(source, model_type, diffusion_config)
        return family
    attention = "full"
    if diffusion_config is not None:
        attention = diffusion_config.attention
        fitting = family_of_converted(model_type, diffusion_config.shift, attention)
        if fitting is not None:
            return fitting
    if model_type in LAYOUTS and attention == "full":
        return None
    for family in families_of_plain(model_type):
        family.check_publishable(source, model_type, diffusion_config)
    if attention != "full":
        raise ValueError(
            f"--published: {source} is a {model_type} with attention: {attention}, and none was published; train a "
            "qwen3 model for the layout of SDAR"
        )
    return None


def _target_layout(config: Any, family: type[ModelFamily] | None) -> AnyLayout | None:
    """Return the published layout of a model; None if its weights have the names of the transformers model.

    Raises:
        ValueError: if no such model was published.
    """
    if family is not None:
        return family.weight_names
    if config.model_type not in LAYOUTS:
        raise ValueError(
            f"--published: model_type {config.model_type} has no published layout; it must be one of "
            f"{', '.join(LAYOUTS)}, or of a registered family (name its module with --plugins)"
        )
    return LAYOUTS[config.model_type]


def _output_differs(source: Path, layout: AnyLayout | None) -> bool:
    """Tell whether the files hold an output embedding that differs from the input embedding."""
    input_names = {published.embedding + "weight" for published in LAYOUTS.values()}
    embeddings: dict[str, Tensor] = {}
    for path in weight_files(source):
        for key in keys_of(path):
            standard = key if layout is None else layout.to_standard(key)
            if standard in input_names or standard == "lm_head.weight":
                embeddings["out" if standard == "lm_head.weight" else "in"] = read_weight(path, key)
    return len(embeddings) == 2 and not torch.equal(embeddings["in"], embeddings["out"])


def source_config(source: Path, base: str | Path | None) -> Any:
    """Return the transformers config of `source`: that of its family, else from `base` if given, else its own.

    Raises:
        ValueError: if there is no config.json that transformers can load.
    """
    raw = raw_config(source)
    family = detect_family(raw)
    if family is not None:
        return family.checked_config(raw)
    folder = source if base is None else base
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no config.json that transformers can load ({first_line(error)}); name the model that the "
            "weights were trained from with --base, such as gpt2-medium or a folder"
        ) from error


def source_tokenizer(source: Path, base: str | Path | None) -> Any:
    """Return the tokenizer in `source`, or that of `base` if `source` has none.

    Raises:
        ValueError: if neither has one.
    """
    has_tokenizer = any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return load_tokenizer(source if has_tokenizer or base is None else base)


def _config_of_family(
    source: Path, family: type[ModelFamily], tokenizer: Any, tokens: dict[str, str | None]
) -> DiffusionConfig:
    """Return the diffusion config of a published model; --mask-token is for a mask that the tokenizer lacks.

    Raises:
        ValueError: if neither config.json nor --mask-token names a token of the tokenizer.
    """
    raw, mask_token = family.complete(raw_config(source), tokenizer, source), tokens["mask_token"]
    if mask_token is not None and mask_of(raw, tokenizer) is None:
        raw["mask_token_id"] = resolve_token(tokenizer, "--mask-token", mask_token)[1]
    return family.diffusion_config(raw, tokenizer)


def check_options(
    diffusion_config: DiffusionConfig, tokenizer: Any, tokens: dict[str, str | None], shift: bool
) -> None:
    """Check the options of a conversion against the checkpoint's diffusion config, and set the padding token.

    Raises:
        ValueError: if an option contradicts the config, naming the option.
    """
    if not shift and diffusion_config.shift:
        raise ValueError("--no-shift contradicts the checkpoint, whose logits at i predict token i + 1; remove it")
    stored = {"mask": diffusion_config.mask_token_id, "sep": diffusion_config.sep_token_id}
    for name, token_id in stored.items():
        option, token = f"--{name}-token", tokens[f"{name}_token"]
        if token is not None and resolve_token(tokenizer, option, token)[1] != token_id:
            raise ValueError(f"{option} {token} contradicts the checkpoint, whose token has id {token_id}; remove it")
    if tokens["pad_token"] is not None:
        tokenizer.pad_token = resolve_token(tokenizer, "--pad-token", tokens["pad_token"])[0]


def config_from_table(
    config: Any,
    num_embeddings: int,
    tokenizer: Any,
    tokens: dict[str, str | None],
    shift: bool,
    layout: AnyLayout | None,
) -> DiffusionConfig:
    """Return the diffusion config of a model in the table of published models, changed by the user's options.

    DiffuGPT is recognised by its layout. DiffuLLaMA was published in the layout of any Llama, so every Llama with the
    same number of embeddings counts as DiffuLLaMA.

    Raises:
        ValueError: if the mask token is unknown.
    """
    published = None
    if layout is not None or config.model_type == "llama":
        published = published_config(config.model_type, num_embeddings, tokenizer)
    if published is None and tokens["mask_token"] is None:
        raise ValueError(
            f"the mask token of this {config.model_type} model with {num_embeddings} embeddings is unknown; name it "
            "with --mask-token (and --sep-token)"
        )
    mask: tuple[str, int] = ("", 0) if published is None else (published.mask_token, published.mask_token_id)
    if tokens["mask_token"] is not None:
        mask = resolve_token(tokenizer, "--mask-token", tokens["mask_token"])
    diffusion_config = replace(
        published or DiffusionConfig(mask[0], mask[1], shift, "masked", 0.0, "linear", 1.0),
        mask_token=mask[0],
        mask_token_id=mask[1],
        shift=shift,
    )
    if tokens["sep_token"] is not None:
        sep = resolve_token(tokenizer, "--sep-token", tokens["sep_token"])
        diffusion_config = replace(diffusion_config, sep_token=sep[0], sep_token_id=sep[1])
    if tokens["pad_token"] is not None:
        tokenizer.pad_token = resolve_token(tokenizer, "--pad-token", tokens["pad_token"])[0]
    elif published is not None:
        set_published_padding(config.model_type, num_embeddings, tokenizer)
    return diffusion_config


def convert_adapter(source: Path, scratch: Path, base: str | Path | None, to_published: bool | str) -> None:
    """Convert the adapter in the folder `source` to the folder `scratch`; the other arguments are those of `convert`.

    Raises:
        ValueError: if its weights do not fit its adapter_config.json, its diffusion config is unknown, or it has no
            published layout.
    """
    if isinstance(to_published, str):
        raise ValueError(
            f"--published {to_published}: {source} is an adapter; merge it first with llamafactory-cli export, and "
            f"convert the result with --published {to_published}"
        )
    keys = [key for path in weight_files(source) for key in keys_of(path)]
    layout = layout_of(keys)
    if to_published and layout is not None:
        raise ValueError(f"--published: {source} has the published layout of {layout.name} already; leave it as it is")
    settings = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if base is not None:
        settings["base_model_name_or_path"] = str(base)
    check_adapter_keys(source, layout, settings)
    if to_published:
        _check_adapter_kind(source, str(settings["base_model_name_or_path"]), keys)
    rename = renamer(layout, _adapter_layout(keys) if to_published else None)
    write_weights(source, scratch, rename)
    (scratch / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    diffusion_config = DiffusionConfig.find(source)
    if diffusion_config is None and base is not None:
        diffusion_config = DiffusionConfig.find(base)
    if diffusion_config is None:
        raise ValueError(
            f"{source} holds no diffusion_config.json, and neither does --base; convert the model that the adapter "
            "was trained on first, and name the result with --base"
        )
    diffusion_config.save(scratch)
    if (source / "tokenizer_config.json").is_file():
        source_tokenizer(source, None).save_pretrained(scratch)


def _check_adapter_kind(source: Path, base: str, keys: list[str]) -> None:
    """Check that an adapter does not belong to a family such as LLaDA or Dream, which published no adapters.

    Raises:
        ValueError: if it does.
    """
    config = DiffusionConfig.find(source)
    raw = raw_config(base)
    is_llama = any(key.startswith("base_model.model.model.layers.") for key in keys)
    model_type = str(raw.get("model_type", "llama" if is_llama else ""))
    family = detect_family(raw)
    if family is None and config is not None:
        family = family_of_converted(model_type, config.shift, config.attention)
    if family is not None:
        raise ValueError(
            f"{source} is an adapter of {family.title}, which has no published layout for adapters; merge it first "
            "with llamafactory-cli export, and convert the result with --published"
        )


def _adapter_layout(keys: list[str]) -> Layout:
    prefixes = {"gpt2": "base_model.model.transformer.h.", "llama": "base_model.model.model.layers."}
    for model_type, prefix in prefixes.items():
        if any(key.startswith(prefix) for key in keys):
            return LAYOUTS[model_type]
    raise ValueError(
        f"--published: {keys[0]} belongs to an adapter without a published layout; its base model must be one of "
        f"{', '.join(prefixes)}"
    )
