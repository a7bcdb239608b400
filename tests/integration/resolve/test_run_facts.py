"""Resuming goes on with the same run: what would make another one is an error, what may change is said."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from llamafactory_ddm.integration.resolve.run_facts import FILE_NAME, check_facts, run_facts, save_facts


def facts(rows=((1, 2), (3, 4)), **changes):
    model = SimpleNamespace(model_name_or_path=changes.pop("model", "some/model"))
    data = SimpleNamespace(dataset=["one", "two"], template="default", cutoff_len=64, packing=False)
    training = SimpleNamespace(
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 4),
        **{"world_size": 1, "seed": 3, "learning_rate": 1e-3, "max_steps": 10, "logging_steps": 5},
    )
    finetuning = SimpleNamespace(
        **{"stage": "pt", "diffusion_stage": "ddm", "finetuning_type": "lora", "lora_rank": 8, "anneal_steps": 7}
    )
    for key, value in changes.items():
        holder = next(part for part in (data, training, finetuning) if hasattr(part, key))
        setattr(holder, key, value)
    return run_facts(model, data, training, finetuning, Dataset.from_dict({"input_ids": [list(row) for row in rows]}))


@pytest.fixture
def folder(tmp_path):
    save_facts(facts(), tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"dataset": ["one"], "rows": ((1, 2),)},
            "dataset: one contradicts the checkpoint, which says dataset: one,two",
        ),
        ({"seed": 4}, "seed: 4 contradicts the checkpoint, which says seed: 3"),
        ({"diffusion_stage": "ddm-sft"}, "stage: ddm-sft contradicts"),
        ({"anneal_steps": 0}, "anneal_steps: 0 contradicts"),
        ({"learning_rate": 1e-4}, "learning_rate: 0.0001 contradicts"),
        ({"lora_rank": 16}, "lora_rank: 16 contradicts"),
        ({"finetuning_type": "full"}, "finetuning_type: full contradicts"),
        ({"model": "another/model"}, "model_name_or_path: another/model contradicts"),
        ({"per_device_train_batch_size": 2}, "rows of a step: 8 contradicts the checkpoint, which says .*: 16"),
        ({"rows": ((1, 2), (3, 5))}, "its files have changed"),
        ({"rows": ((1, 2), (3, 4), (5, 6))}, "its files have changed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_is_an_error(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        check_facts(facts(**changes), folder)


def test_the_same_run_and_an_older_checkpoint_pass(folder, tmp_path, caplog):
    check_facts(facts(), folder)
    # The same rows a step, split in another way, are the same run.
    check_facts(facts(per_device_train_batch_size=2, gradient_accumulation_steps=8), folder)
    (tmp_path / FILE_NAME).unlink()
    check_facts(facts(seed=4), folder)


def test_names_in_a_set_have_one_order(tmp_path):
    """Upstream makes a set of additional_target, whose order differs from process to process."""
    names = ["wte", "lm_head", "embed_tokens", "wpe"]
    for number, order in enumerate((names, names[::-1])):
        finetuning = SimpleNamespace(
            **{"stage": "pt", "diffusion_stage": "ddm", "finetuning_type": "lora", "additional_target": set(order)}
        )
        training = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=1, world_size=1)
        data = SimpleNamespace(packing=False)
        found = run_facts(SimpleNamespace(model_name_or_path="a/b"), data, training, finetuning, None)
        assert found["additional_target"] == sorted(names), number


def test_what_may_change_is_said_in_one_line(folder, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "llamafactory_ddm.integration.resolve.run_facts.logger", SimpleNamespace(info_rank0=lines.append)
    )
    check_facts(facts(max_steps=20, logging_steps=1), folder)
    assert lines == [f"Resuming from {folder} with max_steps: 20 (was 10), logging_steps: 1 (was 5)."]


def test_a_file_that_cannot_be_read(folder, tmp_path):
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(ValueError, match="is not readable"):
        check_facts(facts(), folder)


def test_every_name_is_one_of_upstreams_or_ours():
    """A name that a new version no longer has would be compared as None for ever."""
    from llamafactory.hparams import DataArguments, TrainingArguments

    from llamafactory_ddm.integration.hparams.parser import DiffusionFinetuningArguments
    from llamafactory_ddm.integration.resolve import run_facts as module

    known = {
        name
        for kind in (DataArguments, TrainingArguments, DiffusionFinetuningArguments)
        for name in vars(kind)["__dataclass_fields__"]
    }
    lists = (module._OF_DATA, module._OF_TRAINING, module._OF_DIFFUSION, module._OF_LORA, module._OF_FREEZE)
    assert {name for names in (*lists, module._MAY_CHANGE) for name in names} <= known
    assert json.dumps(facts())


def test_a_model_of_a_hub_is_the_same_wherever_its_files_lie(tmp_path):
    """Its folder moves with the cache and with each commit; older checkpoints hold that folder."""

    def snapshot(cache, revision):
        folder = tmp_path / cache / "models--me--dm" / "snapshots" / revision
        folder.mkdir(parents=True)
        return str(folder)

    before, after = snapshot("hub", "a" * 40), snapshot("elsewhere", "b" * 40)
    save_facts(facts(model=before), tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["model_name_or_path"] == "me/dm"
    check_facts(facts(model=after), str(tmp_path))
    save_facts({**facts(model=before), "model_name_or_path": before}, tmp_path)
    check_facts(facts(model=after), str(tmp_path))
    with pytest.raises(ValueError, match="model_name_or_path"):
        check_facts(facts(model="me/other"), str(tmp_path))
