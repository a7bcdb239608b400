"""Runs that share an output_dir, or resume from another run's checkpoint."""

import os
import shutil

import pytest

from llamafactory_ddm import load
from llamafactory_ddm.utils.run_lock import FILE_NAME as LOCK
from llamafactory_ddm.utils.run_lock import run_lock
from support.cli import history

LORA = "tiny_gpt2_lora_ddm_sft.yaml"


@pytest.mark.slow
def test_a_model_replaces_an_adapter_and_an_adapter_a_model(adapter, checkpoint, finetune, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    with pytest.raises(ValueError, match="not empty"):
        finetune(out, overwrite_output_dir=False)
    finetune(out, max_steps=1)
    assert (out / "model.safetensors").is_file() and not list(out.glob("adapter_*"))
    assert "lora" not in (out / "README.md").read_text().lower()
    load(out)
    finetune(out, recipe=LORA, max_steps=1)
    assert (out / "adapter_model.safetensors").is_file() and not (out / "model.safetensors").exists()
    load(out)
    shutil.copy(checkpoint / "model.safetensors", out)
    with pytest.raises(ValueError, match=r"out .*model.* adapter"):
        load(out)
    with pytest.raises(ValueError, match=r"output_dir: .*model_name_or_path"):
        finetune(checkpoint, recipe=LORA, model_name_or_path=checkpoint)


@pytest.mark.slow
def test_resuming_with_other_settings_is_an_error(finetune, small_data, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    out = finetune(tmp_path / "out", **keys)
    keys |= {"resume_from_checkpoint": str(out / "checkpoint-1"), "overwrite_output_dir": False}
    changes = {
        "seed": 3,
        "dataset": "tiny_answers_train",
        "loss_weighting": "uniform",
        "learning_rate": 1e-4,
        "cutoff_len": 60,
        "gradient_accumulation_steps": 2,
    }
    for key, value in changes.items():
        setting = {"gradient_accumulation_steps": "rows of a step"}.get(key, key)
        with pytest.raises(ValueError, match=rf"checkpoint-1 .*{setting}: .* contradicts"):
            finetune(out, **keys | {key: value})
    with pytest.raises(ValueError, match=r"finetuning_type: lora .*checkpoint-1"):
        finetune(tmp_path / "other", recipe=LORA, **keys)
    lines = (small_data / "tiny_problems_train.jsonl").read_text(encoding="utf-8").splitlines()
    other = tmp_path / "data"
    shutil.copytree(small_data, other)
    (other / "tiny_problems_train.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"checkpoint-1.*files of the data set"):
        finetune(out, **keys, dataset_dir=other)
    finetune(out, **keys | {"max_steps": 3})
    assert [log["step"] for log in history(out)] == [1, 2, 3]


def test_a_second_run_in_the_same_folder_is_refused(finetune, tmp_path):
    out = tmp_path / "out"
    with run_lock(out):
        with pytest.raises(ValueError, match=rf"output_dir: .*out .*process {os.getpid()} on"):
            finetune(out)
        assert [path.name for path in out.iterdir()] == [LOCK]
    finetune(out, max_steps=1)
    assert (out / "model.safetensors").is_file() and not (out / LOCK).exists()
    with pytest.raises(ValueError, match="nowhere"):
        finetune(tmp_path / "new" / "out", dataset="nowhere")
    assert not (tmp_path / "new").exists()


def test_a_finished_run_that_is_started_again_takes_no_step(finetune, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "do_eval": True, "plot_loss": True}
    out = finetune(tmp_path / "out", **keys)
    before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    results, pictures = (out / "train_results.json").read_text(), sorted(path.name for path in out.glob("*.png"))
    (out / "model.safetensors").unlink()  # as if it had been killed before its last save
    finetune(out, **keys, overwrite_output_dir=False, resume_from_checkpoint="true")
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == before
    assert (out / "train_results.json").read_text() == results
    assert pictures == ["training_loss.png", "training_nll.png"]
    assert [log["step"] for log in history(out)] == [1, 2]
