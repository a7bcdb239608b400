"""How a finetuned model's prompts are written: what stands around the user's words, as tokens and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """One token, or a text.

    Attributes:
        token: spelling of a token of the vocabulary; None for a text.
        text: what stands before and behind the user's words, which are encoded together with it; a single item is
            text without them. Empty for a token.
    """

    token: str | None
    text: tuple[str, ...] = ()

    @classmethod
    def read(cls, raw: Any) -> Part:
        """Return what a JSON file holds of a part.

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
            raise ValueError(f"{raw!r} is no part of a template")
        return cls(token, tuple(text))


@dataclass(frozen=True)
class PromptTemplate:
    """What a prompt of one turn consists of, in order; no more is needed to write one.

    Attributes:
        name: of the template in LLaMA-Factory; None where it had none.
        parts: tokens and texts.
    """

    name: str | None
    parts: tuple[Part, ...]

    @classmethod
    def read(cls, raw: Any) -> PromptTemplate:
        """Return what a JSON file holds of a template.

        Raises:
            ValueError: if it holds something else.
        """
        if not isinstance(raw, Mapping) or set(raw) != {"name", "parts"} or not isinstance(raw["parts"], list):
            raise ValueError(f"{raw!r} is no template")
        if not isinstance(raw["name"], str | None):
            raise ValueError(f"{raw['name']!r} is no name of a template")
        return cls(raw["name"], tuple(map(Part.read, raw["parts"])))

    def ids(self, prompt: str, *, encode: Callable[[str], list[int]], token_id: Callable[[str], int]) -> list[int]:
        """Return the ids of a prompt.

        Args:
            prompt: the user's words.
            encode: gives the ids of a text, without special tokens around it.
            token_id: gives the id of a token.
        """
        ids: list[int] = []
        for part in self.parts:
            text = prompt.join(part.text)
            if part.token is not None:
                ids.append(token_id(part.token))
            elif text:
                ids += encode(text)
        return ids
