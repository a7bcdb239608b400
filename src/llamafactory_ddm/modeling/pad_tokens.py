"""The tokens that stand behind the end of a text, and adding them to a tokenizer that lacks them."""

from __future__ import annotations

from typing import Any

from .diffusion_config import VariableLength

_PAD = "<|pad|>"


def pad_names(tokenizer: Any, format: str, colors: int, stored: VariableLength | None = None) -> tuple[str, ...]:
    """Return the spellings of a format's pad tokens: the checkpoint's, else the tokenizer's own, else new ones.

    Args:
        tokenizer: a Hugging Face tokenizer.
        format: `eos_pad`, `eos_eos` or `rainbow`.
        colors: pad tokens of `rainbow`.
        stored: what the checkpoint says.
    Raises:
        ValueError: if the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token is None:
        raise ValueError(
            f"variable_length: {format} ends a text with the end-of-text token, and the tokenizer has none; add one"
        )
    if stored is not None:
        return stored.pad_tokens
    if format == "eos_eos":
        return (str(tokenizer.eos_token),)
    if format == "rainbow":
        return tuple(f"<|pad_{number}|>" for number in range(colors))
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token, None}
    return (_PAD,) if tokenizer.pad_token in taken else (str(tokenizer.pad_token),)


def new_names(tokenizer: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of `names` that the tokenizer does not have."""
    vocabulary = tokenizer.get_vocab()
    return [name for name in names if name not in vocabulary]


def add_pad_tokens(tokenizer: Any, names: tuple[str, ...]) -> None:
    """Give the tokenizer those of `names` that it does not have."""
    new = new_names(tokenizer, names)
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
