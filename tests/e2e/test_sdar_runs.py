"""A miniature SDAR in its published layout: training, generation, merging, conversion into that layout again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_ddm import load
from llamafactory_ddm.cli.main import main
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import ABSENT, history, predictions, run, train_here
from support.published import all_weights
from support.published_sdar import MASK, sdar_by_formula, sdar_weights, write_sdar

SMALL = {
    "max_steps": 3,
    "warmup_ratio": 0,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "plot_loss": False,
    "bf16": False,
    "cutoff_len": 160,
    "dataset": "tiny_problems_train",
    "overwrite_cache": True,
}
FULL = {"finetuning_type": "full", "lora_rank": ABSENT, "lora_alpha": ABSENT, "lora_target": ABSENT}
IDS = torch.tensor([5, 9, 266, 7, 30, 266, 11, 200, 3])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_sdar(tmp_path_factory.mktemp("published") / "SDAR-mini")


def train(published, data, out, **keys):
    train_here(
        "sdar_lora_ddm_sft.yaml",
        **{"model_name_or_path": published, "dataset_dir": data, "output_dir": out, **SMALL, **keys},
    )
    return out


@pytest.fixture(scope="module")
def adapter(published, small_data, tmp_path_factory):
    return train(published, small_data, tmp_path_factory.mktemp("adapter") / "out")


def test_a_model_trained_in_full_becomes_an_sdar_again(published, small_data, tmp_path):
    out, back = train(published, small_data, tmp_path / "out", **FULL), tmp_path / "back"
    config = DiffusionConfig.load(out)
    assert (config.attention, config.train_block_length, config.shift, config.mask_token) == ("block", 4, False, MASK)
    assert main(["convert", str(out), str(back), "--published", "sdar"]) == 0
    weights = all_weights(back)
    assert weights.keys() == sdar_weights().keys()
    assert any(not torch.equal(weights[key], value) for key, value in sdar_weights().items())
    raw = json.loads((back / "config.json").read_text())
    assert (raw["model_type"], raw["block_size"], raw["mask_token_id"]) == ("sdar", 4, config.mask_token_id)
    (back / "diffusion_config.json").unlink()
    texts = [load(folder).generate("How", max_new_tokens=7, temperature=0, raw=True) for folder in (out, back)]
    assert texts[0] == texts[1]
    expected = sdar_by_formula(weights, IDS, 4)
    block = torch.arange(len(IDS)) // 4
    mask = torch.zeros(len(IDS), len(IDS)).masked_fill(block[None] > block[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = load(out).model(input_ids=IDS[None], attention_mask=mask[None, None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"shift": True}, "shift: True "),
        ({"mask_token": 5}, "mask_token: 5 .*id 5"),
        ({"attention": "full"}, "attention: full"),
        ({"train_block_length": 8}, "train_block_length: 8"),
    ],
    ids=str,
)
def test_a_yaml_that_contradicts_the_family(published, small_data, tmp_path, keys, pattern):
    with pytest.raises(ValueError, match=pattern):
        train(published, small_data, tmp_path / "out", **keys)


@pytest.mark.slow
def test_an_adapter_generates_is_merged_and_becomes_an_sdar(published, adapter, small_data, tmp_path):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(published)
    assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * 7 * 2
    losses = [log["loss"] for log in history(adapter)]
    assert len(losses) == 3 and len(set(losses)) == 3
    assert DiffusionConfig.load(adapter).train_block_length == 4
    small = {"max_samples": 2, "max_new_tokens": 8, "infer_dtype": "float32", "overwrite_cache": True}
    small |= {"model_name_or_path": published, "dataset_dir": small_data, "eval_dataset": "tiny_problems_eval"}
    small |= {"adapter_name_or_path": str(adapter), "finetuning_type": "lora", "cutoff_len": 240}
    train_here("sdar_inference.yaml", output_dir=tmp_path / "answers", **small)
    assert len(predictions(tmp_path / "answers")) == 2
    keys = {"model_name_or_path": published, "adapter_name_or_path": adapter, "finetuning_type": "lora"}
    keys |= {"template": "qwen3", "export_dir": tmp_path / "merged", "infer_dtype": "float32"}
    run("export", *(word for key, value in keys.items() for word in (f"--{key}", str(value))))
    assert main(["convert", str(tmp_path / "merged"), str(tmp_path / "sdar"), "--published", "sdar"]) == 0
    merged = load(adapter).model.state_dict()
    for key, value in all_weights(tmp_path / "sdar").items():
        torch.testing.assert_close(value, merged[key], rtol=1e-5, atol=1e-6)
