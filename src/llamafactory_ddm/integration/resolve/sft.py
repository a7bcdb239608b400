"""Resolves the keys of `stage: ddm-sft`: split_digits, the template with its sep_token, and train_on_padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...data.collators import ResponseCollator
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.special_tokens import resolve_token, split_digits, splits_digits
from ..data.templates import DIFFULLAMA, N_SPECIAL, DiffuLlamaTemplate, without_cutoff
from .start_and_end import with_padding, with_template


def resolve_split_digits(tokenizer_module: dict[str, Any], finetuning_args: Any) -> None:
    """Make the tokenizer split digits if split_digits is true.

    Raises:
        ValueError: if split_digits is false and the tokenizer splits digits, or the tokenizer is a slow one.
    """
    split = finetuning_args.split_digits
    if split is None or split == splits_digits(tokenizer_module["tokenizer"]):
        return
    if not split:
        raise ValueError(
            "split_digits: false contradicts the tokenizer of this model, which makes every digit a token; remove "
            "split_digits"
        )
    tokenizer_module["tokenizer"] = split_digits(tokenizer_module["tokenizer"])


def resolve_template(
    template: Any,
    tokenizer: Any,
    config: DiffusionConfig | None,
    data_args: Any,
    finetuning_args: Any,
    *,
    mask_id: int,
    truncates: bool,
) -> Any:
    """Return the template with sep_token and, with `truncates`, cutoff_len set; the tokenizer gets its chat template.

    Raises:
        ValueError: if sep_token is missing, not one token, the mask token, contradicts the checkpoint, or is set for
            another template; or if cutoff_len leaves no room for a response.
    """
    requested = finetuning_args.sep_token
    if not isinstance(template, DiffuLlamaTemplate):
        if requested is not None:
            given = "no template is set" if data_args.template is None else f"template is {data_args.template}"
            raise ValueError(
                f"sep_token: {requested!r} needs template: {DIFFULLAMA}, but {given}; set template: {DIFFULLAMA}, or "
                "remove sep_token"
            )
        return template
    stored = None if config is None else config.sep_token
    sep_token = stored if requested is None else requested
    if sep_token is None:
        raise ValueError(
            f"template: {DIFFULLAMA} needs sep_token, the token between prompt and response, and the checkpoint has "
            "none; set it to a token of the vocabulary, such as '======' for GPT-2"
        )
    sep, sep_id = resolve_token(tokenizer, "sep_token", sep_token)
    if sep_id == mask_id:
        raise ValueError(f"sep_token: {sep!r} is the mask token, which marks positions to generate; set another token")
    if config is not None and stored is not None and (sep, sep_id) != (stored, config.sep_token_id):
        raise ValueError(
            f"sep_token: {sep!r} (id {sep_id}) contradicts the checkpoint, which was trained with {stored!r} (id "
            f"{config.sep_token_id}); remove the key from the YAML"
        )
    # For packing, LLaMA-Factory has subtracted a token from cutoff_len, and may truncate a full row by one more.
    packed = bool(data_args.packing)
    max_length = data_args.cutoff_len - packed
    if truncates and max_length <= N_SPECIAL:
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len + packed} leaves no room for a response and the {N_SPECIAL} special "
            f"tokens of template: {DIFFULLAMA}; set it to at least {N_SPECIAL + 1 + 2 * packed}"
        )
    template = replace(template, sep_token=sep, cutoff_len=max_length if truncates else None)
    template.fix_jinja_template(tokenizer)
    return template


def preparation_args(template: Any, data_args: Any) -> Any:
    """Return the data arguments for preparation, without cutoff_len if the template truncates examples itself."""
    if not isinstance(template, DiffuLlamaTemplate) or data_args.packing:
        return data_args
    return without_cutoff(data_args)


def with_finetuning(
    config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any, finetuning_args: Any
) -> DiffusionConfig:
    """Return the diffusion config of this run's checkpoints, with train_on_padding, template and sep_token.

    Raises:
        ValueError: if train_on_padding contradicts the checkpoint, or packing.
    """
    requested = finetuning_args.train_on_padding
    config.check_against(train_on_padding=requested if config.train_on_padding is not None else None)
    train_on_padding = requested if requested is not None else config.train_on_padding
    if train_on_padding and data_args.packing:
        raise ValueError(
            f"train_on_padding: true{'' if requested else ' of the checkpoint'} contradicts packing: true, whose rows "
            "have no padding; set packing: false (and neat_packing: false)"
        )
    if train_on_padding is None:
        train_on_padding = not data_args.packing
    config = with_template(replace(config, train_on_padding=train_on_padding), template, tokenizer, data_args)
    config = with_padding(config, tokenizer)
    sep = template.sep_token if isinstance(template, DiffuLlamaTemplate) else None
    if sep is None:
        return config
    return replace(config, sep_token=sep, sep_token_id=int(tokenizer.convert_tokens_to_ids(sep)))


def build_response_collator(config: DiffusionConfig, tokenizer: Any, data_args: Any) -> ResponseCollator:
    """Return the collator of prompts with responses."""
    return ResponseCollator(
        pad_id=tokenizer.pad_token_id,
        shift=config.shift,
        target_length=data_args.cutoff_len if config.train_on_padding else None,
        block_length=config.train_block_length,
    )
