"""Ids to text and back, for text in parts: what follows other text, and what each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextCodec:
    """A tokenizer, seen as what turns the parts of a text into ids and back."""

    def __init__(self, tokenizer: Any, mask_id: int, pad_ids: Sequence[int] = ()) -> None:
        """Wrap a Hugging Face tokenizer; `mask_id` and `pad_ids` stand for no text."""
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self._special = {*tokenizer.all_special_ids, mask_id, *pad_ids}
        # What a text is decoded behind, as some tokenizers drop the space before the first token of a text.
        self._anchor = self.encode("a")[-1:]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens of the tokenizer's own."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def encode_after(self, text: str) -> list[int]:
        """Return the ids of a text that follows other text: without the space that some tokenizers put before one."""
        before = self.encode("\n")
        both = self.encode("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def decode(self, ids: list[int], *, follows: bool) -> str:
        """Return the text of ids without special tokens; `follows` keeps the space before text behind other text."""
        plain = [token for token in ids if token not in self._special]
        if not follows:
            text: str = self.tokenizer.decode(plain)
            return text
        both: str = self.tokenizer.decode([*self._anchor, *plain])
        return both[len(self.tokenizer.decode(self._anchor)) :]

    def pieces(self, ids: list[int]) -> list[str | None]:
        """Return the part of the text that each token stands for, None for [MASK].

        A token is decoded behind those before it, as spaces and letters of several bytes are spread over tokens; a
        letter belongs to the token that completes it.
        """
        pieces: list[str | None] = []
        run: list[int] = []  # what a token is decoded behind
        said = 0  # letters of that which are in pieces already
        for place, token in enumerate(ids):
            if token == self.mask_id:
                pieces.append(None)
                run = []
                continue
            if not run:
                run = list(self._anchor) if place else []
                said = len(self.tokenizer.decode(run)) if run else 0
            run.append(token)
            text: str = self.tokenizer.decode(run)
            last = place + 1 == len(ids) or ids[place + 1] == self.mask_id
            if text.endswith("\ufffd") and not last:
                pieces.append("")
                continue
            pieces.append(text[said:])
            run = [token] if not text.endswith("\ufffd") else []
            said = len(self.tokenizer.decode(run)) if run else 0
        return pieces
