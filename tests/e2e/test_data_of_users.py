"""Data as users have them: templates, odd files, rows prepared elsewhere."""

import json
import re

import pytest
import torch

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.objectives.masked import MaskedObjective
from support.cli import ABSENT, train_here

CHAT = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}


def turns(*texts):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]}


@pytest.fixture
def write_data(tmp_path):
    """Return a function that writes data sets, name=(rows, entry), and returns their folder."""

    def write(**sets):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        info = {}
        for name, (rows, entry) in sets.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
            info[name] = {"file_name": f"{name}.json", **entry}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return folder

    return write


@pytest.fixture
def batches(monkeypatch):
    """The pairs of clean and noised batches of a run's objective."""
    pairs, inner = [], MaskedObjective.noise

    def noise(self, clean, **keys):
        pairs.append((clean, inner(self, clean, **keys)))
        return pairs[-1][1]

    monkeypatch.setattr(MaskedObjective, "noise", noise)
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, {"packing": True}, {"variable_length": "eos_pad"}])
def test_a_template_that_teaches_eos_at_the_start_of_the_next_turn(finetune, write_data, tmp_path, batches, form):
    """Breeze: the first token of [INST] has the end-of-text token as label; later turns still come after [INST]."""
    folder = write_data(two=([turns("Tom saw a cat.", "red", "Ben saw a dog.", "blue")] * 8, CHAT))
    keys = {"template": "breeze", "sep_token": ABSENT, "dataset": "two", "dataset_dir": folder, "cutoff_len": 96}
    finetune(tmp_path / "out", **keys, eval_dataset=None, max_steps=2, per_device_train_batch_size=2, **form)
    n_masked, n_visible = 0, 0
    for clean, noised in batches:
        is_eos = clean.shown != clean.x_0
        assert bool(is_eos.any()) and bool(clean.maskable[is_eos].all())
        assert set(clean.x_0[is_eos].tolist()) == {0}  # <|endoftext|>
        assert not bool((is_eos & (noised.z_t == clean.x_0)).any())
        n_visible += int((is_eos & (noised.z_t == clean.shown)).sum())
        targets = clean.x_0.clone().fill_(-1)
        targets.view(-1)[noised.head_index + 1] = noised.scored["targets"]
        n_masked += int((targets[is_eos] == 0).sum())
    assert n_masked and n_visible and len(batches) == 2


OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
PAIR = {"columns": {"prompt": "q", "response": "a"}}
GOOD = {"q": "Tom saw a cat.", "a": "red"}


def conversation(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


ANSWERED = conversation(("user", "Hi"), ("assistant", "Ho"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "entry", "words"),
    [
        (
            [ANSWERED, conversation(("user", "Hi"), ("assistant", "Ho"), ("tool", "3"), ("assistant", "3"))],
            OPENAI,
            r"example 1 .*'tool' .*message 2 .*user_tag: user, .*observation_tag: tool$",
        ),
        (
            [ANSWERED, conversation(("user", "Hi"), ("assistant", None))],
            OPENAI,
            r"example 1 .*null .*content .*message 1 .*'assistant'",
        ),
        (
            [ANSWERED, conversation(("user", "Hi"), ("assistant", 7))],
            OPENAI,
            r"example 1 .*number \(7\) .*content .*message 1",
        ),
        ([{"messages": None}, ANSWERED], OPENAI, r"example 0 .*null .*'messages'"),
        ([{"messages": ["Hi", "Ho"]}], OPENAI, r"example 0 .*\(\"Hi\"\) .*message 0"),
        ([conversation(("user", "Hi"))], OPENAI, "example 0 .*roles user;"),
        ([{"messages": []}], OPENAI, "example 0 has no message .*'messages'"),
        (
            [{"conversations": ANSWERED["messages"]}],
            CHAT,
            "example 0 has no 'from' .*message 0 .*'role', 'content'.* role_tag",
        ),
        ([turns("Hi", "Ho"), turns(None, "Ho")], CHAT, r"example 1 .*null .*content .*message 0"),
        ([turns("Hi", "Ho")], OPENAI, "no column 'messages', .*'conversations'"),
        ([GOOD], {"columns": {"prompt": "q", "response": "answer"}}, "no column 'answer', .*response"),
        ([GOOD], {}, "no column 'instruction', .*prompt"),
        ([GOOD, {"q": 5, "a": "red"}], PAIR, r"example 1 .*number \(5\) .*'q'"),
        ([{"q": "Hi", "a": 42}], PAIR, r"example 0 .*number \(42\) .*'a'"),
        ([{"q": ["Hi"], "a": "red"}], PAIR, r"example 0 .*list \(\[\"Hi\"\]\) .*'q'"),
        ([{"q": "Hi", "a": None}], PAIR, "example 0 has no response: .*'a'"),
        (
            [{**GOOD, "h": ["Hello", "Ho"]}],
            {"columns": {"prompt": "q", "response": "a", "history": "h"}},
            r"example 0 .*\(\"Hello\"\) .*'h'",
        ),
        ([GOOD, "red"], PAIR, r"example 1 of .*odd.json .*\(\"red\"\)"),
        ([GOOD], {"formatting": "chat"}, "formatting: chat; .*alpaca"),
        ([GOOD], {"columns": "q"}, "dataset_info.json .*AttributeError"),
    ],
)
def test_data_that_are_not_as_their_entry_says(finetune, write_data, tmp_path, rows, entry, words):
    folder = write_data(odd=(rows, entry))
    keys = {"dataset": "odd", "dataset_dir": folder, "eval_dataset": None, "template": "default", "sep_token": ABSENT}
    with pytest.raises(ValueError, match=f"^dataset: odd:? .*{words}"):
        finetune(tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


CAT = b'{"text": "A cat."}\n'


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "odd.jsonl",
            CAT + b'{"text": "Caf\xe9."}\n',
            r"odd.jsonl is not UTF-8: line 2, byte 14 \(byte 33 .* 0xe9 .*iconv",
        ),
        ("odd.json", '[{"text": "A"}]'.encode("utf-16"), r"odd.json is not UTF-8: line 1, byte 1 .* 0xff"),
        ("odd.csv", b"text\nA cat.\nCaf\xe9.\n", r"odd.csv is not UTF-8: line 3, byte 4 \(byte 16 .* 0xe9"),
        ("odd.txt", b"A cat.\nCaf\xe9.\n", r"odd.txt is not UTF-8: line 2"),
        ("odd.jsonl", CAT + b'{"text": "A dog.}\n', r"odd.jsonl is not JSON: line 2, column 18:"),
        ("odd.json", b'[{"text": "A"},\n {"text" "B"}]', r"odd.json is not JSON: line 2, column 10:"),
        ("odd.jsonl", CAT + b'{"text": 5}\n', r"example 1 .*number \(5\) .*'text'"),
        ("odd.csv", b"text,more\nA cat.,5\nA dog.,6,7\n", "odd.csv .*as csv"),
        ("odd.csv", b"text\n5\n6\n", r"example 0 .*number \(5\) .*'text'"),
        ("odd.parquet", None, r"example 0 .*number \(5\) .*'text'"),
        ("odd.parquet", b"text", "odd.parquet .*as parquet"),
    ],
)
def test_files_that_cannot_be_read(train_small, generate, tmp_path, file, content, words):
    """Both to train on and to generate from."""
    if content is None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [5, 6]}), tmp_path / file)
    else:
        (tmp_path / file).write_bytes(content)
    info = {"odd": {"file_name": file, "columns": {"prompt": "text"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=f"^dataset: odd: .*{words}"):
        train_small(tmp_path / "out", dataset="odd", dataset_dir=tmp_path, eval_dataset=None)
    keys = {"generate_from": "prefix", "eval_dataset": "odd", "dataset_dir": tmp_path}
    with pytest.raises(ValueError, match=f"^dataset: odd: .*{words}"):
        generate(tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_a_mask_token_that_the_data_use(train_small, tmp_path):
    keys = {"mask_token": "Ġa", "max_steps": 1}
    with pytest.raises(ValueError, match=r"mask_token: 'Ġa' .*allow_common_mask_token"):
        train_small(tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()
    train_small(tmp_path / "out", **keys, allow_common_mask_token=True)


@pytest.mark.parametrize("keys", [{}, {"packing": True}, {"template": "default", "sep_token": ABSENT}])
def test_a_cutoff_that_truncates_every_answer(finetune, tmp_path, keys):
    with pytest.raises(ValueError, match=r"cutoff_len: 6 .* 80 of 80 "):
        finetune(tmp_path / "out", cutoff_len=6, eval_dataset=None, **keys)
    assert not (tmp_path / "out").exists()


def test_a_cutoff_that_leaves_no_room_for_an_answer(finetune, tmp_path):
    with pytest.raises(ValueError, match=r"cutoff_len: 3 .* at least"):
        finetune(tmp_path / "out", cutoff_len=3)
    with pytest.raises(ValueError, match=r"cutoff_len: 5 .*at least 6"):
        finetune(tmp_path / "out", cutoff_len=5, packing=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "rows", "words"),
    [
        ("ddm", [{"q": ""}] * 8, "every text"),
        ("ddm-sft", [{"q": "Hi", "a": ""}] * 8, "every response"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_data_without_a_token_to_learn(train_small, finetune, write_data, tmp_path, stage, rows, words, streams):
    folder = write_data(
        empty=(rows, {"columns": {"prompt": "q", "response": "a"}} if stage != "ddm" else {"columns": {"prompt": "q"}})
    )
    keys = {"dataset": "empty", "dataset_dir": folder, "eval_dataset": None, "cutoff_len": 8}
    keys |= {"streaming": True, "dataloader_num_workers": 1} if streams else {}
    run = train_small if stage == "ddm" else finetune
    with pytest.raises(ValueError, match=rf"dataset: empty \(train\): .*rows .*{words}"):
        run(tmp_path / "out", **keys, **({"packing": False} if stage == "ddm" else {}))


@pytest.mark.slow
def test_prepared_rows_are_checked_against_the_settings_saved_with_them(finetune, train_small, write_data, tmp_path):
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    rows = tmp_path / "rows"
    keys = {"tokenized_path": rows, "max_steps": 1, "eval_dataset": ABSENT}
    finetune(tmp_path / "made", **keys)
    facts = json.loads((rows / "llamafactory_ddm.json").read_text())
    assert {"packing": False, "variable_length": False, "template": "diffullama"}.items() <= facts.items()
    assert set(load_from_disk(rows)) == {"train"}
    finetune(tmp_path / "again", **keys)
    for change, words in (
        ({"template": "default", "sep_token": ABSENT}, "template: diffullama, .*template is default"),
        ({"train_on_prompt": True}, "train_on_prompt: false, .*train_on_prompt is true"),
        ({"variable_length": "eos_pad"}, "variable_length: false, .*variable_length is true"),
        ({"packing": True}, "packing: false, .*packing is true"),
        ({"cutoff_len": 20}, "cutoff_len: 20"),
    ):
        with pytest.raises(ValueError, match=f"tokenized_path: .*{words}"):
            finetune(tmp_path / "out", **{**keys, **change})
    with pytest.raises(ValueError, match=r"tokenized_path: .*labels.* stage: ddm-sft, .*stage is ddm"):
        train_small(tmp_path / "out", **keys)
    other = tmp_path / "other"
    for name in ("config.json", "model.safetensors", "diffusion_config.json"):
        other.mkdir(exist_ok=True)
        (other / name).write_bytes((tmp_path / "made" / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    one, two = (tokenizer.convert_ids_to_tokens(index) for index in facts["ids"][:2])
    words[one], words[two] = words[two], words[one]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(vocabulary))
    tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match=r"tokenized_path: .* another tokenizer"):
        finetune(tmp_path / "out", **keys, model_name_or_path=other)
    (rows / "dataset_dict.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenized_path: .*rows cannot be opened"):
        finetune(tmp_path / "out", **keys)
    with pytest.raises(ValueError, match=r"tokenized_path: .*llamafactory_ddm.json "):
        finetune(tmp_path / "out", **{**keys, "tokenized_path": rows / "llamafactory_ddm.json"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [{"packing": False}, {"packing": True}, {"variable_length": "eos_pad"}])
def test_a_spelled_out_control_token_is_text(train_small, checkpoint, write_data, tmp_path, batches, caplog, form):
    """From an autoregressive base, to which they are new, and from a diffusion checkpoint alike."""
    rows = [{"text": f"Tom <|mask|> saw <|pad|> {n} cats."} for n in range(24)]
    keys = {"dataset": "text", "dataset_dir": write_data(text=(rows, {"columns": {"prompt": "text"}})), "max_steps": 1}
    keys |= {"cutoff_len": 40, "eval_dataset": None, "disable_shuffling": True}
    if "packing" not in form:
        keys["packing"] = ABSENT
    inputs = []
    for name, base in (("new", {}), ("trained", {"model_name_or_path": checkpoint})):
        batches.clear()
        caplog.clear()
        train_small(tmp_path / name, **keys, **form, **base)
        (clean, noised), *_ = batches
        inputs.append(clean.x_0)
        mask = DiffusionConfig.load(tmp_path / name).mask_token_id
        assert mask not in clean.x_0 and mask not in noised.scored["targets"]
        count = r"\d+ of \d+" if form.get("packing") else "24 of 24"
        assert re.search(rf"{count} rows .*'<\|mask\|>'", caplog.text)
    assert torch.equal(*inputs)


@pytest.mark.parametrize("stage", ["prefix", "prompt"])
def test_a_mask_token_spelled_out_in_a_prompt_is_text(generate, finetuned, write_data, tmp_path, caplog, stage):
    rows = [{"q": "Tom <|mask|> saw", "a": "5"}, {"q": "Tom saw", "a": "6"}]
    keys = {"dataset_dir": write_data(odd=(rows, PAIR)), "eval_dataset": "odd", "cutoff_len": 32, "diffusion_steps": 8}
    if stage == "prefix":
        generate(tmp_path / "out", generate_from="prefix", **keys)
    else:
        train_here("tiny_gpt2_sft_inference.yaml", model_name_or_path=finetuned, output_dir=tmp_path / "out", **keys)
    lines = (tmp_path / "out" / "generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2 and "Tom <|mask|> saw" in json.loads(lines[0])["prompt"]
    assert re.search(r"1 of .*'<\|mask\|>'", caplog.text)
