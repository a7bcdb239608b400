"""Text in which some spellings of control tokens are control, as a template's, and others are a user's words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .control_tokens import HIDDEN, reading_as_text, words_among

# Unicode noncharacters around the number of a control token that a user spelled.
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"
_NONCHARACTERS = re.compile(f"[{HIDDEN}{_OPEN}{_CLOSE}]")
_STAND_IN = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


def special_texts(tokenizer: Any) -> list[str]:
    """Return the spellings of all special tokens that are no ordinary words, EOS and BOS included."""
    added = tokenizer.added_tokens_decoder.values()
    named = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    candidates = sorted(named & tokenizer.get_added_vocab().keys())
    return sorted(set(candidates) - words_among(tokenizer, candidates))


def without_marks(text: str) -> str:
    """Return a text with U+FFFD in place of the noncharacters that stand around control tokens here."""
    return _NONCHARACTERS.sub("\ufffd", text)


class ProtectedText:
    """Encodes text whose control tokens are read as tokens, unless `protect` has made them a user's words."""

    def __init__(self, tokenizer: Any, controls: Sequence[str]) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: a Hugging Face tokenizer.
            controls: spellings of its control tokens.
        """
        self.tokenizer = tokenizer
        self.controls = sorted(controls, key=len, reverse=True)  # the longest match first
        self._number = {token: number for number, token in enumerate(self.controls)}
        self._pattern = _any_of(self.controls)
        self._reader: Any = None

    def protect(self, text: str, controls: Sequence[str] | None = None) -> str:
        """Return a user's text with stand-ins for control tokens, which `encode` reads as their characters.

        Args:
            text: what a user wrote.
            controls: those of `self.controls` that the text may not contain; by default all.
        """
        pattern = self._pattern if controls is None else _any_of(sorted(controls, key=len, reverse=True))
        return pattern.sub(lambda match: f"{_OPEN}{self._number[match[0]]}{_CLOSE}", without_marks(text))

    def check(self, text: str) -> None:
        """Check that the tokenizer can read what a user wrote as text.

        Raises:
            ValueError: naming the control token, if it cannot.
        """
        spelled = self._pattern.search(text)
        if spelled is not None and self._as_text() is self.tokenizer:
            raise ValueError(
                f"the text holds {spelled[0]!r}, which this model's tokenizer reads as a control token; remove it"
            )

    def _as_text(self) -> Any:
        if self._reader is None:
            self._reader = reading_as_text(self.tokenizer, self.controls)
        return self._reader

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens around it.

        Raises:
            ValueError: if a user spelled a control token, and the tokenizer cannot read it as text.
        """
        if _OPEN not in text:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
            return ids
        for number in sorted(set(_STAND_IN.findall(text))):
            self.check(self.controls[int(number)])
        own = self._pattern.sub(lambda match: f"{HIDDEN}{match[0]}{HIDDEN}", text)
        ids = self._as_text().encode(
            _STAND_IN.sub(lambda match: self.controls[int(match[1])], own), add_special_tokens=False
        )
        return ids


def _any_of(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or r"(?!)")
