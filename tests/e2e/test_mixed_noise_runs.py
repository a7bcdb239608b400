"""noise_process, uniform_ratio and random_truncate_ratio through the real stages."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import evaluations, history, run

MIXED = {"noise_process": "mixed", "uniform_ratio": 0.5}


def process(folder):
    config = DiffusionConfig.load(folder)
    return config.noise_process, config.uniform_ratio


@pytest.fixture(scope="module")
def mixed(train_small, tmp_path_factory):
    """A checkpoint of three steps under mixed noise."""
    return train_small(tmp_path_factory.mktemp("mixed") / "out", **MIXED)


def test_mixed_noise_trains_from_an_autoregressive_model(mixed, checkpoint):
    assert process(mixed) == ("mixed", 0.5)
    first, masked = history(mixed)[0], history(checkpoint)[0]
    assert "kl" in first and "nll" not in first
    assert first["loss"] != masked["loss"]
    assert first["masked_fraction"] == pytest.approx(masked["masked_fraction"] / 2, rel=0.1)


@pytest.mark.slow
def test_a_masked_checkpoint_trains_under_mixed_noise_and_back(train_small, checkpoint, tmp_path):
    mixed = train_small(tmp_path / "mixed", model_name_or_path=checkpoint, noise_process="mixed")
    assert process(mixed) == ("mixed", 0.1)
    same = train_small(tmp_path / "same", model_name_or_path=mixed)
    assert process(same) == ("mixed", 0.1)
    assert "kl" in history(same)[0]
    back = train_small(tmp_path / "back", model_name_or_path=mixed, noise_process="masked")
    assert process(back) == ("masked", 0.0)
    assert "nll" in history(back)[0]


@pytest.mark.slow
def test_a_ratio_of_zero_trains_bit_for_bit_as_masked_noise(train_small, checkpoint, tmp_path):
    zero = train_small(tmp_path / "zero", noise_process="mixed", uniform_ratio=0)
    assert [log["loss"] for log in history(zero)] == [log["loss"] for log in history(checkpoint)]
    assert process(zero) == ("mixed", 0.0)


def test_only_answers_are_noised(finetune, tmp_path):
    folder = finetune(tmp_path / "out", **MIXED, do_eval=True, eval_strategy="steps", eval_steps=3)
    assert process(folder) == ("mixed", 0.5)
    assert evaluations(folder)[0]["eval_loss"] > 0
    assert "eval_kl_q1" in evaluations(folder)[0]


@pytest.mark.slow
def test_an_adapter_may_have_other_noise_than_its_model(finetune, generate, checkpoint, mixed, tmp_path):
    adapter = finetune(tmp_path / "adapter", recipe="tiny_gpt2_lora_ddm_sft.yaml", **MIXED)
    assert process(adapter) == ("mixed", 0.5)
    again = finetune(
        tmp_path / "again", recipe="tiny_gpt2_lora_ddm_sft.yaml", adapter_name_or_path=adapter, create_new_adapter=True
    )
    assert process(again) == ("mixed", 0.5)


def test_evaluation_uses_the_noise_of_the_yaml(train_small, mixed, tmp_path):
    keys = {"model_name_or_path": mixed, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    mixed_metrics = evaluations(train_small(tmp_path / "mixed", **keys))[0]
    masked_metrics = evaluations(train_small(tmp_path / "masked", noise_process="masked", **keys))[0]
    assert "eval_kl" in mixed_metrics and "eval_nll" in masked_metrics


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"uniform_ratio": 0.5}, "uniform_ratio: 0.5 .* without noise_process: mixed"),
        ({"noise_process": "masked", "uniform_ratio": 0.5}, "uniform_ratio: 0.5 .*noise_process is masked"),
        ({"noise_process": "mxed"}, "noise_process .*'mxed'.*'mixed'"),
        (
            {**MIXED, "variable_length": "eos_pad", "eos_window_ratio": 0.3, "packing": False, "cutoff_len": 90},
            "eos_window_ratio: .* with noise_process: mixed",
        ),
        (
            {**MIXED, "variable_length": "eos_pad", "pad_mask_ratio": 0, "packing": False, "cutoff_len": 90},
            "pad_mask_ratio: .* with noise_process: mixed",
        ),
        (
            {"random_truncate_ratio": 0.5, "variable_length": "eos_pad", "packing": False, "cutoff_len": 90},
            "random_truncate_ratio: 0.5 .*variable_length: eos_pad",
        ),
    ],
)
def test_keys_that_contradict_each_other(train_small, tmp_path, keys, words):
    with pytest.raises(ValueError, match=words):
        train_small(tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_ratio_alone_does_not_change_the_process(train_small, checkpoint, mixed, tmp_path):
    for folder, stored in ((checkpoint, "masked, uniform_ratio: 0.0"), (mixed, "mixed, uniform_ratio: 0.5")):
        with pytest.raises(ValueError, match=rf"uniform_ratio: 0.2 .*checkpoint.*noise_process: {stored}"):
            train_small(tmp_path / "out", model_name_or_path=folder, uniform_ratio=0.2)
    saved = train_small(tmp_path / "saved", **MIXED, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=r"uniform_ratio: 0.2 .*checkpoint-2"):
        train_small(
            tmp_path / "new",
            resume_from_checkpoint=saved / "checkpoint-2",
            noise_process="mixed",
            uniform_ratio=0.2,
        )


@pytest.mark.slow
def test_random_truncate_ratio(train_small, finetune, checkpoint, tmp_path):
    cut = train_small(tmp_path / "cut", random_truncate_ratio=1.0)
    losses = [[log["loss"] for log in history(folder)] for folder in (cut, checkpoint)]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match=r"random_truncate_ratio: 0.5 .*stage is ddm-sft"):
        finetune(tmp_path / "sft", random_truncate_ratio=0.5)


@pytest.mark.slow
def test_an_adapter_of_continual_pre_training(train_small, generate, checkpoint, tmp_path):
    lora = {"finetuning_type": "lora", "lora_target": "c_attn,c_proj,c_fc"}
    adapter = train_small(tmp_path / "adapter", model_name_or_path=checkpoint, **lora, **MIXED, learning_rate=0.1)
    assert process(adapter) == ("mixed", 0.5)
    assert (adapter / "adapter_model.safetensors").is_file()
    texts = generate(tmp_path / "out", adapter_name_or_path=adapter, finetuning_type="lora")
    assert texts != generate(tmp_path / "base")


@pytest.mark.slow
def test_freeze_trains_the_last_layers_only(train_small, checkpoint, tmp_path):
    folder = train_small(
        tmp_path / "out", model_name_or_path=checkpoint, finetuning_type="freeze", freeze_trainable_layers=1, **MIXED
    )
    old, new = (load_file(path / "model.safetensors") for path in (checkpoint, folder))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    last = max(int(name.split(".")[2]) for name in old if name.startswith("transformer.h."))
    assert changed and all(name.startswith(f"transformer.h.{last}.") for name in changed)


@pytest.mark.slow
def test_an_export_is_what_was_trained(mixed, tmp_path):
    words = ("--model_name_or_path", mixed, "--template", "empty", "--finetuning_type", "full", "--stage", "ddm")
    to = ("--export_dir", tmp_path / "out", "--export_device", "cpu")
    contradicting = run("export", *words, *to, "--noise_process", "mixed", "--uniform_ratio", "0.7", check=False)
    assert contradicting.returncode != 0 and "uniform_ratio: 0.7" in contradicting.stderr
    assert not (tmp_path / "out").exists()
    run("export", *words, *to)
    assert process(tmp_path / "out") == ("mixed", 0.5)


@pytest.mark.slow
def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(checkpoint, train_small, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|unknown to the model|>"])
    tokenizer.save_pretrained(model)
    out = train_small(tmp_path / "out", model_name_or_path=model, **MIXED)
    assert all(math.isfinite(log["loss"]) for log in history(out))


@pytest.mark.slow
def test_generating_uses_the_noise_of_training(mixed, generate, checkpoint, tmp_path):
    for model, noise in ((checkpoint, MIXED), (mixed, {"noise_process": "masked"}), (mixed, {"uniform_ratio": 0.3})):
        with pytest.raises(ValueError, match=r"(noise_process|uniform_ratio): .*checkpoint"):
            generate(tmp_path / "out", model_name_or_path=model, **noise)
    assert len(generate(tmp_path / "same", model_name_or_path=mixed, **MIXED)) == 3


def test_a_model_without_masks_cannot_generate(train_small, generate, checkpoint, tmp_path):
    keys = {"model_name_or_path": checkpoint, "noise_process": "mixed", "uniform_ratio": 1}
    with pytest.raises(ValueError, match="sample_steps: 400: uniform_ratio"):
        train_small(tmp_path / "refused", **keys)
    model = train_small(tmp_path / "model", sample_steps=0, **keys)
    with pytest.raises(ValueError, match="uniform_ratio"):
        generate(tmp_path / "out", model_name_or_path=model)


def test_a_mixed_checkpoint_edits_by_its_own_ratio(mixed, generate, tmp_path):
    keys = {"model_name_or_path": mixed, "cutoff_len": 30, "diffusion_steps": 8, "logits_temp": 1.5}
    edited = generate(tmp_path / "default", **keys)
    assert edited == generate(tmp_path / "same", **keys, edit_ratio=0.5)
    assert edited != generate(tmp_path / "none", **keys, edit_ratio=0)
