"""Examples to generate from: all of them, in order, with or without answers, and the held-out ones of val_size."""

import json

import pytest
from datasets import Dataset
from llamafactory.data.data_utils import split_dataset
from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments

from llamafactory_ddm.integration.data import prompts
from support.chat import CHAT, PAIR, run_keys, save_data, save_decoder

NAMED = {"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}
OPENAI = {"formatting": "openai", "columns": {"messages": "messages"}, **NAMED}


def conversation(*texts, roles=("human", "gpt"), keys=("from", "value")):
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(texts)]


def read(folder, rows, entry, **keys):
    """Return the turns of each example's prompt, and its answer."""
    data = save_data(folder / "data", one=(rows, entry))
    data_args = DataArguments(dataset_dir=str(data), overwrite_cache=True, **{"eval_dataset": "one", **keys})
    training_args = TrainingArguments(output_dir=str(folder / "out"), seed=1, use_cpu=True, report_to="none")
    loaded = prompts.load_examples(["one"], ModelArguments(model_name_or_path="x"), data_args, training_args)
    texts = [[[turn["content"] for turn in row[key]] for key in ("_prompt", "_response")] for row in loaded]
    assert all(len(answer) == 1 for _, answer in texts)
    return [(*prompt, answer[0]) for prompt, answer in texts]


@pytest.mark.parametrize(
    ("rows", "entry", "expected"),
    [
        ([{"q": "a"}, {"q": "b"}], {"columns": {"prompt": "q"}}, [("a", ""), ("b", "")]),
        ([{"q": "a", "a": "x"}, {"q": "b", "a": None}], PAIR, [("a", "x"), ("b", "")]),
        ([{"q": "a", "a": None}, {"q": "b"}, {"q": "c", "a": ""}], PAIR, [("a", ""), ("b", ""), ("c", "")]),
        ([{"instruction": "a"}, {"instruction": "b"}], {}, [("a", ""), ("b", "")]),
        (
            [{"conversations": conversation("a", "b", "c")}, {"conversations": conversation("d", "e")}],
            CHAT,
            [("a", "b", "c", ""), ("d", "e")],
        ),
        (
            [{"conversations": conversation("a", None)}, {"conversations": conversation("b", "c")}],
            CHAT,
            [("a", ""), ("b", "c")],
        ),
        (
            [
                {"messages": conversation(*texts, roles=("user", "assistant"), keys=("role", "content"))}
                for texts in ("a", "bc")
            ],
            OPENAI,
            [("a", ""), ("b", "c")],
        ),
    ],
    ids=["no-column", "null", "all-null", "defaults", "user-last", "null-last", "openai"],
)
def test_each_example_is_a_prompt(tmp_path, rows, entry, expected):
    assert read(tmp_path, rows, entry) == expected


def test_a_column_that_the_entry_names_must_exist(tmp_path):
    with pytest.raises(KeyError, match="answer"):
        read(tmp_path, [{"q": "a", "a": "b"}], {"columns": {"prompt": "q", "response": "answer"}})


def test_preferences_are_no_prompts(tmp_path):
    entry = {"ranking": True, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}
    with pytest.raises(ValueError, match=r"dataset: one .*ranking: true"):
        read(tmp_path, [{"q": "a", "a": "b", "b": "c"}], entry)


def test_val_size_leaves_the_examples_that_training_does_not_see(tmp_path):
    rows = [{"q": f"{n}", "a": f"{n} eggs"} for n in range(8)]
    held_out = read(tmp_path, rows, PAIR, dataset="one", eval_dataset=None, val_size=0.25)
    split = split_dataset(Dataset.from_list(rows), None, DataArguments(dataset="one", val_size=0.25), seed=1)
    assert held_out == [(row["q"], row["a"]) for row in split[1]["validation"]] and len(held_out) == 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model after one step, and its data."""
    folder = tmp_path_factory.mktemp("prompts")
    save_decoder(folder / "model")
    eggs = [{"q": f"Tom has {n} eggs.", "a": f"{n} eggs."} for n in range(8)]
    some = [{"q": "Tom saw a cat.", "a": "red"}, {"q": "Ben saw.", "a": None}, {"q": "Max saw.", "a": "blue"}]
    broken = [
        {"conversations": conversation("a", "b")},
        {"conversations": conversation("c", "d", roles=("gpt", "human"))},
    ]
    save_data(folder / "data", eggs=(eggs, PAIR), some=(some, PAIR), broken=(broken, CHAT))
    keys = {"stage": "ddm-sft", "do_train": True, "template": "default", "dataset": "eggs"}
    run_keys(folder / "sft", model_name_or_path=folder / "model", dataset_dir=folder / "data", **keys)
    return folder


def predict(folder, work, **keys):
    settings = {"stage": "ddm-sft", "template": "default", "do_predict": True, "max_new_tokens": 4, **keys}
    run_keys(folder, model_name_or_path=work / "sft", dataset_dir=work / "data", **settings)
    lines = (folder / "generated_predictions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("template", ["default", "empty", "smollm", "qwen3"])
def test_every_prompt_gets_its_text_and_metrics_are_of_those_with_a_label(work, tmp_path, template):
    rows = predict(tmp_path / "out", work, eval_dataset="some", template=template)
    assert [name in row["prompt"] for name, row in zip(("Tom", "Ben", "Max"), rows, strict=True)] == [True] * 3
    assert [row.get("label", "").split("\n")[-1] for row in rows] == ["red", "", "blue"]
    metrics = json.loads((tmp_path / "out" / "predict_results.json").read_text())
    assert (metrics["predict_samples"], metrics["predict_labelled_samples"]) == (3, 2)


def test_turns_out_of_order_are_no_prompt(work, tmp_path):
    with pytest.raises(ValueError, match=r"dataset: example 1: .*turns"):
        predict(tmp_path / "out", work, eval_dataset="broken")


def test_prefixes_and_prompts_are_of_the_same_held_out_examples(work, tmp_path):
    keys = {"dataset": "eggs", "val_size": 0.25}
    prompted = predict(tmp_path / "prompts", work, **keys)
    continued = predict(tmp_path / "prefixes", work, stage="ddm", generate_from="prefix", template=None, **keys)
    assert len(prompted) == len(continued) == 2
    assert all(row["prompt"] in full["prompt"] for row, full in zip(continued, prompted, strict=True))
