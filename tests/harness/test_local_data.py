"""Local copies of data sets in place of those on the Hub."""

import json

import pytest

pytest.importorskip("lm_eval")

from llamafactory_ddm.harness.keys import EvalKeys
from llamafactory_ddm.harness.local_data import local_data_set, task_manager
from llamafactory_ddm.harness.run import evaluate
from support.cli import ROOT

TASKS = str(ROOT / "examples" / "eval" / "tasks")
ROW = {"question": "1 + 1?", "answer": "#### 2"}


def data(folder, *names, row=ROW):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    return folder


def test_files_of_splits(tmp_path):
    data(tmp_path, "test.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "notes.txt")
    found = local_data_set(tmp_path, "main")
    assert found["dataset_path"] == "json" and found["dataset_name"] is None
    files = found["dataset_kwargs"]["data_files"]
    assert {split: len(paths) for split, paths in files.items()} == {"test": 1, "train": 2}
    data(tmp_path, "main/test.jsonl")
    assert local_data_set(tmp_path, "main")["dataset_kwargs"]["data_files"].keys() == {"test"}
    (tmp_path / "README.md").write_text("Notes of the user.")  # no card of a data set, which lists configurations
    assert local_data_set(tmp_path, "main")["dataset_path"] == "json"
    (tmp_path / "main" / "train.csv").write_text("a,b")
    with pytest.raises(ValueError, match="main has files of several formats"):
        local_data_set(tmp_path, "main")


def test_a_folder_without_any_of_the_data_sets(tmp_path):
    """It is an error, since the data would come from the Hub in spite of the key."""
    with pytest.raises(
        ValueError, match="has no folder of a task or data set of this evaluation, which has json, tiny_p"
    ):
        evaluate(
            EvalKeys(model_name_or_path="absent", task="tiny_problems", task_dir=TASKS, task_data=str(tmp_path)), {}
        )


def test_a_snapshot_of_the_hub(tmp_path):
    data(tmp_path, "main/test-00000-of-00001.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*\n---\n"
    )
    manager = task_manager(["gsm8k_finetuned"], TASKS, {"openai/gsm8k": str(tmp_path)})
    (task,) = manager.load(["gsm8k_finetuned"])["tasks"].values()
    assert list(task.test_docs()) == [ROW]


@pytest.mark.parametrize(
    "kind", ["folder", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("data set", "task"))]
)
def test_ways_to_name_it(kind, tmp_path):
    folder = data(tmp_path / "openai" / "gsm8k", "main/test.jsonl")
    given = {
        "folder": str(tmp_path),
        "data set": {"openai/gsm8k": str(folder)},
        "task": {"gsm8k_finetuned": str(folder)},
    }
    manager = task_manager(["gsm8k_finetuned"], TASKS, given[kind])
    (task,) = manager.load(["gsm8k_finetuned"])["tasks"].values()
    assert list(task.test_docs()) == [ROW]
    manager.check_used()


@pytest.mark.parametrize("value", ["absent", 3, {"openai/gsm8k": "absent"}, {"openai/gsm8k": None}, ["a"]])
def test_a_value_that_is_no_folder(value):
    with pytest.raises(ValueError, match=r"task_data.*is not a folder"):
        EvalKeys(model_name_or_path="a", task="x", task_data=value)


@pytest.mark.parametrize(
    ("files", "name", "error"),
    [
        (["test.jsonl"], "openai/gsm", r"task_data: openai/gsm is no.*openai/gsm8k"),
        (
            ["notes.txt"],
            "openai/gsm8k",
            r"task: gsm8k_finetuned.*no file of a split.*task_data={openai/gsm8k: FOLDER}",
        ),
        pytest.param(["train.jsonl"], "openai/gsm8k", r"task: gsm8k_finetuned.*'test'", marks=pytest.mark.slow),
    ],
)
def test_data_that_does_not_fit(files, name, error, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {name: str(data(tmp_path, *files))}
    if name == "openai/gsm":  # the data set itself is there
        given["gsm8k_finetuned"] = str(tmp_path)
    keys = EvalKeys(model_name_or_path="absent", task="gsm8k_finetuned", task_dir=TASKS, task_data=given)
    with pytest.raises(ValueError, match=error):
        evaluate(keys, {})


@pytest.mark.slow
def test_a_data_set_that_is_not_there_is_named_with_the_cure(monkeypatch):
    keys = EvalKeys(model_name_or_path="absent", task="rocstories_infilling", task_dir=TASKS)
    with pytest.raises(ValueError, match=r"task: rocstories_infilling.*task_data={rocstories: FOLDER}"):
        evaluate(keys, {})


@pytest.mark.slow
def test_only_the_folders_of_the_tasks_are_indexed():
    """A group is complete if its members are; the harness's are found by name."""
    manager = task_manager(["math_cot"], TASKS, None)
    assert "math_cot" in manager.all_groups and "hellaswag" not in manager.all_subtasks
    manager = task_manager(["piqa", "math_cot"], TASKS, None)
    assert {"piqa", "math_cot_algebra"} <= set(manager.all_subtasks) and len(manager.all_tasks) < 500
