"""QLoRA: a base model in 4 bits; its adapter is trained, evaluated, used for generation and merged."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.cli import ABSENT, evaluations, history, predictions, run, train_here
from support.published import write_llada

pytest.importorskip("bitsandbytes")
LORA = "tiny_gpt2_lora_ddm_sft.yaml"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, finetune):
    """An adapter of the shared checkpoint in 4 bits, evaluated after each of four steps."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    keys = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    return finetune(folder, recipe=LORA, quantization_bit=4, **keys)


@pytest.mark.slow
def test_it_trains_near_the_run_in_full_precision(quantized, finetune, tmp_path):
    full = finetune(tmp_path / "full", recipe=LORA, max_steps=4)
    for a, b in zip(history(full), history(quantized), strict=True):
        assert a["masked_fraction"] == b["masked_fraction"]
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
        assert b["loss"] != a["loss"]
    assert any(value.abs().max() > 0 for key, value in adapter(quantized).items() if "lora_B" in key)


@pytest.mark.slow
def test_evaluation_leaves_training_alone(quantized, finetune, tmp_path):
    """On the CPU, bitsandbytes packs a layer in evaluation mode so that it cannot be trained afterwards."""
    without = finetune(tmp_path / "without", recipe=LORA, quantization_bit=4, max_steps=4)
    assert [log["loss"] for log in history(quantized)] == [log["loss"] for log in history(without)]
    for key, value in adapter(without).items():
        assert torch.equal(value, adapter(quantized)[key]), key
    bounds = [log["eval_loss"] for log in evaluations(quantized)]
    assert len(bounds) >= 4 and bounds[3] < bounds[0]


@pytest.mark.slow
def test_mixed_noise_in_four_bits(finetune, tmp_path):
    keys = {"recipe": LORA, "max_steps": 4, "noise_process": "mixed", "uniform_ratio": 0.2}
    full = finetune(tmp_path / "full", **keys)
    quantized = finetune(tmp_path / "quantized", quantization_bit=4, **keys)
    for a, b in zip(history(full), history(quantized), strict=True):
        assert a["masked_fraction"] == b["masked_fraction"]
        assert b["kl"] == pytest.approx(a["kl"], rel=0.05) and b["kl"] != a["kl"]


@pytest.mark.slow
def test_it_generates_and_merges(quantized, checkpoint, tmp_path):
    model_keys = {"model_name_or_path": checkpoint, "adapter_name_or_path": quantized, "finetuning_type": "lora"}
    small = {"max_samples": 2, "diffusion_steps": 2, "cutoff_len": 64, "overwrite_cache": True}
    train_here(
        "tiny_gpt2_sft_inference.yaml", output_dir=tmp_path / "solved", quantization_bit=4, **model_keys, **small
    )
    assert len(predictions(tmp_path / "solved")) == 2
    keys = {**model_keys, "template": "diffullama", "export_dir": tmp_path / "merged", "infer_dtype": "float32"}
    run("export", *(word for key, value in keys.items() for word in (f"--{key}", str(value))))
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(merged.state_dict()[name], base.state_dict()[name])


@pytest.mark.slow
def test_published_weights_in_four_bits(small_data, tmp_path):
    """LLaDA's are renamed before they are quantised."""
    keys = {"model_name_or_path": write_llada(tmp_path / "llada"), "dataset_dir": small_data, "plot_loss": False}
    keys |= {"dataset": "tiny_problems_train", "max_steps": 2, "warmup_ratio": 0, "logging_steps": 1, "bf16": False}
    keys |= {"gradient_accumulation_steps": 1, "cutoff_len": 128, "save_strategy": "no", "overwrite_cache": True}
    for name, bits in (("full", {}), ("quantized", {"quantization_bit": 4})):
        train_here("llada_lora_ddm_sft.yaml", output_dir=tmp_path / name, **keys, **bits)
    for a, b in zip(history(tmp_path / "full"), history(tmp_path / "quantized"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.1) and b["loss"] != a["loss"]


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_an_adapter_in_blocks_trains_near_the_run_in_full_precision(finetune, tmp_path):
    blocks = {"attention": "block", "train_block_length": 4, "antithetic_time": ABSENT}
    keys = {"recipe": LORA, "max_steps": 2, "do_eval": True, "eval_strategy": "steps", "eval_steps": 1, **blocks}
    full = finetune(tmp_path / "full", **keys)
    quantized = finetune(tmp_path / "quantized", quantization_bit=4, **keys)
    for a, b in zip(history(full), history(quantized), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.05) and b["loss"] != a["loss"]
    bounds = [evaluations(folder)[0]["eval_loss"] for folder in (quantized, full)]
    assert bounds[0] == pytest.approx(bounds[1], rel=0.05)
