"""LLaMA-Factory's templates recorded as parts of a prompt, so that they can be applied without LLaMA-Factory."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.template import TEMPLATES

from ...modeling.prompt_template import Part, PromptTemplate
from ...utils.registry import did_you_mean
from .templates import DIFFULLAMA, register_templates, without_cut

_WORDS = "\x00prompt\x00"  # stands for the user's text


def recorded(template: Any, tokenizer: Any, name: str | None) -> PromptTemplate:
    """Return the prompt of one turn that a template makes in training.

    Args:
        template: LLaMA-Factory's.
        tokenizer: the tokenizer, with the template's tokens.
        name: name of the template.
    """
    recorder = _Recorder(tokenizer)
    turns = [{"role": "user", "content": _WORDS}, {"role": "assistant", "content": ""}]
    (ids, _), *_ = without_cut(template).encode_multiturn(recorder, turns, None, None)
    return PromptTemplate(name, tuple(recorder.parts[number] for number in ids))


def named_template(name: str, tokenizer: Any) -> tuple[PromptTemplate, tuple[str, ...]]:
    """Return LLaMA-Factory's template with this name, and the tokens that end its answers.

    Raises:
        ValueError: if there is no such template, or it needs tokens that the tokenizer lacks.
    """
    register_templates()
    if name not in TEMPLATES or name == DIFFULLAMA:
        hint = did_you_mean(name, set(TEMPLATES) - {DIFFULLAMA})
        why = "needs the sep_token of a model that was finetuned with it" if name == DIFFULLAMA else "does not exist"
        raise ValueError(f"template: {name} {why}{hint}")
    own = copy.deepcopy(tokenizer)
    asked = SimpleNamespace(
        template=name,
        train_on_prompt=False,
        tool_format=None,
        default_system=None,
        enable_thinking=True,
        preserve_thinking=False,
    )
    template = get_template_and_fix_tokenizer(own, asked)
    found = recorded(template, own, name)
    written = "".join(part.token or "".join(part.text) for part in found.parts)
    lacking = sorted(token for token in own.get_vocab().keys() - tokenizer.get_vocab().keys() if token in written)
    if lacking:
        raise ValueError(
            f"template: {name} writes {', '.join(lacking)}, which this model has no token for; take the template that "
            "the model was trained with"
        )
    return found, end_tokens(template, own)


def end_tokens(template: Any, tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens that end an answer: EOS and the template's stop words that are in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    words = dict.fromkeys([tokenizer.eos_token, *template.stop_words])
    return tuple(str(word) for word in words if word in vocabulary)


class _Recorder:
    """A tokenizer that records what it encodes; an id is an index into the record."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.parts: list[Part] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def _noted(self, part: Part) -> int:
        self.parts.append(part)
        return len(self.parts) - 1

    @property
    def bos_token_id(self) -> int | None:
        token = self._tokenizer.bos_token
        return None if token is None else self._noted(Part(str(token)))

    @property
    def eos_token_id(self) -> int | None:
        token = self._tokenizer.eos_token
        return None if token is None else self._noted(Part(str(token)))

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._noted(Part(token))

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [self._noted(Part(None, tuple(text.split(_WORDS))))] if text else []
