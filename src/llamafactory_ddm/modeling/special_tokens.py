"""Tokens that a diffusion model adds to a tokenizer: [MASK] and padding; and tokenizers that split digits."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .diffusion_config import VariableLength

_SPECIAL = re.compile(r"<.+>|\[.+\]")
_ESCAPE = re.compile(r"\\[ntr0xu\"\\]")
_ADVICE = (
    "set mask_token to a token of the vocabulary that text does not use, to its id, or to a new special token "
    "such as '<|mask|>'"
)


@dataclass(frozen=True)
class ResolvedMaskToken:
    """The mask token of a run.

    Attributes:
        token: its spelling in the vocabulary.
        id: its id.
        is_new: whether the tokenizer does not have it yet.
        is_trained: whether the checkpoint holds a trained embedding of it.
    """

    token: str
    id: int
    is_new: bool
    is_trained: bool = False


def resolve_mask_token(
    tokenizer: Any, mask_token: str | int | None, *, config_mask: tuple[str, int] | None = None
) -> ResolvedMaskToken:
    """Find the mask token: the YAML's, else the checkpoint's, else the tokenizer's own.

    An int is an id. A string is, in this order: a token of the vocabulary with that spelling; an id, if it consists of
    digits; a new token, if it is spelled like a special token, `<...>` or `[...]`; the single token that it encodes
    to.

    Args:
        tokenizer: a Hugging Face tokenizer.
        mask_token: value of the YAML key.
        config_mask: token and id in the checkpoint's diffusion_config.json.
    Raises:
        ValueError: if there is no mask token, the id does not exist, the string encodes to several ids, or it is the
            padding, start or EOS token.
    """
    resolved = _find(tokenizer, mask_token, config_mask)
    check_roles(tokenizer, resolved, mask_token)
    return resolved


def check_roles(tokenizer: Any, mask: ResolvedMaskToken, mask_token: str | int | None) -> None:
    """Check that the mask token is not the pad, eos, bos or an untrained unk token; a template can make it one.

    Raises:
        ValueError: if it is, naming the role.
    """
    for role in ("pad", "eos", "bos", *(() if mask.is_trained else ("unk",))):
        if mask.id == getattr(tokenizer, f"{role}_token_id"):
            raise ValueError(
                f"mask_token: {mask_token if mask_token is not None else mask.token!r} is the tokenizer's {role} "
                f"token, which texts contain; {_ADVICE}"
            )


def _find(tokenizer: Any, mask_token: str | int | None, config_mask: tuple[str, int] | None) -> ResolvedMaskToken:
    if mask_token is None and config_mask is not None:
        token, index = config_mask
        known = tokenizer.get_vocab().get(token)
        if known is not None and known != index:
            raise ValueError(
                f"the checkpoint's mask token {token!r} has id {index}, but this tokenizer gives it {known}; "
                "use the tokenizer that was saved with the checkpoint"
            )
        return ResolvedMaskToken(token, index, known is None, is_trained=True)
    if mask_token is None:
        if tokenizer.mask_token_id is None:
            raise ValueError(f"mask_token is missing, and the tokenizer of this model has none; {_ADVICE}")
        return ResolvedMaskToken(tokenizer.mask_token, int(tokenizer.mask_token_id), False)
    if isinstance(mask_token, bool):
        raise ValueError(f"mask_token: {str(mask_token).lower()} is neither a token nor an id; {_ADVICE}")
    is_id = _is_id(tokenizer.get_vocab(), mask_token)
    resolved = _by_id(tokenizer, mask_token) if is_id else _by_text(tokenizer, str(mask_token))
    # A YAML that repeats the checkpoint's mask token must not overwrite its trained embedding.
    return replace(resolved, is_trained=(resolved.token, resolved.id) == config_mask)


def resolve_token(tokenizer: Any, key: str, value: str | int) -> tuple[str, int]:
    """Return spelling and id of the token that the YAML key `key` names by its spelling, text or id.

    Raises:
        ValueError: if it is not one token of the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    return _resolved(tokenizer, vocabulary, {index: token for token, index in vocabulary.items()}, key, value)


def _resolved(
    tokenizer: Any, vocabulary: dict[str, int], names: dict[int, str], key: str, value: object
) -> tuple[str, int]:
    """Return what `resolve_token` does; `names` is the vocabulary by id."""
    if isinstance(value, str | int) and not isinstance(value, bool):
        if _is_id(vocabulary, value):
            token = names.get(int(value))
            if token is not None:
                return token, int(value)
        elif value in vocabulary:
            return str(value), int(vocabulary[value])
        else:
            ids = tokenizer.encode(str(value), add_special_tokens=False)
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                return str(tokenizer.convert_ids_to_tokens(ids[0])), int(ids[0])
    raise ValueError(
        f"{key}: {value!r} is not a single token of the vocabulary; name a token of the vocabulary, or its id"
        f"{escape_hint(key, value)}"
    )


def resolve_tokens(tokenizer: Any, key: str, value: object) -> tuple[int, ...]:
    """Return the ids of the tokens that the YAML key `key` names: one, several separated by commas, or a list.

    Raises:
        ValueError: if one of them is not one token of the vocabulary.
    """
    words: Any = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    if isinstance(words, int):
        words = [words]
    if not isinstance(words, list | tuple):
        raise ValueError(f"{key}: {value!r} is no token; write tokens or ids as one text, separated by commas: '5,7'")
    vocabulary = tokenizer.get_vocab()
    names = {index: token for token, index in vocabulary.items()}
    return tuple(dict.fromkeys(_resolved(tokenizer, vocabulary, names, key, word)[1] for word in words))


def escape_hint(key: str, value: object) -> str:
    r"""Return a hint on escapes such as \n, which YAML reads in double quotes only; empty if there is none."""
    if not isinstance(value, str) or not _ESCAPE.search(value):
        return ""
    return f'; YAML reads an escape in double quotes only: write {key}: "{value}"'


def _is_id(vocabulary: dict[str, int], mask_token: str | int) -> bool:
    if isinstance(mask_token, int):
        return True
    return mask_token.isdecimal() and mask_token not in vocabulary


def _by_id(tokenizer: Any, mask_token: str | int) -> ResolvedMaskToken:
    index = int(mask_token)
    # Not by convert_ids_to_tokens: for an id in a gap of the vocabulary it returns None or the unknown token.
    token = next((token for token, known in tokenizer.get_vocab().items() if known == index), None)
    if token is None:
        raise ValueError(
            f"mask_token: {mask_token} is not an id of the vocabulary, which has {len(tokenizer)} tokens; {_ADVICE}"
        )
    return ResolvedMaskToken(token, index, False)


def _by_text(tokenizer: Any, text: str) -> ResolvedMaskToken:
    known = tokenizer.get_vocab().get(text)
    if known is not None:
        return ResolvedMaskToken(text, int(known), False)
    if text and _SPECIAL.fullmatch(text):
        return ResolvedMaskToken(text, _next_id(tokenizer, text), True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ResolvedMaskToken(tokenizer.convert_ids_to_tokens(ids[0]), int(ids[0]), False)
    hint = escape_hint("mask_token", text)
    pieces = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)
    if len(ids) == 1:
        raise ValueError(
            f"mask_token: {text!r} is unknown to the tokenizer, which reads it as {pieces}; {_ADVICE}{hint}"
        )
    raise ValueError(f"mask_token: {text!r} is not one token but {len(ids)} ({pieces}); {_ADVICE}{hint}")


def _next_id(tokenizer: Any, text: str) -> int:
    """Return the id that `tokenizer` will give to a new token, without adding it."""
    ids = tokenizer.get_vocab().values()
    if max(ids, default=-1) + 1 == len(ids):
        return len(ids)
    clone = copy.deepcopy(tokenizer)  # slow, but where ids have gaps only the tokenizer knows the next one
    clone.add_special_tokens({"mask_token": text})
    return int(clone.convert_tokens_to_ids(text))


def add_mask_token(tokenizer: Any, mask: ResolvedMaskToken) -> None:
    """Add the mask token to the tokenizer if it is new; an existing token stays an ordinary one.

    Raises:
        ValueError: if the tokenizer gives the token another id than the model was trained with.
    """
    if mask.is_new:
        tokenizer.add_special_tokens({"mask_token": mask.token})
    index = tokenizer.convert_tokens_to_ids(mask.token)
    if index != mask.id:
        raise ValueError(
            f"the tokenizer gives {mask.token!r} the id {index}, expected {mask.id}; use the tokenizer that was saved "
            "with the checkpoint"
        )


_PAD = "<|pad|>"


def pad_names(tokenizer: Any, format: str, colors: int, stored: VariableLength | None = None) -> tuple[str, ...]:
    """Return the spellings of a format's padding tokens: the checkpoint's, else the tokenizer's own, else new ones.

    Args:
        tokenizer: a Hugging Face tokenizer.
        format: `eos_pad`, `eos_eos` or `rainbow`.
        colors: number of padding tokens of `rainbow`.
        stored: the checkpoint's format.
    Raises:
        ValueError: if the tokenizer has no EOS token.
    """
    if tokenizer.eos_token is None:
        raise ValueError(f"variable_length: {format} needs an EOS token, but the tokenizer has none; add one")
    if stored is not None:
        return stored.pad_tokens
    if format == "eos_eos":
        return (str(tokenizer.eos_token),)
    if format == "rainbow":
        return tuple(f"<|pad_{number}|>" for number in range(colors))
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token, None}
    return (_PAD,) if tokenizer.pad_token in taken else (str(tokenizer.pad_token),)


def new_names(tokenizer: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of `names` that are not in the tokenizer's vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return [name for name in names if name not in vocabulary]


def add_pad_tokens(tokenizer: Any, names: tuple[str, ...]) -> None:
    """Add those of `names` to the tokenizer that are not in its vocabulary."""
    new = new_names(tokenizer, names)
    if new:
        tokenizer.add_tokens(new, special_tokens=True)


_DIGIT_SAMPLES = ("1234567890", "20 30", "7777", " 11", "x99y")


_COPIED_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "chat_template",
)


def splits_digits(tokenizer: Any) -> bool:
    """Tell whether each digit of a number is a token of its own."""
    for text in _DIGIT_SAMPLES:
        pieces = [tokenizer.decode([index]) for index in tokenizer.encode(text, add_special_tokens=False)]
        if any(sum(char.isdigit() for char in piece) > 1 for piece in pieces):
            return False
    return True


def split_digits(tokenizer: Any) -> Any:
    """Return a tokenizer that makes every digit a token of its own, also after saving and loading it.

    The text is split before and after each digit, and the pieces are tokenised separately. The given tokenizer changes
    too.

    Raises:
        ValueError: if the tokenizer is a slow one.
    Source: DiffuLLaMA (arXiv 2410.17891), the tokenizer of its GSM8K models.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"split_digits: true needs a fast tokenizer, and {type(tokenizer).__name__} is a slow one; set "
            "use_fast_tokenizer: true, or remove split_digits"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    original = backend.pre_tokenizer
    backend.pre_tokenizer = digits if original is None else pre_tokenizers.Sequence([digits, original])
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    # The tokenizer of a model, such as GPT2Tokenizer, builds its own pre-tokenizer when it is loaded.
    settings = {
        name: getattr(tokenizer, name) for name in _COPIED_SETTINGS if getattr(tokenizer, name, None) is not None
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map, **settings)
