import importlib.util
import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.cli import ROOT

DATA = ROOT / "data"


@pytest.fixture(scope="module")
def texts():
    return {
        split: [
            json.loads(line)["text"]
            for line in (DATA / f"tiny_corpus_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for split in ("train", "eval")
    }


def test_the_script_writes_the_committed_files(tmp_path):
    spec = importlib.util.spec_from_file_location("make_corpus", DATA / "make_corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_corpus"] = module
    spec.loader.exec_module(module)
    module.write(tmp_path)
    for split in ("train", "eval"):
        name = f"tiny_corpus_{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_the_held_out_split_is_held_out(texts):
    assert not set(texts["train"]) & set(texts["eval"])
    assert len(texts["eval"]) > 400
    assert len(set(texts["train"])) == len(texts["train"])


def test_every_sum_is_right(texts):
    sums = 0
    for text in texts["train"] + texts["eval"]:
        for a, sign, b, c in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", text):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            sums += 1
    assert sums > 3000


def test_the_repository_stays_small():
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 10_000_000


def test_the_tokenizer_loses_nothing_and_splits_digits(texts):
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gpt2")
    assert len(tokenizer) <= 1024
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.mask_token is None
    for text in texts["eval"][:100]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("427", add_special_tokens=False)] == ["4", "2", "7"]


def test_the_script_trains_the_committed_tokenizer(tmp_path, monkeypatch, texts):
    """Also that a renamed place is one token, as the others are."""
    monkeypatch.syspath_prepend(str(DATA))
    monkeypatch.setattr(sys, "argv", ["make_tokenizer.py", "--out", str(tmp_path)])
    importlib.import_module("make_tokenizer").main()
    made, committed = (folder / "tokenizer.json" for folder in (tmp_path, DATA / "tiny_gpt2"))
    assert json.loads(made.read_text()) == json.loads(committed.read_text())
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gpt2")
    corpus = importlib.import_module("make_corpus")
    for place in {corpus.RENAMED.get(place, place) for place in corpus.PLACES}:
        assert any(f" {place}" in text for text in texts["train"])
        assert len(tokenizer.encode(f" {place}", add_special_tokens=False)) == 1


def test_the_model_knows_the_corpus(texts):
    """Its loss on held-out text is near what data/README.md says; a model that knew word frequencies alone would "
    "have 4.9."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gpt2")
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny_gpt2", torch_dtype=torch.float32).eval()
    total = count = 0
    with torch.inference_mode():
        for text in texts["eval"][:60]:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert total / count < 0.8


def test_the_problems_are_what_their_script_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    module = importlib.import_module("make_problems")
    for split, rows in zip(("train", "eval"), module.problems(), strict=True):
        lines = (DATA / f"tiny_problems_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
        for row in rows:
            sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["output"])
            assert sums
            assert all(int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) for a, sign, b, c in sums)
            assert row["output"].endswith(f"#### {sums[-1][3]}")


@pytest.mark.parametrize(("name", "count"), [("problems", 200), ("answers", 350)])
def test_no_problem_is_in_both_splits(name, count):
    train, held_out = (
        {json.loads(line)["instruction"] for line in (DATA / f"tiny_{name}_{s}.jsonl").read_text().splitlines()}
        for s in ("train", "eval")
    )
    assert len(held_out) == count
    assert not train & held_out


def test_the_answers_are_what_their_script_writes_and_differ_in_length(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    module = importlib.import_module("make_answers")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny_gpt2")
    for split, rows in zip(("train", "eval"), module.answers(), strict=True):
        lines = (DATA / f"tiny_answers_{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
        lengths = [len(tokenizer(row["output"])["input_ids"]) for row in rows]
        assert max(lengths) >= 10 * min(lengths)
        for row in rows:
            numbers = [int(number) for number in re.findall(r"\d+", row["instruction"])]
            things = re.findall(r"\ba (\w+)", row["instruction"])
            listed = re.fullmatch(r"A (\w+(?:, a \w+)*)\.", row["output"])
            if row["instruction"].endswith("Is it an animal?"):
                thing = row["instruction"].split(".")[0].split()[-1]
                assert row["output"] == ("Yes." if thing in module.ANIMALS else "No.")
            else:
                assert listed[1].split(", a ") == (things * sum(numbers) if numbers else things)
