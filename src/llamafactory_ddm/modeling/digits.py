"""A tokenizer that makes every digit a token of its own."""

from __future__ import annotations

from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TRIAL = ("1234567890", "20 30", "7777", " 11", "x99y")
_KEPT = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")


def splits_digits(tokenizer: Any) -> bool:
    """Tell whether no token of a number holds more than one digit."""
    for text in _TRIAL:
        pieces = [tokenizer.decode([index]) for index in tokenizer.encode(text, add_special_tokens=False)]
        if any(sum(char.isdigit() for char in piece) > 1 for piece in pieces):
            return False
    return True


def split_digits(tokenizer: Any) -> Any:
    """Return a tokenizer that cuts the text before and behind every digit, and still does when it is saved and loaded.

    The pieces are tokenised apart from each other, so that no token spans the border of a digit. The tokenizer given
    changes too.

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
    before = backend.pre_tokenizer
    backend.pre_tokenizer = digits if before is None else pre_tokenizers.Sequence([digits, before])
    if type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    # The tokenizer of a model, such as GPT2Tokenizer, builds its own pre-tokenizer when it is loaded.
    kept = {name: getattr(tokenizer, name) for name in _KEPT if getattr(tokenizer, name, None) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map, **kept)
