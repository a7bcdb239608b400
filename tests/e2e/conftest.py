"""Small data and trained checkpoints that the end-to-end tests share."""

import json

import pytest

from support.cli import ABSENT, ROOT, train_here

SMALL = {
    "max_steps": 3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "no",
    "do_eval": False,
    "save_strategy": "no",
    "plot_loss": False,
    "cutoff_len": 32,
    "packing": True,
    "anneal_steps": 0,
    "overwrite_cache": True,
}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder with the first lines of the built-in corpus, as tiny_corpus_train and tiny_corpus_eval."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 80), ("eval", 6)):
        lines = (ROOT / "data" / f"tiny_corpus_{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"tiny_corpus_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name in ("problems", "answers"):
            rows = (ROOT / "data" / f"tiny_{name}_{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            (folder / f"tiny_{name}_{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "dataset_info.json").write_text((ROOT / "data" / "dataset_info.json").read_text())
    return folder


@pytest.fixture(scope="session")
def train_small(small_data):
    """Return a function that runs tiny_gpt2_full_ddm.yaml with small sizes in this process."""

    def train(folder, **keys):
        train_here("tiny_gpt2_full_ddm.yaml", output_dir=folder, **{"dataset_dir": small_data, **SMALL, **keys})
        return folder

    return train


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, train_small):
    """A checkpoint of three steps."""
    return train_small(tmp_path_factory.mktemp("trained") / "out")


@pytest.fixture(scope="session")
def finetune(checkpoint, small_data):
    """Return a function that finetunes that checkpoint for three steps in this process."""

    def train(folder, **keys):
        small = {
            **SMALL,
            "packing": ABSENT,
            "anneal_steps": ABSENT,
            "cutoff_len": 64,
            "model_name_or_path": checkpoint,
        }
        recipe = keys.pop("recipe", "tiny_gpt2_full_ddm_sft.yaml")
        train_here(recipe, output_dir=folder, **{"dataset_dir": small_data, **small, **keys})
        return folder

    return train


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory, finetune):
    """A checkpoint finetuned for three steps."""
    return finetune(tmp_path_factory.mktemp("finetuned") / "out")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, finetune):
    """One finetuned with variable_length for thirty steps, which suffice to write pads everywhere."""
    keys = {"variable_length": "eos_pad", "max_steps": 30, "per_device_train_batch_size": 8, "logging_steps": 10}
    return finetune(tmp_path_factory.mktemp("ends") / "out", **keys)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, finetune):
    """A LoRA adapter of the shared checkpoint, trained for three steps."""
    return finetune(tmp_path_factory.mktemp("adapter") / "out", recipe="tiny_gpt2_lora_ddm_sft.yaml")


@pytest.fixture(scope="session")
def generate(checkpoint):
    """Return a function that runs tiny_gpt2_inference.yaml on the shared checkpoint in this process."""

    def predict(folder, **keys):
        small = {"model_name_or_path": checkpoint, "num_samples": 3, "diffusion_steps": 4, "cutoff_len": 12}
        recipe = str(keys.pop("recipe", "tiny_gpt2_inference.yaml"))
        given = {**small, **keys}
        for key, twin in (("temperature", "logits_temp"), ("top_p", "topp_temp")):
            if key in keys and twin not in keys:
                given[twin] = ABSENT
        train_here(recipe, output_dir=folder, **given)
        return [
            json.loads(line)["predict"]
            for line in (folder / "generated_predictions.jsonl").read_text().rstrip("\n").split("\n")
        ]

    return predict
