"""Folders that lack weights are refused in training, generation and export, whichever key names them."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from llamafactory_ddm.cli.convert import main as convert
from llamafactory_ddm.cli.generate import main as generate_text
from support.cli import train_here

SOLVE = "tiny_gpt2_sft_inference.yaml"


def without(folder, target, part, name="model.safetensors"):
    """Copy a checkpoint, without the weights whose names hold `part`."""
    shutil.copytree(folder, target)
    weights = load_file(target / name)
    save_file({key: value for key, value in weights.items() if part not in key}, target / name, {"format": "pt"})
    return target


def test_a_model_without_a_layer(checkpoint, finetuned, finetune, generate, small_data, tmp_path):
    broken, out = without(checkpoint, tmp_path / "broken", "h.1."), tmp_path / "out"
    words = r"broken .*GPT2LMHeadModel .*missing: transformer\.h\.1\."
    with pytest.raises(ValueError, match=words):
        finetune(out, model_name_or_path=broken)
    with pytest.raises(ValueError, match=words):
        finetune(out, checkpoint_dir=str(broken))
    with pytest.raises(ValueError, match=words):
        finetune(out, recipe="tiny_gpt2_lora_ddm_sft.yaml", model_name_or_path=broken)
    with pytest.raises(ValueError, match=words):
        generate(out, model_name_or_path=broken)
    assert not out.exists() or not list(out.iterdir())
    finetune(tmp_path / "scratch", model_name_or_path=broken, train_from_scratch=True, max_steps=1)


def test_an_adapter_without_a_layer(adapter, checkpoint, tmp_path):
    broken = without(adapter, tmp_path / "broken", "h.1.", "adapter_model.safetensors")
    small = {"max_samples": 3, "diffusion_steps": 4, "cutoff_len": 64, "finetuning_type": "lora"}
    base = {"model_name_or_path": checkpoint, "adapter_name_or_path": str(broken)}
    with pytest.raises(ValueError, match=r"adapter .*broken .*base_model.*h\.1\."):
        train_here(SOLVE, output_dir=tmp_path / "out", **small, **base)


@pytest.mark.slow
def test_an_export(checkpoint, tmp_path):
    from llamafactory.train.tuner import export_model

    broken = without(checkpoint, tmp_path / "broken", "h.1.")
    keys = {"model_name_or_path": str(broken), "template": "default", "export_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"broken .*missing: transformer\.h\.1\."):
        export_model(keys)
    assert not (tmp_path / "out").exists()


def test_a_published_layout_is_refused_as_a_model(checkpoint, tmp_path, capsys):
    assert convert([str(checkpoint), str(tmp_path / "out"), "--published"]) == 0
    assert "checkpoint_dir" in capsys.readouterr().out
    assert generate_text([str(tmp_path / "out"), "--steps", "2"]) == 1
    assert "DiffuGPT" in capsys.readouterr().err
    assert convert([str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    assert "model_name_or_path" in capsys.readouterr().out
    assert generate_text([str(tmp_path / "back"), "--steps", "2", "--max-new-tokens", "4"]) == 0


def test_a_published_layout_is_refused_as_an_adapter(adapter, tmp_path, capsys):
    assert convert([str(adapter), str(tmp_path / "out"), "--published"]) == 0
    assert "convert" in capsys.readouterr().out
    assert generate_text([str(tmp_path / "out"), "--steps", "2"]) == 1
    assert "DiffuGPT" in capsys.readouterr().err
