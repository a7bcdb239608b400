"""Ids to text and back, for text in parts: what follows other text, and what each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .control_tokens import control_texts, reading_as_text


class TextCodec:
    """A tokenizer, seen as what turns the parts of a text into ids and back."""

    def __init__(self, tokenizer: Any, mask_id: int, end_ids: Sequence[int] = (), pad_ids: Sequence[int] = ()) -> None:
        """Wrap a Hugging Face tokenizer.

        Args:
            tokenizer: of the model.
            mask_id: of [MASK], which stands for no text.
            end_ids: of ends and pads, which stand for none either.
            pad_ids: those of them whose spelling in a text is text, as that of [MASK] is.
        """
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self._special = {*tokenizer.all_special_ids, mask_id, *end_ids, *pad_ids}
        names = (str(tokenizer.convert_ids_to_tokens(index)) for index in (mask_id, *pad_ids))
        self.controls = control_texts(tokenizer, list(names))
        self._reader: Any = None
        # What a text is decoded behind, as some tokenizers drop the space before the first token of a text.
        self._anchor = self.encode("a")[-1:]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens of the tokenizer's own; [MASK] and pads are mere text."""
        reader = self.tokenizer
        if self.holds_control(text):
            reader = self._reader = self._reader or reading_as_text(self.tokenizer, self.controls)
        ids: list[int] = reader.encode(text, add_special_tokens=False)
        return ids

    def holds_control(self, text: str) -> bool:
        """Tell whether the spelling of [MASK] or of a pad token stands in a text."""
        return any(token in text for token in self.controls)

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
