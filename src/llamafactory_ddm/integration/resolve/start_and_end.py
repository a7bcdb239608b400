"""Resolves start tokens, end tokens and the prompt template, which are stored with the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llamafactory.data.template import TEMPLATES

from ...data.collators import start_token_id
from ...data.control_tokens import words_among
from ...modeling.diffusion_config import DiffusionConfig
from ..data.stored_template import end_tokens, record_template
from ..logs import get_logger

logger = get_logger(__name__)


def resolve_template_name(config: DiffusionConfig | None, data_args: Any) -> None:
    """Set `template` to the checkpoint's if the YAML names none."""
    stored = None if config is None else config.template
    if data_args.template is None and stored is not None and stored.name in TEMPLATES:
        logger.info_rank0(f"template: not set; using {stored.name}, which the checkpoint was finetuned with.")
        data_args.template = stored.name


def resolve_eos_token(config: DiffusionConfig | None, tokenizer: Any, data_args: Any, *, trains: bool) -> None:
    """Set the tokenizer's EOS to the checkpoint's, even if the template has another one.

    A run that trains keeps the template's EOS, and logs that the model learns it.
    """
    stored = () if config is None else config.end_tokens or ()
    if not stored or tokenizer.eos_token in stored:
        return
    message = (
        f"template: {data_args.template} ends texts with {tokenizer.eos_token}, but the checkpoint was trained with "
        f"{stored[0]}; "
    )
    if trains:
        logger.warning_rank0(f"{message}this run teaches {tokenizer.eos_token}.")
        return
    logger.warning_rank0(f"{message}this run uses {stored[0]}. Remove template to silence this warning.")
    tokenizer.eos_token = stored[0]


def warn_other_template(config: DiffusionConfig | None, template: Any, tokenizer: Any, data_args: Any) -> None:
    """Warn if prompts are formatted differently from those that the checkpoint was finetuned on."""
    stored = None if config is None else config.template
    if stored is None:
        return
    if record_template(template, tokenizer, data_args.template).parts == stored.parts:
        return
    difference, keys = f"template: {'none' if stored.name is None else stored.name}", "template"
    if stored.name == data_args.template:
        difference = "another system prompt, thinking setting or separator"
        keys = "default_system, enable_thinking or sep_token"
    logger.warning_rank0(
        f"template: {data_args.template} formats prompts differently from the checkpoint's finetuning, which used "
        f"{difference}; remove {keys} from the YAML to use the checkpoint's."
    )


def with_start_and_end(
    config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any, *, finetunes: bool, trains: bool
) -> DiffusionConfig:
    """Return the config with the start and end tokens of this run.

    A run that trains puts the end tokens that it teaches before the checkpoint's. A run that does not train keeps the
    checkpoint's, and with `finetunes` adds its template's.

    Raises:
        ValueError: if a start token is needed and the tokenizer has none.
    """
    start, start_id = config.start_token, config.start_token_id
    if config.shift and start_id is None:
        start_id = start_token_id(tokenizer)
        start = str(tokenizer.convert_ids_to_tokens(start_id))
    names = list(end_tokens(template, tokenizer)) if finetunes else _document_end_tokens(tokenizer, data_args)
    stored = config.end_tokens
    if stored is not None and trains:
        names = [*names, *stored]
    elif stored is not None:
        names = [*stored, *names] if finetunes else list(stored)
    vocabulary = tokenizer.get_vocab()
    names = [name for name in dict.fromkeys(names) if name in vocabulary and name != config.mask_token]
    return replace(
        config,
        start_token=start,
        start_token_id=start_id,
        end_tokens=tuple(names),
        end_token_ids=tuple(int(vocabulary[name]) for name in names),
    )


def with_padding(config: DiffusionConfig, tokenizer: Any) -> DiffusionConfig:
    """Return the config with padding among the end tokens, if the model learns to generate it after a text."""
    pad, pad_id, names = tokenizer.pad_token, tokenizer.pad_token_id, config.end_tokens or ()
    if config.variable_length is not None or not config.train_on_padding or pad in (*names, config.mask_token, None):
        return config
    if words_among(tokenizer, [pad]):
        return config  # an ordinary word, which texts may contain
    return replace(config, end_tokens=(*names, str(pad)), end_token_ids=(*(config.end_token_ids or ()), int(pad_id)))


def with_template(config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any) -> DiffusionConfig:
    """Return the config with the prompt template of this run."""
    return replace(config, template=record_template(template, tokenizer, data_args.template))


def _document_end_tokens(tokenizer: Any, data_args: Any) -> list[str]:
    """Return the tokens that LLaMA-Factory appends to a document."""
    eos = [] if tokenizer.eos_token is None else [str(tokenizer.eos_token)]
    return [*eos, "<|end_of_text|>"] if data_args.template == "llama3" else eos
