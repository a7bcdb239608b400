"""What texts start from and end with is a fact of the checkpoint, whatever the template of a later run says."""

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
    """A folder with a model that has no bos, as Qwen, and data; and one trained on documents, without a template."""
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
    """Start and ends of each generator that a run makes."""
    found, original = [], generation.TextGenerator.__init__

    def init(self, *args, **named):
        original(self, *args, **named)
        names = self.tokenizer.convert_ids_to_tokens
        found.append((names(self.start_id), set(names(self.eos_ids))))

    monkeypatch.setattr(generation.TextGenerator, "__init__", init)
    return found


def without_facts(source, target):
    """Copy a checkpoint as it was written before these facts were remembered."""
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
    assert "qwen3_nothink ends texts with <|im_end|>, but the checkpoint was trained to end them with" in told.text
    load(work / "trained", device="cpu")
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>"})


def test_evaluation_ends_documents_as_training_did(work, tmp_path):
    keys = {"stage": "ddm", "do_eval": True, "model_name_or_path": work / "trained", "eval_dataset": "text"}
    losses = []
    for template in (None, "qwen3_nothink"):
        out = run_keys(tmp_path / f"{template}", dataset_dir=work / "data", template=template, **keys)
        losses.append(json.loads((out / "eval_results.json").read_text())["eval_loss"])
    assert losses[0] == losses[1]


def test_a_checkpoint_from_before_takes_the_tokenizers(work, tmp_path, seen):
    old = without_facts(work / "trained", tmp_path / "old")
    keys = {"model_name_or_path": old, "cutoff_len": 48, "dataset_dir": work / "data"}
    run_keys(tmp_path / "noise", stage="ddm", do_predict=True, num_samples=1, template="qwen3_nothink", **keys)
    assert seen[-1] == ("<|im_end|>", {"<|im_end|>"})
    run_keys(tmp_path / "x", stage="ddm-sft", do_predict=True, eval_dataset="one", template="smollm", **keys)
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>", "<|im_end|>"})
    load(old, device="cpu")
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>"})


@pytest.mark.parametrize("packing", [False, True])
def test_stop_words_are_ends(work, tmp_path, seen, packing):
    """smollm's answers end with <|im_end|>, and its tokenizer's own end stays what it was."""
    keys = {"stage": "ddm-sft", "template": "smollm", "dataset": "one", "packing": packing, "cutoff_len": 48}
    out = train(tmp_path / "out", work, train_on_padding=False, **keys)
    assert DiffusionConfig.load(out).end_tokens == ("<|endoftext|>", "<|im_end|>")
    load(out, device="cpu")
    assert seen[-1] == ("<|endoftext|>", {"<|endoftext|>", "<|im_end|>"})


def test_what_is_written_behind_a_stop_word_is_no_answer(work, tmp_path):
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


def facts(template, *, config=CONFIG, finetunes=True, trains=True, padding=None, tokens=()):
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
    found = get_template_and_fix_tokenizer(tokenizer, args)
    settled = start_and_end.with_start_and_end(config, found, tokenizer, args, finetunes=finetunes, trains=trains)
    return settled, found, tokenizer


@pytest.mark.parametrize("template", ["default", "qwen", "llama3", "gemma2", "glm4", "smollm", "phi4", "empty"])
def test_ends_of_an_answer_are_upstreams(template):
    settled, found, tokenizer = facts(template)
    assert set(settled.end_token_ids) == set(found.get_stop_token_ids(tokenizer))
    assert list(settled.end_token_ids) == tokenizer.convert_tokens_to_ids(list(settled.end_tokens))
    assert settled.end_tokens[0] == tokenizer.eos_token


def test_a_run_that_trains_adds_its_ends_and_one_that_does_not_keeps_those_of_the_checkpoint():
    before, *_ = facts(None, finetunes=False)
    assert (before.start_token, before.end_tokens) == ("<|endoftext|>", ("<|endoftext|>",))
    after, *_ = facts("qwen", config=before)
    assert (after.start_token, after.end_tokens) == ("<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))
    used, *_ = facts("gemma2", config=after, trains=False, tokens=["<end_of_turn>"])
    assert used.end_tokens == ("<|im_end|>", "<|endoftext|>", "<eos>", "<end_of_turn>")
    assert facts("gemma2", config=after, trains=False, finetunes=False)[0] == after


def test_padding_that_is_learnt_ends_a_text_too():
    settled, _, tokenizer = facts("qwen", padding="<|pad|>", tokens=["<|pad|>"])
    hidden = start_and_end.with_padding(settled, tokenizer)
    assert hidden == settled  # nothing says that it is trained
    learnt = start_and_end.with_padding(replace(settled, train_on_padding=True), tokenizer)
    assert learnt.end_tokens == (*settled.end_tokens, "<|pad|>")
    assert learnt.end_token_ids[-1] == tokenizer.convert_tokens_to_ids("<|pad|>")


def test_padding_that_is_a_word_ends_nothing():
    """Some models have "!" as their padding: "Hello! How are you" does not end behind its first word."""
    settled, _, tokenizer = facts("qwen", padding="!")
    assert (
        start_and_end.with_padding(replace(settled, train_on_padding=True), tokenizer).end_tokens == settled.end_tokens
    )


def test_documents_under_llama3_end_as_upstream_ends_them():
    settled, *_ = facts("llama3", finetunes=False, tokens=["<|end_of_text|>"])
    assert settled.end_tokens == ("<|eot_id|>", "<|end_of_text|>")
