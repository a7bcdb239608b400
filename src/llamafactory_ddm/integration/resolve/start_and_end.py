"""Start tokens, end tokens and the prompt template: resolved in training, and stored with the checkpoint."""

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


def take_stored_template(config: DiffusionConfig | None, data_args: Any) -> None:
    """Set `template` to the one that the checkpoint was finetuned with, if the YAML names none."""
    stored = None if config is None else config.template
    if data_args.template is None and stored is not None and stored.name in TEMPLATES:
        logger.info_rank0(f"template: is not set; using {stored.name}, which the checkpoint was finetuned with.")
        data_args.template = stored.name


def keep_end_token(config: DiffusionConfig | None, tokenizer: Any, data_args: Any, *, trains: bool) -> None:
    """Set EOS to the token that the checkpoint was trained to end documents with, even if the template has another.

    A run that trains keeps the template's EOS, and logs that the model learns it.
    """
    stored = () if config is None else config.end_tokens or ()
    if not stored or tokenizer.eos_token in stored:
        return
    message = (
        f"template: {data_args.template} ends texts with {tokenizer.eos_token}, but the checkpoint was trained to end "
        f"them with {stored[0]}; "
    )
    if trains:
        logger.warning_rank0(f"{message}it learns the template's from now on.")
        return
    logger.warning_rank0(f"{message}this run uses the checkpoint's. Remove template.")
    tokenizer.eos_token = stored[0]


def tell_other_template(config: DiffusionConfig | None, template: Any, tokenizer: Any, data_args: Any) -> None:
    """Warn in one line if prompts are formatted differently from those that the checkpoint was finetuned on."""
    stored = None if config is None else config.template
    if stored is None:
        return
    here = record_template(template, tokenizer, data_args.template)
    if here.parts == stored.parts:
        return
    if stored.name == data_args.template:
        said, keys = (
            "another system prompt, thinking setting or separator",
            "default_system, enable_thinking or sep_token",
        )
    else:
        said, keys = f"template: {'none' if stored.name is None else stored.name}", "template"
    logger.warning_rank0(
        f"template: {data_args.template} formats prompts differently from the checkpoint's finetuning, which used "
        f"{said}; remove {keys} from the YAML to use the checkpoint's."
    )


def with_start_and_end(
    config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any, *, finetunes: bool, trains: bool
) -> DiffusionConfig:
    """Return the config with the start and end tokens of this run.

    A run that trains adds the end tokens that it teaches to the checkpoint's. A run that does not train uses the
    checkpoint's, and with a template also the template's, which end a turn.

    Raises:
        ValueError: if a start token is needed and the tokenizer has none.
    """
    start, start_id = config.start_token, config.start_token_id
    if config.shift and start_id is None:
        start_id = start_token_id(tokenizer)
        start = str(tokenizer.convert_ids_to_tokens(start_id))
    names = list(end_tokens(template, tokenizer)) if finetunes else _document_ends(tokenizer, data_args)
    known = config.end_tokens
    if known is not None:
        names = [*names, *known] if trains else [*known, *names] if finetunes else list(known)
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
    """Return the config with padding among the end tokens, as the model learns to generate it after a text."""
    pad, index, ends = tokenizer.pad_token, tokenizer.pad_token_id, config.end_tokens or ()
    if config.variable_length is not None or not config.train_on_padding or pad in (*ends, config.mask_token, None):
        return config
    if words_among(tokenizer, [pad]):
        return config  # an ordinary word of the vocabulary, which texts contain
    return replace(config, end_tokens=(*ends, str(pad)), end_token_ids=(*(config.end_token_ids or ()), int(index)))


def with_template(config: DiffusionConfig, template: Any, tokenizer: Any, data_args: Any) -> DiffusionConfig:
    """Return the config with the prompt template of this run."""
    return replace(config, template=record_template(template, tokenizer, data_args.template))


def _document_ends(tokenizer: Any, data_args: Any) -> list[str]:
    """Return the tokens that LLaMA-Factory appends to a document."""
    own = [] if tokenizer.eos_token is None else [str(tokenizer.eos_token)]
    return [*own, "<|end_of_text|>"] if data_args.template == "llama3" else own
