"""A run resumes with the settings of its checkpoint: others are an error, and the changeable ones are logged."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from llamafactory_ddm.integration.resolve.run_settings import (
    FILE_NAME,
    check_run_settings,
    collect_run_settings,
    write_run_settings,
)


def settings(rows=((1, 2), (3, 4)), **changes):
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
    return collect_run_settings(
        model, data, training, finetuning, Dataset.from_dict({"input_ids": [list(row) for row in rows]})
    )


@pytest.fixture
def folder(tmp_path):
    write_run_settings(settings(), tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"dataset": ["one"], "rows": ((1, 2),)},
            "dataset: one .* dataset: one,two",
        ),
        ({"seed": 4}, "seed: 4 .* seed: 3"),
        ({"diffusion_stage": "ddm-sft"}, "stage: ddm-sft "),
        ({"anneal_steps": 0}, "anneal_steps: 0 "),
        ({"learning_rate": 1e-4}, "learning_rate: 0.0001 "),
        ({"lora_rank": 16}, "lora_rank: 16 "),
        ({"finetuning_type": "full"}, "finetuning_type: full "),
        ({"model": "another/model"}, "model_name_or_path: another/model .* some/model"),
        ({"per_device_train_batch_size": 2}, "rows of a step: 8 .*: 16"),
        ({"rows": ((1, 2), (3, 5))}, "files of the data set"),
        ({"rows": ((1, 2), (3, 4), (5, 6))}, "files of the data set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_an_error(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        check_run_settings(settings(**changes), folder)


def test_the_same_run_and_an_older_checkpoint_pass(folder, tmp_path, caplog):
    check_run_settings(settings(), folder)
    # Another split of the same number of rows per step is the same run.
    check_run_settings(settings(per_device_train_batch_size=2, gradient_accumulation_steps=8), folder)
    (tmp_path / FILE_NAME).unlink()
    check_run_settings(settings(seed=4), folder)


def test_sets_are_stored_in_one_order(tmp_path):
    """LLaMA-Factory makes a set of additional_target, whose order differs from process to process."""
    names = ["wte", "lm_head", "embed_tokens", "wpe"]
    for number, order in enumerate((names, names[::-1])):
        finetuning = SimpleNamespace(
            **{"stage": "pt", "diffusion_stage": "ddm", "finetuning_type": "lora", "additional_target": set(order)}
        )
        training = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=1, world_size=1)
        data = SimpleNamespace(packing=False)
        collected = collect_run_settings(SimpleNamespace(model_name_or_path="a/b"), data, training, finetuning, None)
        assert collected["additional_target"] == sorted(names), number


def test_changeable_settings_are_logged_in_one_line(folder, monkeypatch):
    lines = []
    monkeypatch.setattr(
        "llamafactory_ddm.integration.resolve.run_settings.logger", SimpleNamespace(info_rank0=lines.append)
    )
    check_run_settings(settings(max_steps=20, logging_steps=1), folder)
    assert lines == [f"Resuming from {folder} with max_steps: 20 (was 10), logging_steps: 1 (was 5)."]


def test_a_file_that_cannot_be_read(folder, tmp_path):
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(ValueError, match=FILE_NAME):
        check_run_settings(settings(), folder)


def test_every_key_is_one_of_llamafactorys_or_ours():
    """A key that a new version has dropped would always be compared as None."""
    from llamafactory.hparams import DataArguments, TrainingArguments

    from llamafactory_ddm.integration.hparams.parser import DiffusionFinetuningArguments
    from llamafactory_ddm.integration.resolve import run_settings as module

    known = {
        name
        for kind in (DataArguments, TrainingArguments, DiffusionFinetuningArguments)
        for name in vars(kind)["__dataclass_fields__"]
    }
    keys = (*module._DATA_KEYS, *module._TRAINING_KEYS, *module._DIFFUSION_KEYS, *module._LORA_KEYS)
    assert {*keys, *module._FREEZE_KEYS, *module._CHANGEABLE_KEYS} <= known
    assert json.dumps(settings())


def test_a_model_of_a_hub_is_identified_by_its_repository(tmp_path):
    """Its folder changes with the cache and with each commit; older checkpoints hold that folder."""

    def snapshot(cache, revision):
        folder = tmp_path / cache / "models--me--dm" / "snapshots" / revision
        folder.mkdir(parents=True)
        return str(folder)

    before, after = snapshot("hub", "a" * 40), snapshot("elsewhere", "b" * 40)
    write_run_settings(settings(model=before), tmp_path)
    assert json.loads((tmp_path / FILE_NAME).read_text())["model_name_or_path"] == "me/dm"
    check_run_settings(settings(model=after), str(tmp_path))
    write_run_settings({**settings(model=before), "model_name_or_path": before}, tmp_path)
    check_run_settings(settings(model=after), str(tmp_path))
    with pytest.raises(ValueError, match="model_name_or_path"):
        check_run_settings(settings(model="me/other"), str(tmp_path))
