"""The prompt template of a finetuned model: the tokens and text around the user's prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One token, or a piece of text.

    Attributes:
        token: spelling of a token of the vocabulary; None for text.
        text: the text before and after the user's prompt, which are encoded together; a single item is text without
            the prompt. Empty for a token.
    """

    token: str | None
    text: tuple[str, ...] = ()

    @classmethod
    def read(cls, raw: Any) -> Part:
        """Return the part that a JSON object describes.

        Raises:
            ValueError: if it holds something else.
        """
        token, text = (raw.get("token"), raw.get("text")) if isinstance(raw, Mapping) else (None, None)
        is_text = isinstance(text, list) and all(isinstance(item, str) for item in text)
        if (
            not isinstance(text, list)
            or not is_text
            or not isinstance(token, str | None)
            or (token is None) != bool(text)
        ):
            raise ValueError(f"{raw!r} is not a part of a template")
        return cls(token, tuple(text))


@dataclass(frozen=True)
class PromptTemplate:
    """The parts of a prompt of one turn, in order.

    Attributes:
        name: LLaMA-Factory's name of the template; None if it had none.
        parts: tokens and texts.
    """

    name: str | None
    parts: tuple[Part, ...]

    @classmethod
    def read(cls, raw: Any) -> PromptTemplate:
        """Return the template that a JSON object describes.

        Raises:
            ValueError: if it holds something else.
        """
        if not isinstance(raw, Mapping) or set(raw) != {"name", "parts"} or not isinstance(raw["parts"], list):
            raise ValueError(f"{raw!r} is not a template")
        if not isinstance(raw["name"], str | None):
            raise ValueError(f"name {raw['name']!r} must be text or null")
        return cls(raw["name"], tuple(map(Part.read, raw["parts"])))

    def ids(self, prompt: str, *, encode: Callable[[str], list[int]], token_id: Callable[[str], int]) -> list[int]:
        """Return the ids of a prompt.

        Args:
            prompt: the user's text.
            encode: text to ids, without special tokens around it.
            token_id: spelling of a token to its id.
        """
        ids: list[int] = []
        for part in self.parts:
            text = prompt.join(part.text)
            if part.token is not None:
                ids.append(token_id(part.token))
            elif text:
                ids += encode(text)
        return ids
