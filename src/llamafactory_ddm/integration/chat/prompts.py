"""The prompt of a chat under LLaMA-Factory's template, in which what users write cannot become a control token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...data.protected_text import ProtectedText, special_texts, without_marks
from ..data.templates import takes_one_question, without_truncation

_A_TOOL = '[{"name": "a", "description": "a", "parameters": {"type": "object", "properties": {}}}]'
_FORMATS = ("prefix", "system", "user", "assistant", "observation", "function")


def control_texts_of(template: Any, tokenizer: Any) -> list[str]:
    """Return the spellings of special tokens, and of other added tokens with which the template marks turns and tools.

    Args:
        template: LLaMA-Factory's.
        tokenizer: the model's, with the template's tokens.
    """
    slots = [slot for name in _FORMATS for slot in getattr(template, f"format_{name}").slots]
    texts = [slot if isinstance(slot, str) else str(dict(slot)) for slot in slots if isinstance(slot, str | dict)]
    for words in (template.stop_words, template.thought_words, getattr(template, "tool_call_words", None)):
        texts += [str(word).strip() for word in words or ()]
    texts += template.format_tools.apply(content=_A_TOOL)
    written = "\n".join(text for text in texts if isinstance(text, str))
    special = special_texts(tokenizer)
    markers = [token for token in tokenizer.get_added_vocab() if re.search(r"\w", token) and token in written]
    return sorted({*special, *markers})


class PromptEncoder:
    """Encodes messages under a template. A template sees it as its tokenizer, so it has all of a tokenizer's names."""

    def __init__(self, template: Any, tokenizer: Any) -> None:
        """Wrap a template.

        Args:
            template: LLaMA-Factory's.
            tokenizer: the model's, with the template's tokens.
        """
        self.template = without_truncation(template)
        self.tokenizer = tokenizer
        self.controls = control_texts_of(template, tokenizer)
        self._special = special_texts(tokenizer)
        self._text = ProtectedText(tokenizer, self.controls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of a text that the template has formatted."""
        return self._text.encode(text)

    def plain(self, text: str) -> str:
        """Return a text that is not formatted, without the characters that stand around control tokens here.

        Raises:
            ValueError: if it spells a control token, and the tokenizer cannot read that as text.
        """
        self._text.check(text)
        return without_marks(text)

    def prompt(self, messages: Sequence[dict[str, str]], system: str | None, tools: str | None) -> list[int]:
        """Return the ids of a chat up to where the next answer starts.

        Args:
            messages: `role` and `content`; roles as LLaMA-Factory names them, the user's and the model's in turn.
            system: the system prompt; None for the template's.
            tools: JSON of the tools.
        Raises:
            ValueError: if the template cannot format them, naming what and why.
        """
        _check_turns(messages)
        if takes_one_question(self.template):
            _check_one_question(messages, tools)
        turns = [{"role": turn["role"], "content": self._protected(turn)} for turn in messages]
        system, tools = (None if text is None else self._text.protect(text) for text in (system, tools))
        try:
            # Templates have no state, so a long chat holds up no other.
            ids, _ = self.template.encode_oneturn(self, [*turns, {"role": "assistant", "content": ""}], system, tools)
        except (RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"messages: the template cannot format these messages or tools ({type(error).__name__}: {detail})"
            ) from error
        return list(ids)

    def _protected(self, turn: dict[str, str]) -> str:
        # An earlier answer of the model may hold the marks of its thoughts and of its calls of tools.
        own = turn["role"] == "assistant"
        return self._text.protect(turn["content"], self._special if own else None)


def _check_one_question(messages: Sequence[dict[str, str]], tools: str | None) -> None:
    if len(messages) > 1:
        raise ValueError(
            f"messages: this model's template takes one question, got {len(messages)} messages; send only the last, "
            "with or without a system prompt"
        )
    if tools:
        raise ValueError("tools: the template of this model has no place for tools; remove them")


def _check_turns(messages: Sequence[dict[str, str]]) -> None:
    if not messages:
        raise ValueError("messages: is empty; give at least one message of role user")
    asking, answering = ("user", "observation"), ("assistant", "function")
    for number, turn in enumerate(messages):
        role, content = turn.get("role"), turn.get("content")
        allowed = asking if number % 2 == 0 else answering
        if role not in allowed:
            raise ValueError(
                f"messages: message {number} has role {role!r} where {' or '.join(allowed)} must follow; roles of "
                "user and assistant alternate, from the user's on"
            )
        if not isinstance(content, str):
            raise ValueError(f"messages: message {number} has no text, but {type(content).__name__}; give its text")
    if len(messages) % 2 == 0:
        raise ValueError("messages: the last message is the model's; end with one of role user (or tool)")
