"""DiffuLLaMA's format against a reference in plain Python, and the chats of LLaDA and Dream against the published."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from llamafactory.data.template import TEMPLATES, Template

from llamafactory_ddm.integration.data.templates import register_templates, without_truncation
from support.tiny import tiny_tokenizer

register_templates()
register_templates()
TOKENIZER = tiny_tokenizer()
TEMPLATE = replace(TEMPLATES["diffullama"], sep_token="Ċ")
END, SEP = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("Ċ")


def encode(prompt, response, cutoff_len, **keys):
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return replace(TEMPLATE, cutoff_len=cutoff_len, **keys).encode_multiturn(TOKENIZER, messages)


@given(st.text(alphabet="cat dog", max_size=12), st.text(alphabet="cat dog", max_size=12), st.integers(4, 24))
def test_prompt_and_response_are_truncated_as_published(prompt, response, cutoff_len):
    source = TOKENIZER.encode(prompt, add_special_tokens=False)
    target = TOKENIZER.encode(response, add_special_tokens=False)[: cutoff_len - 3]
    keep = cutoff_len - 3 - len(target)
    source = source[-keep:] if keep else []
    assert encode(prompt, response, cutoff_len) == [([END, *source, SEP], [*target, END])]


def test_the_format_does_not_depend_on_what_upstreams_helper_returns(monkeypatch):
    """A later LLaMA-Factory may return a set beside the parts of a chat, as a draft of it does."""

    def encode_multiturn(self, tokenizer, messages, system=None, tools=None, discarding_history_cot=False):
        parts, _ = self._encode(tokenizer, messages, system, tools)
        return list(zip(parts[::2], parts[1::2], strict=True))

    monkeypatch.setattr(Template, "encode_multiturn", encode_multiturn)
    monkeypatch.setattr(Template, "encode_oneturn", lambda self, *args: encode_multiturn(self, *args)[0])
    turn = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    cat, dog = (TOKENIZER.encode(text, add_special_tokens=False) for text in ("cat", "dog"))
    pair = [END, *cat, SEP], [*dog, END]
    assert TEMPLATE.encode_oneturn(TOKENIZER, turn) == pair
    assert TEMPLATE.encode_multiturn(TOKENIZER, turn, None, None, True) == [pair]


def test_without_truncation_nothing_is_lost():
    [(prompt, response)] = without_truncation(replace(TEMPLATE, cutoff_len=5)).encode_multiturn(
        TOKENIZER, [{"role": "user", "content": "cat" * 9}, {"role": "assistant", "content": "dog" * 9}]
    )
    assert (len(prompt), len(response)) == (11, 10)
    assert without_truncation(TEMPLATES["alpaca"]) is TEMPLATES["alpaca"]


def test_examples_that_do_not_fit_the_format():
    turn = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    with pytest.raises(ValueError, match=r"template: diffullama .*4 messages"):
        TEMPLATE.encode_multiturn(TOKENIZER, turn * 2)
    with pytest.raises(ValueError, match=r"template: diffullama .*sep_token"):
        TEMPLATES["diffullama"].encode_multiturn(TOKENIZER, turn)


@pytest.mark.parametrize("system", ["", "do 'it'\\n"])
def test_the_tokenizer_formats_prompts_as_training_does(system):
    tokenizer = tiny_tokenizer()
    replace(TEMPLATE, default_system=system).fix_jinja_template(tokenizer)
    turn = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]
    [(prompt, response)] = replace(TEMPLATE, default_system=system).encode_multiturn(tokenizer, turn)
    ids = tokenizer.apply_chat_template(turn[:1], add_generation_prompt=True, return_dict=False)
    assert ids == prompt
    assert tokenizer.apply_chat_template(turn, return_dict=False) == prompt + response
    spoken = [{"role": "system", "content": "a"}, *turn[:1]]
    [(prompt, _)] = TEMPLATE.encode_multiturn(tokenizer, turn, system="a")
    assert tokenizer.apply_chat_template(spoken, return_dict=False) == prompt
    with pytest.raises(TemplateError, match="diffullama"):
        tokenizer.apply_chat_template(turn * 2)


def test_a_separator_that_no_text_is_read_as_leaves_the_tokenizer_without_a_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    replace(TEMPLATE, sep_token="Å").fix_jinja_template(tokenizer)  # a byte that is no character of its own
    assert tokenizer.chat_template is None


def test_the_chats_of_llada_and_dream():
    """Turn by turn; the token that ends a turn is EOS."""
    tokenizer = tiny_tokenizer()
    turns = [
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]

    def encoded(name, **keys):
        pairs = TEMPLATES[name].encode_multiturn(tokenizer, turns, **keys)
        return [tokenizer.decode(part) for pair in pairs for part in pair]

    def llada(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    assert encoded("llada") == [
        f"<|endoftext|>{llada('user')}cat<|eot_id|>{llada('assistant')}",
        "dog<|eot_id|>",
        f"{llada('user')}a<|eot_id|>{llada('assistant')}",
        "b<|eot_id|>",
    ]
    assert encoded("llada", system="do")[0].startswith(f"<|endoftext|>{llada('system')}do<|eot_id|>{llada('user')}cat")
    assert encoded("dream") == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\ncat<|im_end|>\n<|im_start|>assistant\n",
        "dog<|im_end|>\n",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b<|im_end|>\n",
    ]
    for name, end in (("llada", "<|eot_id|>"), ("dream", "<|im_end|>")):
        tokenizer = tiny_tokenizer()
        TEMPLATES[name].fix_special_tokens(tokenizer)
        assert tokenizer.eos_token == end
