"""What a checkpoint that is converted has beside its weights: config, tokenizer, and what it says of its process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from ..modeling.diffusion_config import DiffusionConfig
from ..modeling.special_tokens import resolve_token
from .diffullama import AnyLayout, published_config, set_published_padding
from .key_tables import first_line
from .llada_dream import OwnCode, kind_of, raw_config, standard_config

_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")  # of LLaDA and of Dream


def source_config(source: Path, base: str | Path | None) -> Any:
    """Return the config of an ordinary model: from `base` where that is given, unless `source` is LLaDA or Dream.

    Raises:
        ValueError: if there is none of a known model.
    """
    raw = raw_config(source)
    own = kind_of(raw)
    if own is not None:
        return standard_config(raw, own)
    try:
        return AutoConfig.from_pretrained(source if base is None else base)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source if base is None else base} has no config.json of a known model ({first_line(error)}); name the "
            "model that the weights were trained from with --base, such as gpt2-medium or a folder"
        ) from error


def source_tokenizer(source: Path, base: str | Path | None, own: OwnCode | None = None) -> Any:
    """Return the tokenizer in `source`, or that of `base` where it has none, without running published code.

    Raises:
        ValueError: if neither has one.
    """
    has_own = any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    folder = source if has_own or base is None else base
    try:
        # AutoTokenizer would ask whether to run the published code, which is not needed, then or later.
        if own is not None and own.standard_type == "qwen2":
            tokenizer = AutoTokenizer.from_pretrained(folder, tokenizer_type="qwen2")
            tokenizer.init_kwargs.pop("auto_map", None)
            return tokenizer
        if own is not None:
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tokenizer ({first_line(error)}); copy tokenizer.json and tokenizer_config.json of the "
            "published model into it, or name the model that the weights were trained from: llamafactory-ddm convert "
            "IN OUT --base"
        ) from error


def described_by_code(source: Path, own: OwnCode, tokenizer: Any, tokens: dict[str, str | None]) -> DiffusionConfig:
    """Return what the config of a model with code of its own says of its diffusion process.

    Raises:
        ValueError: if its mask token is not one of the tokenizer's.
    """
    mask_id = int(raw_config(source)["mask_token_id"])
    mask = tokenizer.convert_ids_to_tokens(mask_id)
    if mask is None and tokens["mask_token"] is not None:
        mask, mask_id = resolve_token(tokenizer, "--mask-token", tokens["mask_token"])
    if mask is None:
        raise ValueError(
            f"config.json says that the mask of this {own.name} has id {mask_id}, which is no token of the tokenizer; "
            "name it with llamafactory-ddm convert IN OUT --mask-token"
        )
    return DiffusionConfig(mask, mask_id, own.shift, "masked", 0.0, "linear", 1.0)


def check_options(described: DiffusionConfig, tokenizer: Any, tokens: dict[str, str | None], shift: bool) -> None:
    """Compare the options of a conversion with what the checkpoint itself says, and set the padding token.

    Raises:
        ValueError: naming the first that contradicts.
    """
    if not shift and described.shift:
        raise ValueError("--no-shift contradicts the checkpoint, whose logits at i predict token i + 1; remove it")
    stored = {"mask": described.mask_token_id, "sep": described.sep_token_id}
    for name, token_id in stored.items():
        option, asked = f"--{name}-token", tokens[f"{name}_token"]
        if asked is not None and resolve_token(tokenizer, option, asked)[1] != token_id:
            raise ValueError(f"{option} {asked} contradicts the checkpoint, whose token has id {token_id}; remove it")
    if tokens["pad_token"] is not None:
        tokenizer.pad_token = resolve_token(tokenizer, "--pad-token", tokens["pad_token"])[0]


def described_by_table(
    config: Any,
    rows: int,
    tokenizer: Any,
    tokens: dict[str, str | None],
    shift: bool,
    layout: AnyLayout | None,
) -> DiffusionConfig:
    """Return what the checkpoint says about itself, from the table of published models and the user's tokens.

    DiffuGPT is known by its layout; DiffuLLaMA was published in that of any Llama, so a Llama of its size is taken
    for it.

    Raises:
        ValueError: if neither says which token is the mask.
    """
    known = None
    if layout is not None or config.model_type == "llama":
        known = published_config(config.model_type, rows, tokenizer)
    if known is None and tokens["mask_token"] is None:
        raise ValueError(
            f"nothing says which token is the mask of this {config.model_type} model of {rows} embeddings; name it "
            "with --mask-token (and --sep-token)"
        )
    mask: tuple[str, int] = ("", 0) if known is None else (known.mask_token, known.mask_token_id)
    if tokens["mask_token"] is not None:
        mask = resolve_token(tokenizer, "--mask-token", tokens["mask_token"])
    described = replace(
        known or DiffusionConfig(mask[0], mask[1], shift, "masked", 0.0, "linear", 1.0),
        mask_token=mask[0],
        mask_token_id=mask[1],
        shift=shift,
    )
    if tokens["sep_token"] is not None:
        sep = resolve_token(tokenizer, "--sep-token", tokens["sep_token"])
        described = replace(described, sep_token=sep[0], sep_token_id=sep[1])
    if tokens["pad_token"] is not None:
        tokenizer.pad_token = resolve_token(tokenizer, "--pad-token", tokens["pad_token"])[0]
    elif known is not None:
        set_published_padding(config.model_type, rows, tokenizer)
    return described


def with_start_and_end(described: DiffusionConfig, tokenizer: Any) -> DiffusionConfig:
    """Return what a checkpoint says about itself, with what its texts start from and end with if it does not say.

    A published model ends a document with the tokenizer's end-of-text token, and a turn with what its chat template
    puts behind one.
    """
    if described.end_tokens is not None:
        return described
    vocabulary = tokenizer.get_vocab()
    chat = str(getattr(tokenizer, "chat_template", None) or "")
    turns = [token for token in _TURN_ENDS if token in vocabulary and token in chat]
    ends = [str(token) for token in (tokenizer.eos_token, *turns) if token is not None]
    ends = list(dict.fromkeys(ends))
    start = (tokenizer.bos_token or tokenizer.eos_token) if described.shift else None
    return replace(
        described,
        start_token=None if start is None else str(start),
        start_token_id=None if start is None else int(vocabulary[start]),
        end_tokens=tuple(ends),
        end_token_ids=tuple(int(vocabulary[token]) for token in ends),
    )
