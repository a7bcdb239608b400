"""A recorded template gives the prompt ids of training, without LLaMA-Factory."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.formatter import EmptyFormatter
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import TEMPLATES
from transformers import AutoTokenizer

from llamafactory_ddm.integration.data import stored_template
from llamafactory_ddm.integration.data.stored_template import load_template, record_template
from llamafactory_ddm.integration.data.templates import register_templates
from llamafactory_ddm.modeling.prompt_template import PromptTemplate

register_templates()
PROMPTS = ["Tom saw a cat.", " two  spaces\n", "{{content}}", "Привет, 你好 🙂", "a <|im_end|> in the text"]


def prepared(name, *, bos=True, **keys):
    tokenizer = AutoTokenizer.from_pretrained("data/tiny_gpt2")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<s>"], special_tokens=True)
    tokenizer.bos_token = "<s>" if bos else None
    args = SimpleNamespace(
        template=name,
        train_on_prompt=False,
        mask_history=False,
        tool_format=None,
        default_system=None,
        enable_thinking=True,
        preserve_thinking=False,
        reasoning_effort="xhigh",
        cutoff_len=10**6,
    )
    vars(args).update(keys)
    template = get_template_and_fix_tokenizer(tokenizer, args)
    if name == "diffullama":
        template = dataclasses.replace(template, sep_token="Ċ")
    return template, tokenizer, args


def by_training(template, tokenizer, args, prompt):
    """Return the ids before the answer in a training row of LLaMA-Factory."""
    if type(template.mm_plugin).__name__ != "BasePlugin":  # the processor would want one for images
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "It was red."}]
        return template.encode_multiturn(tokenizer, turns, None, None)[0][0]
    processor = SupervisedDatasetProcessor(template=template, tokenizer=tokenizer, processor=None, data_args=args)
    turns = [[{"role": "user", "content": prompt}], [{"role": "assistant", "content": "It was red."}]]
    ids, labels = processor._encode_data_example(*turns, "", "", [], [], [])
    return ids[: next(n for n, label in enumerate(labels) if label != -100)]


def check(name, **keys):
    template, tokenizer, args = prepared(name, **keys)
    raw = json.loads(json.dumps(dataclasses.asdict(record_template(template, tokenizer, name))))
    stored = PromptTemplate.read(raw)
    assert stored.name == name

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    for prompt in PROMPTS:
        ids = stored.ids(prompt, encode=encode, token_id=tokenizer.convert_tokens_to_ids)
        assert ids == by_training(template, tokenizer, args, prompt), (name, prompt)


def test_every_template_of_text():
    for name in sorted(TEMPLATES):
        check(name)


@pytest.mark.parametrize("name", ["default", "llama2", "llama3", "gemma2", "glm4", "diffullama", "llada", "dream"])
def test_without_a_bos_token(name):
    check(name, bos=False)


@pytest.mark.parametrize(
    "keys", [{"enable_thinking": False}, {"enable_thinking": None}, {"default_system": "Be kind."}]
)
@pytest.mark.parametrize("name", ["qwen3", "deepseekr1", "qwen", "mistral"])
def test_thinking_and_system_prompts(name, keys, monkeypatch):
    monkeypatch.setattr(
        TEMPLATES[name], "default_system", TEMPLATES[name].default_system
    )  # LLaMA-Factory overwrites it
    check(name, **keys)


def test_a_template_that_reads_how_much_the_model_shall_think(monkeypatch):
    """From 0.9.6 on. With preserve_thinking=None the template decides whether to keep earlier thoughts."""

    def get_template(tokenizer, args):
        template = get_template_and_fix_tokenizer(tokenizer, args)
        assert args.preserve_thinking is None
        return dataclasses.replace(template, format_prefix=EmptyFormatter(slots=[args.reasoning_effort]))

    monkeypatch.setattr(stored_template, "get_template_and_fix_tokenizer", get_template)
    template, _ = load_template("alpaca", AutoTokenizer.from_pretrained("data/tiny_gpt2"))
    assert template.parts[0].text == ("xhigh",)


def test_a_template_by_its_name():
    tokenizer = AutoTokenizer.from_pretrained("data/tiny_gpt2")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    before = dict(tokenizer.get_vocab()), tokenizer.eos_token
    template, end_tokens = load_template("chatml", tokenizer)
    assert template.name == "chatml" and "<|im_end|>" in end_tokens
    assert (dict(tokenizer.get_vocab()), tokenizer.eos_token) == before
    with pytest.raises(ValueError, match=r"template: chatm .*'chatml'"):
        load_template("chatm", tokenizer)
    with pytest.raises(ValueError, match=r"template: diffullama .*sep_token"):
        load_template("diffullama", tokenizer)
    with pytest.raises(ValueError, match=r"template: chatml .*<\|im_end\|>, <\|im_start\|>"):
        load_template("chatml", AutoTokenizer.from_pretrained("data/tiny_gpt2"))
