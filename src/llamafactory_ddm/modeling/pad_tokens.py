"""The tokens that stand behind the end of a text, and adding them to a model that lacks them."""

from __future__ import annotations

from typing import Any

from .diffusion_config import VariableLength
from .mask_token import rows_of, write_mean
from .quantization import is_quantized

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


def add_pad_tokens(model: Any, tokenizer: Any, names: tuple[str, ...]) -> None:
    """Give tokenizer and model the tokens that they do not have; new embeddings are the mean of the old ones.

    Raises:
        ValueError: if a quantised model would have to grow.
    """
    new = new_names(tokenizer, names)
    known, rows = len(tokenizer), rows_of(model)
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}
    without_row = [name for name, index in ids.items() if name in new or index >= rows]
    if without_row and is_quantized(model):
        raise ValueError(
            f"variable_length: the pad tokens {', '.join(without_row)} are new, and a quantised model cannot grow; "
            "add them once without quantization_bit, or use variable_length: eos_eos"
        )
    if max(ids.values(), default=0) >= rows:
        model.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
    for name in without_row:
        write_mean(model, ids[name], min(known, rows))
