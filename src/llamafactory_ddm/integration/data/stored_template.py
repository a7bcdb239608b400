"""Records LLaMA-Factory's templates as parts of a prompt, so that they can be applied without LLaMA-Factory."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.template import TEMPLATES

from ...modeling.prompt_template import Part, PromptTemplate
from ...utils.registry import did_you_mean
from .templates import DIFFULLAMA, register_templates, without_truncation

_PLACEHOLDER = "\x00prompt\x00"  # stands for the user's text


def record_template(template: Any, tokenizer: Any, name: str | None) -> PromptTemplate:
    """Return the prompt of one turn, as the template formats it in training.

    Args:
        template: LLaMA-Factory's.
        tokenizer: the tokenizer, with the template's tokens.
        name: name of the template.
    """
    recorder = _Recorder(tokenizer)
    turns = [{"role": "user", "content": _PLACEHOLDER}, {"role": "assistant", "content": ""}]
    (ids, _), *_ = without_truncation(template).encode_multiturn(recorder, turns, None, None)
    return PromptTemplate(name, tuple(recorder.parts[number] for number in ids))


def load_template(name: str, tokenizer: Any) -> tuple[PromptTemplate, tuple[str, ...]]:
    """Return LLaMA-Factory's template with this name, and the tokens that end its answers.

    Raises:
        ValueError: if there is no such template, or it needs tokens that the tokenizer lacks.
    """
    register_templates()
    if name not in TEMPLATES or name == DIFFULLAMA:
        hint = did_you_mean(name, set(TEMPLATES) - {DIFFULLAMA})
        cause = "needs the sep_token of a model that was finetuned with it" if name == DIFFULLAMA else "does not exist"
        raise ValueError(f"template: {name} {cause}{hint}")
    extended = copy.deepcopy(tokenizer)  # the template may add tokens
    template_args = SimpleNamespace(
        template=name,
        train_on_prompt=False,
        tool_format=None,
        default_system=None,
        enable_thinking=True,
        preserve_thinking=None,  # upstream's default from 0.9.6 on: the template decides; in 0.9.5: False
        reasoning_effort="xhigh",  # upstream's default from 0.9.6 on
    )
    template = get_template_and_fix_tokenizer(extended, template_args)
    recorded = record_template(template, extended, name)
    spelling = "".join(part.token or "".join(part.text) for part in recorded.parts)
    added = extended.get_vocab().keys() - tokenizer.get_vocab().keys()
    missing = sorted(token for token in added if token in spelling)
    if missing:
        raise ValueError(
            f"template: {name} uses {', '.join(missing)}, which this model's vocabulary lacks; set the template that "
            "the model was trained with"
        )
    return recorded, end_tokens(template, extended)


def end_tokens(template: Any, tokenizer: Any) -> tuple[str, ...]:
    """Return the tokens that end an answer: EOS and the template's stop words that are in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    words = dict.fromkeys([tokenizer.eos_token, *template.stop_words])
    return tuple(str(word) for word in words if word in vocabulary)


class _Recorder:
    """A tokenizer that records what it encodes; the ids it returns are indices into `parts`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.parts: list[Part] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def _record(self, part: Part) -> int:
        self.parts.append(part)
        return len(self.parts) - 1

    @property
    def bos_token_id(self) -> int | None:
        token = self._tokenizer.bos_token
        return None if token is None else self._record(Part(str(token)))

    @property
    def eos_token_id(self) -> int | None:
        token = self._tokenizer.eos_token
        return None if token is None else self._record(Part(str(token)))

    def convert_tokens_to_ids(self, token: str) -> int:
        return self._record(Part(token))

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [self._record(Part(None, tuple(text.split(_PLACEHOLDER))))] if text else []
