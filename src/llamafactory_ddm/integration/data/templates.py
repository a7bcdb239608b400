"""Templates that LLaMA-Factory lacks: DiffuLLaMA's instruction format, and the chat formats of LLaDA and Dream."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

from llamafactory.data.formatter import EmptyFormatter, StringFormatter
from llamafactory.data.template import TEMPLATES, Template, register_template

DIFFULLAMA = "diffullama"
N_SPECIAL = 3  # bos, sep, eos
_UNLIMITED = 2**30  # tokens


@dataclass
class DiffuLlamaTemplate(Template):  # type: ignore[misc]
    """`[bos] prompt [sep] response [eos]`, the prompt truncated on the left and the response on the right.

    Attributes:
        sep_token: spelling of [sep] in the vocabulary.
        cutoff_len: number of tokens to which a row is truncated; None for no truncation.
    Source: DiffuLLaMA (arXiv 2410.17891), the data format of its finetuning code.
    Deviates: if the response fills the row, the prompt is dropped; the published code keeps the whole prompt and
        drops the end of the response.
    """

    sep_token: str | None = None
    cutoff_len: int | None = None

    def encode_oneturn(
        self, tokenizer: Any, messages: list[dict[str, str]], system: str | None = None, tools: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the ids `[bos] prompt [sep]` and `response [eos]`, without upstream's helpers, which may change.

        Raises:
            ValueError: if the example is not one prompt and one response, or sep_token is not set.
        """
        if len(messages) != 2 or tools:
            raise ValueError(
                f"template: {DIFFULLAMA} takes one prompt and one response, but an example has {len(messages)} "
                f"messages{' and tools' if tools else ''}; set the template of a chat model"
            )
        if self.sep_token is None:
            raise ValueError(f"template: {DIFFULLAMA} needs sep_token, the token between prompt and response")
        prompt = tokenizer.encode((system or self.default_system) + messages[0]["content"], add_special_tokens=False)
        response = tokenizer.encode(messages[1]["content"], add_special_tokens=False)
        if self.cutoff_len is not None:
            room = self.cutoff_len - N_SPECIAL
            response = response[:room]
            prompt = prompt[max(0, len(prompt) - (room - len(response))) :]
        bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        sep = tokenizer.convert_tokens_to_ids(self.sep_token)
        return [*bos, *prompt, sep], [*response, tokenizer.eos_token_id]

    def encode_multiturn(
        self,
        tokenizer: Any,
        messages: list[dict[str, str]],
        system: str | None = None,
        tools: str | None = None,
        discarding_history_cot: bool = False,
    ) -> list[tuple[list[int], list[int]]]:
        """Return the ids of the only turn."""
        return [self.encode_oneturn(tokenizer, messages, system, tools)]

    def fix_jinja_template(self, tokenizer: Any) -> None:
        """Store the format as the tokenizer's chat template, once sep_token is set.

        If the text of [sep] is not read as its token, the tokenizer gets none, since it would format other prompts.
        """
        if self.sep_token is None:
            return
        tokenizer.chat_template = self._get_jinja_template(tokenizer)
        turn = [{"role": "user", "content": "a"}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        untruncated = replace(self, cutoff_len=None)
        expected, _ = untruncated.encode_oneturn(tokenizer, [*turn, {"role": "assistant", "content": "a"}])
        if tokenizer.encode(text, add_special_tokens=False) != expected:
            tokenizer.chat_template = None

    def _get_jinja_template(self, tokenizer: Any) -> str:
        """Return the chat template `[bos] system prompt [sep] response [eos]`; a second prompt is an error."""
        bos = tokenizer.bos_token if tokenizer.bos_token_id is not None else ""
        sep = tokenizer.decode([tokenizer.convert_tokens_to_ids(self.sep_token)])
        bos, sep, eos, system = (json.dumps(text) for text in (bos, sep, tokenizer.eos_token, self.default_system))
        error = json.dumps(f"template: {DIFFULLAMA} takes one prompt and one response")
        return (
            f"{{% if messages | selectattr('role', 'equalto', 'user') | list | length != 1 %}}"
            f"{{{{ raise_exception({error}) }}}}{{% endif %}}{{{{ {bos} }}}}"
            f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system} }}}}{{% endif %}}"
            "{% for message in messages %}{{ message['content'] }}"
            f"{{% if message['role'] == 'user' %}}{{{{ {sep} }}}}"
            f"{{% elif message['role'] == 'assistant' %}}{{{{ {eos} }}}}{{% endif %}}{{% endfor %}}"
        )


def takes_one_question(template: Any) -> bool:
    """Tell whether a template formats one question without the messages before it."""
    return isinstance(template, DiffuLlamaTemplate)


def without_truncation(template: Any) -> Any:
    """Return the template without truncation of prompt and response."""
    return replace(template, cutoff_len=None) if isinstance(template, DiffuLlamaTemplate) else template


def without_cutoff(data_args: Any) -> Any:
    """Return a copy of the data arguments whose cutoff_len truncates nothing."""
    unlimited = copy.copy(data_args)
    unlimited.cutoff_len = _UNLIMITED
    return unlimited


def register_templates() -> None:
    """Register the templates with LLaMA-Factory; a second call changes nothing."""
    if DIFFULLAMA not in TEMPLATES:
        register_template(
            name=DIFFULLAMA,
            format_user=StringFormatter(slots=["{{content}}"]),
            format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
            template_class=DiffuLlamaTemplate,
        )
    if "llada" not in TEMPLATES:
        _register_chat("llada", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", has_bos=True)
    if "dream" not in TEMPLATES:
        _register_chat(
            "dream", "<|im_start|>{role}\n", "<|im_end|>", separator="\n", system="You are a helpful assistant."
        )


def _register_chat(
    name: str, header: str, end: str, *, separator: str = "", has_bos: bool = False, system: str = ""
) -> None:
    """Register a chat template whose turns are header, content, `end` and separator; `end` also ends generation.

    Source: the published chat templates of LLaDA-8B-Instruct and Dream-v0-Instruct-7B.
    """
    user, assistant, system_turn = (header.format(role=role) for role in ("user", "assistant", "system"))
    register_template(
        name=name,
        format_user=StringFormatter(slots=[f"{user}{{{{content}}}}{end}{separator}{assistant}"]),
        format_assistant=StringFormatter(slots=[f"{{{{content}}}}{end}{separator}"]),
        format_system=StringFormatter(slots=[f"{system_turn}{{{{content}}}}{end}{separator}"]),
        format_prefix=EmptyFormatter(slots=[{"bos_token"}]) if has_bos else None,
        default_system=system,
        stop_words=[end],
        replace_eos=True,
    )
