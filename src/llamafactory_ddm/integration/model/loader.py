"""Loading of a run's tokenizer, model and diffusion config through LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamafactory.model import load_config, load_model, load_tokenizer
from llamafactory.model.patcher import patch_tokenizer
from transformers import AutoTokenizer

from ...checkpoints.adapters import check_agreement
from ...checkpoints.diffullama import published_config, set_published_padding
from ...checkpoints.families import find_diffusion_config
from ...checkpoints.families.base import without_code
from ...checkpoints.layouts import is_model_folder, layout_of_folder, stored_num_embeddings
from ...modeling.diffusion_config import FILE_NAME, DiffusionConfig
from ...modeling.model_info import text_config
from ...modeling.special_tokens import ResolvedMaskToken, resolve_mask_token
from ..logs import describe, get_logger
from ..resolve.checks import check_flash_attention
from ..resolve.noise_process import with_noise_process
from ..resolve.vocabulary import Additions, RunTokenizer, Vocabulary, restore_stored_tokens, resumes_adapter
from .adapter import AdapterSetup, loading_with

logger = get_logger(__name__)
_TOKEN_KEYS = ("add_tokens", "add_special_tokens")
_DESCRIPTIONS = "_special_token_descriptions"  # from new_special_tokens_config, which overrides the latter


def _newest_diffusion_config(model_args: Any, checkpoint_dir: str | None) -> DiffusionConfig | None:
    """Return the diffusion config of the adapter, else of the checkpoint, else of the base model, else None.

    Raises:
        ValueError: if two of them disagree, naming both.
    """
    configs: list[tuple[str, DiffusionConfig]] = []
    for folder in sources(model_args, checkpoint_dir):
        config = find_diffusion_config(folder)
        if config is not None:
            configs.append((folder, config))
    check_agreement(configs)
    return configs[0][1] if configs else None


def sources(model_args: Any, checkpoint_dir: str | None) -> list[str]:
    """Return the folders of a run's adapters, checkpoint and base model, the newest first."""
    adapters = reversed(model_args.adapter_name_or_path or [])
    return [*adapters, *([checkpoint_dir] if checkpoint_dir else []), model_args.model_name_or_path]


def load_diffusion_tokenizer(model_args: Any, finetuning_args: Any, training_args: Any) -> RunTokenizer:
    """Load the tokenizer, and the diffusion config of the checkpoint.

    Raises:
        ValueError: if the YAML contradicts the checkpoint, or a run that does not train has no diffusion config.
    """
    folder = finetuning_args.checkpoint_dir or model_args.model_name_or_path
    config = _newest_diffusion_config(model_args, finetuning_args.checkpoint_dir)
    module = load_newest_tokenizer(model_args, finetuning_args.checkpoint_dir)
    tokenizer = module["tokenizer"]
    additions = Additions.start(tokenizer)
    if config is None:
        config = _published_config(model_args, finetuning_args, tokenizer)
    if config is None and not training_args.do_train and finetuning_args.mask_token is None:
        raise ValueError(
            f"{folder} holds no {FILE_NAME}, which a run without training needs; set model_name_or_path (or "
            "checkpoint_dir) to a checkpoint of stage: ddm, convert a published checkpoint such as DiffuLLaMA with "
            "llamafactory-ddm convert, or set mask_token and shift for a diffusion model from elsewhere"
        )
    mask = None if config is None else _stored_mask(tokenizer, config, folder, finetuning_args, training_args)
    if config is not None and mask is not None:
        restore_stored_tokens(tokenizer, config, mask)
        additions = Additions.start(tokenizer)
    patch_tokenizer(tokenizer, model_args)
    additions.record(tokenizer)
    return RunTokenizer(module, additions, with_noise_process(config, finetuning_args), mask)


def _stored_mask(
    tokenizer: Any, config: DiffusionConfig, folder: str, finetuning_args: Any, training_args: Any
) -> ResolvedMaskToken:
    """Check that the YAML's diffusion keys agree with a checkpoint's config, and return its mask token.

    Raises:
        ValueError: if a key differs, naming it.
    """
    config.check_against(shift=finetuning_args.shift, noise_schedule=finetuning_args.noise_schedule)
    if getattr(training_args, "do_predict", False) and not training_args.do_train:
        # do_eval may use another noise process, but whether a model can edit depends on that of its training.
        config.check_against(noise_process=finetuning_args.noise_process, uniform_ratio=finetuning_args.uniform_ratio)
    stored = (config.mask_token, config.mask_token_id)
    mask = resolve_mask_token(tokenizer, finetuning_args.mask_token, config_mask=stored)
    if mask.id != config.mask_token_id:
        raise ValueError(
            f"mask_token: {finetuning_args.mask_token!r} has id {mask.id}, but the model was trained with "
            f"{config.mask_token!r}, id {config.mask_token_id} ({folder}); remove the key"
        )
    return mask


def _published_config(model_args: Any, finetuning_args: Any, tokenizer: Any) -> DiffusionConfig | None:
    """Return the diffusion config of a checkpoint_dir in a published layout, and set the padding token.

    The YAML's mask_token takes precedence, as other models use the same layout.
    """
    folder = finetuning_args.checkpoint_dir
    layout = None if folder is None else layout_of_folder(folder)
    if layout is None:
        return None
    model_type, num_embeddings = load_config(model_args).model_type, stored_num_embeddings(folder, layout)
    published = published_config(model_type, num_embeddings, tokenizer)
    if published is not None:
        set_published_padding(model_type, num_embeddings, tokenizer)
    if finetuning_args.mask_token is None:
        return published
    published_mask = None if published is None else (published.mask_token, published.mask_token_id)
    mask = resolve_mask_token(tokenizer, finetuning_args.mask_token, config_mask=published_mask)
    config = published or DiffusionConfig(mask.token, mask.id, True, "masked", 0.0, "linear", 1.0)
    return replace(config, mask_token=mask.token, mask_token_id=mask.id)


def load_newest_tokenizer(model_args: Any, checkpoint_dir: str | None) -> dict[str, Any]:
    """Load the tokenizer of the first of `sources` that has one; a checkpoint that is a whole model replaces the base.

    The tokenizer is returned as saved; `patch_tokenizer` adds the tokens of add_tokens and add_special_tokens later.

    Raises:
        ValueError: if no folder has a tokenizer.
    """
    base = model_args.model_name_or_path
    folders = sources(model_args, checkpoint_dir)
    newest = next((Path(f) for f in folders[:-1] if (Path(f) / "tokenizer_config.json").is_file()), None)
    # LLaMA-Factory also needs a model in the folder, which an adapter's folder does not hold.
    has_model = newest is not None and (newest / "config.json").is_file()
    model_args.model_name_or_path = str(newest) if has_model else base
    token_args = {key: getattr(model_args, key) for key in _TOKEN_KEYS}
    for key in _TOKEN_KEYS:
        setattr(model_args, key, None)
    try:
        tokenizer_module: dict[str, Any] = load_tokenizer(model_args)
        if newest is not None and not has_model:
            tokenizer = AutoTokenizer.from_pretrained(
                newest,
                use_fast=model_args.use_fast_tokenizer,
                split_special_tokens=model_args.split_special_tokens,
                padding_side="right",
            )
            tokenizer_module["tokenizer"] = tokenizer
        if not model_args.trust_remote_code:
            without_code(tokenizer_module["tokenizer"])
    except OSError as error:
        raise ValueError(
            f"model_name_or_path: {base} has no tokenizer that can be loaded ({error.__cause__ or error}); "
            "give a folder with a model and its tokenizer, or a Hub name that can be downloaded"
        ) from error
    finally:
        for key, value in token_args.items():
            setattr(model_args, key, value)
        is_whole = checkpoint_dir is not None and is_model_folder(checkpoint_dir)
        model_args.model_name_or_path = checkpoint_dir if is_whole else base
    return tokenizer_module


def load_diffusion_model(
    tokenizer: Any, vocabulary: Vocabulary, model_args: Any, finetuning_args: Any, training_args: Any
) -> Any:
    """Load the model with LLaMA-Factory's function, and with an `AdapterSetup` around its adapters.

    Raises:
        ValueError: if weights are missing, an adapter does not fit, attention cannot be made bidirectional, or
            FlashAttention is not installed.
    """
    check_flash_attention(model_args)
    config, attention = load_config(model_args), model_args.flash_attn
    # LLaMA-Factory knows FlashAttention-3 for gpt-oss alone.
    sets_flash3 = attention == "fa3" and config.model_type != "gpt_oss"
    is_new = finetuning_args.finetuning_type == "lora" and not resumes_adapter(model_args, finetuning_args)
    setup = AdapterSetup(
        vocabulary,
        int(config.get_text_config().vocab_size),
        model_args,
        finetuning_args,
        new_adapter=training_args.do_train and is_new,
        do_train=training_args.do_train,
        autocast=getattr(training_args, "bf16", False) or getattr(training_args, "fp16", False),
    )
    base_stage, finetuning_args.stage = finetuning_args.stage, finetuning_args.diffusion_stage
    if sets_flash3:
        model_args.flash_attn = type(attention)("auto")
    try:
        with loading_with(setup), _only_new_tokens(model_args, tokenizer, vocabulary.additions, setup.num_stored):
            model = load_model(tokenizer, model_args, finetuning_args, training_args.do_train)
    finally:
        finetuning_args.stage, model_args.flash_attn = base_stage, attention
    if sets_flash3:
        _use_flash_attention_3(model)
        if training_args.do_train:
            _warn_of_dropout(model)
    return model


@contextmanager
def _only_new_tokens(model_args: Any, tokenizer: Any, additions: Additions, n_embeddings: int) -> Iterator[None]:
    """Within the block, LLaMA-Factory's keys for new tokens lack those that the checkpoint already has.

    From 0.9.6 on, LLaMA-Factory initialises every token that these keys name, even trained ones.
    A token of the checkpoint's tokenizer that lies beyond its `n_embeddings` is new, too.
    """
    beyond = {token for token, index in tokenizer.get_vocab().items() if index >= n_embeddings}
    new = beyond | additions.ids.keys()
    saved = {key: getattr(model_args, key, None) for key in (*_TOKEN_KEYS, _DESCRIPTIONS)}
    for key in _TOKEN_KEYS:
        setattr(model_args, key, [token for token in saved[key] or () if token in new] or None)
    described = {token: text for token, text in (saved[_DESCRIPTIONS] or {}).items() if token in new}
    setattr(model_args, _DESCRIPTIONS, described or None)
    try:
        yield
    finally:
        for key, value in saved.items():
            setattr(model_args, key, value)


def _use_flash_attention_3(model: Any) -> None:
    try:
        model.set_attn_implementation("flash_attention_3")
    except (ImportError, ValueError) as error:  # transformers' checks of package, device and model
        raise ValueError(
            f"flash_attn: fa3 cannot be used ({describe(error)}); install FlashAttention-3 on a machine with a GPU "
            "that it supports, or set flash_attn: fa2 or sdpa"
        ) from error
    logger.info_rank0("Using FlashAttention-3.")


def _warn_of_dropout(model: Any) -> None:
    """Warn of attention dropout, which transformers leaves out, as the kernels of FlashAttention-3 have none."""
    config = text_config(model)
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(config, name, None):
            logger.warning_rank0(
                f"flash_attn: fa3 has no dropout, so {name}: {getattr(config, name)} of the model has no effect; set "
                "flash_attn: fa2 or sdpa to train with it."
            )
