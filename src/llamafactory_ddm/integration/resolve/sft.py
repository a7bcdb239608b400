"""`stage: ddm-sft` in a run: split digits, the template with its sep_token, and training on padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...data.collators import ResponseCollator
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.special_tokens import resolve_token, split_digits, splits_digits
from ..data.templates import DIFFULLAMA, N_SPECIAL, DiffuLlamaTemplate, without_cutoff
from .start_and_end import with_padding, with_template


def resolve_digits(tokenizer_module: dict[str, Any], finetuning_args: Any) -> None:
    """Make the tokenizer split digits if split_digits is true.

    Raises:
        ValueError: if split_digits is false and the tokenizer splits digits, or the tokenizer is a slow one.
    """
    asked = finetuning_args.split_digits
    if asked is None or asked == splits_digits(tokenizer_module["tokenizer"]):
        return
    if not asked:
        raise ValueError(
            "split_digits: false, but the tokenizer of this model makes every digit a token of its own, and the model "
            "was trained so; remove the key"
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
    cuts: bool,
) -> Any:
    """Return the template with sep_token and, with `cuts`, cutoff_len set.

    Raises:
        ValueError: if sep_token is missing, not one token, the mask token, contradicts the checkpoint, or belongs to
            another template.
    """
    asked = finetuning_args.sep_token
    if not isinstance(template, DiffuLlamaTemplate):
        if asked is not None:
            raise ValueError(
                f"sep_token: {asked!r} belongs to template: {DIFFULLAMA}, but template is {data_args.template}; "
                "remove one of them"
            )
        return template
    stored = None if config is None else config.sep_token
    named = stored if asked is None else asked
    if named is None:
        raise ValueError(
            f"template: {DIFFULLAMA} needs sep_token, the token between prompt and response, and the checkpoint names "
            "none; set it to a token of the vocabulary, such as '======' for GPT-2"
        )
    sep, index = resolve_token(tokenizer, "sep_token", named)
    if index == mask_id:
        raise ValueError(
            f"sep_token: {sep!r} is the mask token, which marks positions to generate; name another token"
        )
    if config is not None and stored is not None and (sep, index) != (stored, config.sep_token_id):
        raise ValueError(
            f"sep_token: {sep!r} (id {index}) contradicts the checkpoint, which was trained with {stored!r} (id "
            f"{config.sep_token_id}); remove the key from the YAML"
        )
    # For packing, LLaMA-Factory has subtracted a token from cutoff_len, and may cut a full row by one more.
    packed = bool(data_args.packing)
    longest = data_args.cutoff_len - packed
    if cuts and longest <= N_SPECIAL:
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len + packed} leaves no room for a response with the {N_SPECIAL} special "
            f"tokens of template: {DIFFULLAMA}; set it to at least {N_SPECIAL + 1 + 2 * packed}"
        )
    return replace(template, sep_token=sep, cutoff_len=longest if cuts else None)


def preparation_args(template: Any, data_args: Any) -> Any:
    """Return the data arguments for preparation, without cutoff_len if the template cuts examples itself."""
    if not isinstance(template, DiffuLlamaTemplate) or data_args.packing:
        return data_args
    return without_cutoff(data_args)


def finetuned_config(
    config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any, finetuning_args: Any
) -> DiffusionConfig:
    """Return the diffusion config of this run's checkpoints, with train_on_padding, template and sep_token.

    Raises:
        ValueError: if train_on_padding contradicts the checkpoint, or packing.
    """
    asked = finetuning_args.train_on_padding
    config.check_against(train_on_padding=asked if config.train_on_padding is not None else None)
    resolved = asked if asked is not None else config.train_on_padding
    if resolved and data_args.packing:
        owner = "train_on_padding: true" if asked else "the checkpoint, which was trained with train_on_padding: true,"
        raise ValueError(
            f"{owner} contradicts packing: true, whose rows have no padding to learn; set packing: false (and "
            "neat_packing: false)"
        )
    if resolved is None:
        resolved = not data_args.packing
    config = with_template(replace(config, train_on_padding=resolved), template, tokenizer, data_args)
    config = with_padding(config, tokenizer)
    sep = template.sep_token if isinstance(template, DiffuLlamaTemplate) else None
    if sep is None:
        return config
    return replace(config, sep_token=sep, sep_token_id=int(tokenizer.convert_tokens_to_ids(sep)))


def response_collator(config: DiffusionConfig, tokenizer: Any, data_args: Any) -> ResponseCollator:
    """Return the collator of a run with this diffusion config."""
    return ResponseCollator(
        pad_id=tokenizer.pad_token_id,
        shift=config.shift,
        target_length=data_args.cutoff_len if config.train_on_padding else None,
    )
