"""Encoding and decoding of parts of a text: text that follows other text, and the text of each token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .control_tokens import control_texts, reading_as_text

_BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextCodec:
    """Encodes and decodes parts of a text with a tokenizer."""

    def __init__(self, tokenizer: Any, mask_id: int, eos_ids: Sequence[int] = (), pad_ids: Sequence[int] = ()) -> None:
        """Wrap a Hugging Face tokenizer.

        Args:
            tokenizer: the model's tokenizer.
            mask_id: the id of [MASK], which decodes to no text.
            eos_ids: ids of EOS and padding, which decode to no text either.
            pad_ids: those of `eos_ids` whose spelling in a text is ordinary text, as that of [MASK] is.
        """
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self._special = {*tokenizer.all_special_ids, mask_id, *eos_ids, *pad_ids}
        names = (str(tokenizer.convert_ids_to_tokens(index)) for index in (mask_id, *pad_ids))
        self.controls = control_texts(tokenizer, list(names))
        self._reader: Any = None
        # Prepended to a text that follows other text: some tokenizers drop the space before the first token.
        self._anchor = self.encode("a")[-1:]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens; spellings of [MASK] and padding are ordinary text."""
        reader = self.tokenizer
        if self.holds_control(text):
            reader = self._reader = self._reader or reading_as_text(self.tokenizer, self.controls)
        ids: list[int] = reader.encode(text, add_special_tokens=False)
        return ids

    def holds_control(self, text: str) -> bool:
        """Tell whether a text contains the spelling of [MASK] or of a padding token."""
        return any(token in text for token in self.controls)

    def encode_after(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text, without the space that some tokenizers prepend."""
        before = self.encode("\n")
        both = self.encode("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def decode(self, ids: list[int], *, follows: bool) -> str:
        """Return the text of ids without special tokens; `follows` keeps the space before its first word."""
        plain = [token for token in ids if token not in self._special]
        if not follows:
            text: str = self.tokenizer.decode(plain)
            return text
        both: str = self.tokenizer.decode([*self._anchor, *plain])
        return both[len(self.tokenizer.decode(self._anchor)) :]

    def is_silent(self, token: int) -> bool:
        """Tell whether a token decodes to no text."""
        return token in self._special

    def is_byte(self, token: int) -> bool:
        """Tell whether a token stands for a byte that the vocabulary has no character for, as <0x0A> in Llama 2."""
        return _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))) is not None

    def pieces(self, ids: list[int]) -> list[str | None]:
        """Return the text of each token, None for [MASK].

        Each token is decoded together with those before it, as several tokens may share a space or a character of
        several bytes. A character belongs to the token that completes it.
        """
        pieces: list[str | None] = []
        context: list[int] = []  # tokens that are decoded together with the current one
        n_emitted = 0  # number of characters of the decoded context that are in earlier pieces
        for position, token in enumerate(ids):
            if token == self.mask_id:
                pieces.append(None)
                context = []
                continue
            if not context:
                context = list(self._anchor) if position else []
                n_emitted = len(self.tokenizer.decode(context)) if context else 0
            context.append(token)
            text: str = self.tokenizer.decode(context)
            last = position + 1 == len(ids) or ids[position + 1] == self.mask_id
            if text.endswith("\ufffd") and not last:
                pieces.append("")
                continue
            pieces.append(text[n_emitted:])
            context = [token] if not text.endswith("\ufffd") else []
            n_emitted = len(self.tokenizer.decode(context)) if context else 0
        return pieces
