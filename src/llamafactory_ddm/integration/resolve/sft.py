"""What `stage: ddm-sft` adds to a run: its tokenizer, its template, and what its checkpoints say about padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...data.collators import ResponseCollator
from ...modeling.diffusion_config import DiffusionConfig
from ...modeling.special_tokens import resolve_token, split_digits, splits_digits
from ..data.templates import DIFFULLAMA, MARKS, DiffuLlamaTemplate, uncut
from .start_and_end import with_padding, with_template


def resolve_digits(tokenizer_module: dict[str, Any], finetuning_args: Any) -> None:
    """Have the tokenizer split digits if split_digits asks for it.

    Raises:
        ValueError: if it asks for them joined and the tokenizer splits them, or the tokenizer is a slow one.
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
    """Return the template with what it needs of this run; with `cuts` it cuts examples to cutoff_len.

    Raises:
        ValueError: if sep_token is missing, is no token or the mask token, contradicts the checkpoint or has no use.
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
            f"sep_token: {sep!r} is the mask token, which stands for what is to be written; name another token"
        )
    if config is not None and stored is not None and (sep, index) != (stored, config.sep_token_id):
        raise ValueError(
            f"sep_token: {sep!r} (id {index}) contradicts the checkpoint, which was trained with {stored!r} (id "
            f"{config.sep_token_id}); remove the key from the YAML"
        )
    # Of the YAML's cutoff_len upstream has taken a token off for packing, and may cut what fills the row by one more.
    packed = bool(data_args.packing)
    longest = data_args.cutoff_len - packed
    if cuts and longest <= MARKS:
        raise ValueError(
            f"cutoff_len: {data_args.cutoff_len + packed} leaves no room for an answer beside the {MARKS} marks of "
            f"template: {DIFFULLAMA}; set it to at least {MARKS + 1 + 2 * packed}"
        )
    return replace(template, sep_token=sep, cutoff_len=longest if cuts else None)


def with_own_cut(template: Any, data_args: Any) -> Any:
    """Return the data arguments to prepare with: a template that cuts examples itself is not cut a second time."""
    if not isinstance(template, DiffuLlamaTemplate) or data_args.packing:
        return data_args
    return uncut(data_args)


def finetuned_config(
    config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any, finetuning_args: Any
) -> DiffusionConfig:
    """Return what the checkpoints of this run say about themselves.

    Raises:
        ValueError: if train_on_padding contradicts the checkpoint, or packing.
    """
    asked = finetuning_args.train_on_padding
    config.check_against(train_on_padding=asked if config.train_on_padding is not None else None)
    settled = asked if asked is not None else config.train_on_padding
    if settled and data_args.packing:
        said = "train_on_padding: true" if asked else "the checkpoint, which was trained with train_on_padding: true,"
        raise ValueError(
            f"{said} contradicts packing: true, whose rows have no padding to learn; set packing: false (and "
            "neat_packing: false)"
        )
    if settled is None:
        settled = not data_args.packing
    config = with_template(replace(config, train_on_padding=settled), template, tokenizer, data_args)
    config = with_padding(config, tokenizer)
    sep = template.sep_token if isinstance(template, DiffuLlamaTemplate) else None
    if sep is None:
        return config
    return replace(config, sep_token=sep, sep_token_id=int(tokenizer.convert_tokens_to_ids(sep)))


def response_collator(config: DiffusionConfig, tokenizer: Any, data_args: Any) -> ResponseCollator:
    """Return the collator of a run whose checkpoints say `config`."""
    return ResponseCollator(
        pad_id=tokenizer.pad_token_id,
        shift=config.shift,
        target_length=data_args.cutoff_len if config.train_on_padding else None,
    )
