"""The checkpoint stores its start and end tokens; the template of a later run does not change them."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from llamafactory_ddm import load
from llamafactory_ddm.generation import generator as generation
from llamafactory_ddm.integration.resolve import start_and_end
from llamafactory_ddm.modeling.diffusion_config import FILE_NAME, DiffusionConfig
from support.chat import PAIR, TEXT, run_keys, save_data, save_decoder
from support.cli import predictions

CONFIG = DiffusionConfig("<|mask|>", 742, True, "masked", 0.0, "linear", 1.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model without BOS, like Qwen; data; and a model trained on documents without a template."""
    folder = tmp_path_factory.mktemp("ends")
    save_decoder(folder / "model", bos=False)
    save_data(
        folder / "data",
        text=([{"text": "Tom saw a cat."}] * 8, TEXT),
        one=([{"q": "Tom saw a cat.", "a": "It was red."}] * 16, PAIR),
    )
    train(folder / "trained", folder, stage="ddm", dataset="text")
    return folder


def train(folder, work, **keys):
    return run_keys(
        folder, **{"do_train": True, "model_name_or_path": work / "model", "dataset_dir": work / "data", **keys}
    )


@pytest.fixture
def seen(monkeypatch):
    """Start token and end tokens of each generator that a run builds."""
    tokens, original = [], generation.TextGenerator.__init__

    def init(self, *args, **named):
        original(self, *args, **named)
        names = self.tokenizer.convert_ids_to_tokens
        tokens.append((names(self.start_id), set(names(self.eos_ids))))

    monkeypatch.setattr(generation.TextGenerator, "__init__", init)
    return tokens


def without_tokens(source, target):
    """Copy a checkpoint as written by a version that did not store these keys."""
    shutil.copytree(source, target)
    raw = json.loads((target / FILE_NAME).read_text())
    for key in ("start_token", "start_token_id", "end_tokens", "end_token_ids", "template"):
        del raw[key]
    (target / FILE_NAME).write_text(json.dumps(raw))
    return target


def test_documents_keep_their_start_and_end_under_another_template(work, tmp_path, seen, told):
    config = DiffusionConfig.load(work / "trained")
    assert (config.start_token, config.start_token_id) == ("<|endoftext|>", 0)
    assert (config.end_tokens, config.end_token_ids) == (("<|endoftext|>",), (0,))
    keys = {"stage": "ddm", "model_name_or_path": work / "trained", "cutoff_len": 12}
    for template in (None, "qwen3_nothink"):
        run_keys(tmp_path / f"{template}", do_predict=True, num_samples=1, template=template, **keys)
    assert seen == [("<|endoftext|>", {"<|endoftext|>"})] * 4
    assert "template: qwen3_nothink ends texts with <|im_end|>" in told.text
    load(work / "trained", device="cpu")
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>"})


def test_evaluation_ends_documents_as_training_did(work, tmp_path):
    keys = {"stage": "ddm", "do_eval": True, "model_name_or_path": work / "trained", "eval_dataset": "text"}
    losses = []
    for template in (None, "qwen3_nothink"):
        out = run_keys(tmp_path / f"{template}", dataset_dir=work / "data", template=template, **keys)
        losses.append(json.loads((out / "eval_results.json").read_text())["eval_loss"])
    assert losses[0] == losses[1]


def test_a_checkpoint_of_an_older_version_uses_the_tokenizers(work, tmp_path, seen):
    old = without_tokens(work / "trained", tmp_path / "old")
    keys = {"model_name_or_path": old, "cutoff_len": 48, "dataset_dir": work / "data"}
    run_keys(tmp_path / "noise", stage="ddm", do_predict=True, num_samples=1, template="qwen3_nothink", **keys)
    assert seen[-1] == ("<|im_end|>", {"<|im_end|>"})
    run_keys(tmp_path / "x", stage="ddm-sft", do_predict=True, eval_dataset="one", template="smollm", **keys)
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>", "<|im_end|>"})
    load(old, device="cpu")
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>"})


@pytest.mark.parametrize("packing", [False, True])
def test_stop_words_are_end_tokens(work, tmp_path, seen, packing):
    """The template smollm ends answers with <|im_end|> and leaves EOS as it is."""
    keys = {"stage": "ddm-sft", "template": "smollm", "dataset": "one", "packing": packing, "cutoff_len": 48}
    out = train(tmp_path / "out", work, train_on_padding=False, **keys)
    assert DiffusionConfig.load(out).end_tokens == ("<|endoftext|>", "<|im_end|>")
    load(out, device="cpu")
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>", "<|im_end|>"})


def test_tokens_after_a_stop_word_are_not_part_of_the_answer(work, tmp_path):
    keys = {"stage": "ddm-sft", "template": "smollm", "dataset_dir": work / "data", "cutoff_len": 48}
    learn = {"learning_rate": 1e-2, "max_steps": 120, "per_device_train_batch_size": 8, "antithetic_time": True}
    out = train(tmp_path / "out", work, train_on_padding=False, dataset="one", **keys, **learn)
    out = run_keys(
        tmp_path / "texts",
        do_predict=True,
        model_name_or_path=out,
        eval_dataset="one",
        max_samples=1,
        max_new_tokens=20,
        diffusion_steps=32,
        **keys,
    )
    assert predictions(out) == ["It was red."]


def resolve(template, *, config=CONFIG, finetunes=True, trains=True, padding=None, tokens=()):
    from llamafactory.data import get_template_and_fix_tokenizer

    tokenizer = AutoTokenizer.from_pretrained("data/tiny_gpt2")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|mask|>", *tokens], special_tokens=True)
    if padding:
        tokenizer.pad_token = padding
    args = SimpleNamespace(
        template=template,
        train_on_prompt=False,
        tool_format=None,
        default_system=None,
        enable_thinking=True,
        preserve_thinking=False,
    )
    applied = get_template_and_fix_tokenizer(tokenizer, args)
    resolved = start_and_end.with_start_and_end(config, applied, tokenizer, args, finetunes=finetunes, trains=trains)
    return resolved, applied, tokenizer


@pytest.mark.parametrize("template", ["default", "qwen", "llama3", "gemma2", "glm4", "smollm", "phi4", "empty"])
def test_end_tokens_of_an_answer_are_llamafactorys(template):
    resolved, applied, tokenizer = resolve(template)
    assert set(resolved.end_token_ids) == set(applied.get_stop_token_ids(tokenizer))
    assert list(resolved.end_token_ids) == tokenizer.convert_tokens_to_ids(list(resolved.end_tokens))
    assert resolved.end_tokens[0] == tokenizer.eos_token


def test_a_run_that_trains_adds_its_end_tokens_and_another_keeps_the_checkpoints():
    before, *_ = resolve(None, finetunes=False)
    assert (before.start_token, before.end_tokens) == ("<|endoftext|>", ("<|endoftext|>",))
    after, *_ = resolve("qwen", config=before)
    assert (after.start_token, after.end_tokens) == ("<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))
    used, *_ = resolve("gemma2", config=after, trains=False, tokens=["<end_of_turn>"])
    assert used.end_tokens == ("<|im_end|>", "<|endoftext|>", "<eos>", "<end_of_turn>")
    assert resolve("gemma2", config=after, trains=False, finetunes=False)[0] == after


def test_trained_padding_is_an_end_token():
    resolved, _, tokenizer = resolve("qwen", padding="<|pad|>", tokens=["<|pad|>"])
    assert start_and_end.with_padding(resolved, tokenizer) == resolved  # without train_on_padding
    trained = start_and_end.with_padding(replace(resolved, train_on_padding=True), tokenizer)
    assert trained.end_tokens == (*resolved.end_tokens, "<|pad|>")
    assert trained.end_token_ids[-1] == tokenizer.convert_tokens_to_ids("<|pad|>")


def test_padding_that_is_a_word_is_no_end_token():
    """Some models have "!" as padding: "Hello! How are you" does not end after its first word."""
    resolved, _, tokenizer = resolve("qwen", padding="!")
    assert (
        start_and_end.with_padding(replace(resolved, train_on_padding=True), tokenizer).end_tokens
        == resolved.end_tokens
    )


def test_documents_with_template_llama3_end_as_in_llamafactory():
    resolved, *_ = resolve("llama3", finetunes=False, tokens=["<|end_of_text|>"])
    assert resolved.end_tokens == ("<|eot_id|>", "<|end_of_text|>")
