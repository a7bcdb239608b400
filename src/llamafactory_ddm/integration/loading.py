"""The tokenizer and the model of a run, with the facts of its diffusion process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory.model import load_model, load_tokenizer

from ..modeling.bidirectional import make_bidirectional
from ..modeling.checkpoints import load_weights, stored_dtype
from ..modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ..modeling.mask_token import ResolvedMaskToken, add_mask_token, resolve_mask_token


@dataclass
class LoadedModel:
    """A bidirectional model with the tokenizer and the facts of its diffusion process."""

    model: Any
    tokenizer: Any
    diffusion_config: DiffusionConfig


def load_diffusion_tokenizer(
    model_args: Any, finetuning_args: Any, training_args: Any
) -> tuple[dict[str, Any], DiffusionConfig | None, ResolvedMaskToken]:
    """Return upstream's tokenizer module, the checkpoint's own diffusion config if it has one, and the mask token."""
    folder = finetuning_args.checkpoint_dir or model_args.model_name_or_path
    config = DiffusionConfig.find(folder)
    if config is None and not training_args.do_train and finetuning_args.mask_token is None:
        raise ValueError(
            f"{folder} holds no {FILE_NAME}, so nothing says that it is a diffusion model, and this run trains "
            "nothing. Point model_name_or_path (or checkpoint_dir) at a checkpoint of stage: ddm; if it is a "
            "diffusion model from elsewhere, say so with mask_token and shift"
        )
    tokenizer_module = _tokenizer_module(model_args, finetuning_args.checkpoint_dir)
    stored = None
    if config is not None:
        config.check_against(
            shift=finetuning_args.shift,
            noise_schedule=finetuning_args.noise_schedule,
            uniform_ratio=finetuning_args.uniform_ratio,
        )
        stored = (config.mask_token, config.mask_token_id)
    mask = resolve_mask_token(tokenizer_module["tokenizer"], finetuning_args.mask_token, config_mask=stored)
    if config is not None and mask.id != config.mask_token_id:
        raise ValueError(
            f"mask_token: {finetuning_args.mask_token!r} has id {mask.id}, but {Path(folder) / FILE_NAME} says the "
            f"model was trained with {config.mask_token!r}, id {config.mask_token_id}; remove the key from the YAML"
        )
    return tokenizer_module, config, mask


def _tokenizer_module(model_args: Any, checkpoint: str | None) -> dict[str, Any]:
    """Load the tokenizer; a `checkpoint` that is a whole Hugging Face folder takes the place of the base model."""
    base = model_args.model_name_or_path
    folder = Path(checkpoint) if checkpoint is not None else None
    has_model = folder is not None and (folder / "config.json").is_file()
    if has_model and folder is not None and (folder / "tokenizer_config.json").is_file():
        model_args.model_name_or_path = checkpoint
    try:
        tokenizer_module = load_tokenizer(model_args)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: {base} has no tokenizer that could be loaded ({error.__cause__ or error}); "
            "give a folder with a model and its tokenizer, or the name of one that can be downloaded"
        ) from error
    if has_model:
        model_args.model_name_or_path = checkpoint
    return tokenizer_module


def load_diffusion_model(
    tokenizer: Any,
    mask: ResolvedMaskToken,
    config: DiffusionConfig | None,
    model_args: Any,
    finetuning_args: Any,
    training_args: Any,
) -> LoadedModel:
    base_stage, finetuning_args.stage = finetuning_args.stage, finetuning_args.diffusion_stage
    try:
        model = load_model(tokenizer, model_args, finetuning_args, training_args.do_train)
    finally:
        finetuning_args.stage = base_stage
    add_mask_token(model, tokenizer, mask)
    checkpoint = finetuning_args.checkpoint_dir
    if checkpoint and not (Path(checkpoint) / "config.json").is_file():
        if not training_args.do_train:  # training has set its own dtype
            model.to(stored_dtype(checkpoint))
        load_weights(model, Path(checkpoint))
    make_bidirectional(model)
    if config is None:
        config = DiffusionConfig(
            mask_token=mask.token,
            mask_token_id=mask.id,
            shift=finetuning_args.shift if finetuning_args.shift is not None else True,
            noise_process="masked",
            uniform_ratio=finetuning_args.uniform_ratio or 0.0,
            noise_schedule=finetuning_args.noise_schedule or "linear",
            # A foreign checkpoint that is only used is taken to be what the YAML says, a finished diffusion model.
            attention_ratio=0.0 if training_args.do_train else 1.0,
        )
    return LoadedModel(model, tokenizer, config)
