"""Weights that a folder lacks are an error, wherever it is loaded; buffers that a model computes may be absent."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llamafactory_ddm import load
from llamafactory_ddm.checkpoints.load_model import load_whole
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_tokenizer

CONFIG = DiffusionConfig("<|mask|>", 262, True, "masked", 0.0, "linear", 1.0)


def save(folder, model_type="llama", *, tied=False, **save_options):
    torch.manual_seed(0)
    if model_type == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=288, tie_word_embeddings=tied, **sizes))
    model.save_pretrained(folder, **save_options)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokenizer.save_pretrained(folder)
    CONFIG.save(folder)
    return model


def change(folder, edit, name="model.safetensors"):
    weights = load_file(folder / name)
    edit(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def without(part):
    def edit(weights):
        for key in [key for key in weights if part in key]:
            del weights[key]

    return edit


def loader_warnings(caplog):
    """Return the warnings of this package's loader."""
    return [record.getMessage() for record in caplog.records if record.name.endswith("load_model")]


@pytest.mark.parametrize(("part", "tied"), [("layers.1.", False), ("lm_head", False), ("embed_tokens", True)])
def test_a_missing_weight_is_an_error(tmp_path, part, tied):
    save(tmp_path / "m", tied=tied)
    change(tmp_path / "m", without(part))
    with pytest.raises(ValueError, match=f"m .*LlamaForCausalLM .*missing: .*{part}") as caught:
        load(tmp_path / "m", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("save_options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_loads_tied_or_not_in_one_file_or_many(tmp_path, model_type, save_options, tied, caplog):
    model = save(tmp_path / "m", model_type, tied=tied, **save_options)
    loaded = load(tmp_path / "m", device="cpu").model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not loader_warnings(caplog)


def test_bin_files_are_checked_too(tmp_path):
    model = save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    load(tmp_path / "m", device="cpu")
    del state["model.layers.0.mlp.up_proj.weight"]
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp\.up_proj\.weight"):
        load(tmp_path / "m", device="cpu")


def test_a_shape_that_differs_is_one_line(tmp_path):
    save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"up_proj\.weight") as caught:
        load(tmp_path / "m", device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_that_the_model_lacks_are_a_warning(tmp_path, caplog):
    save(tmp_path / "m")
    change(tmp_path / "m", lambda weights: weights.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}))
    load(tmp_path / "m", device="cpu")
    (line,) = loader_warnings(caplog)
    assert str(tmp_path / "m") in line and "layers.2.mlp.up_proj" in line


def test_a_buffer_that_the_model_computes_may_be_absent(tmp_path):
    class WithTable(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("positions", torch.arange(4))

    save(tmp_path / "m")
    assert load_whole(WithTable, pretrained_model_name_or_path=tmp_path / "m").lm_head is not None


@pytest.mark.parametrize("part", ["layers.1.self_attn.q_proj.lora_B", "embed_tokens"])
def test_an_adapter_that_lacks_weights_is_an_error(tmp_path, part):
    save(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], r=2))
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "diffusion_config.json"):
        shutil.copy(tmp_path / "base" / name, tmp_path / "adapter")
    load(tmp_path / "adapter", device="cpu")
    change(tmp_path / "adapter", without(part), "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"/adapter .*{part}"):
        load(tmp_path / "adapter", device="cpu")


def test_the_base_of_an_adapter_is_checked_too(tmp_path):
    """Its index could name any file, and only transformers reads it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    get_peft_model(save(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    CONFIG.save(adapter)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    shutil.copytree(base, tmp_path / "elsewhere")
    table = dict.fromkeys(load_file(base / "model.safetensors"), "../elsewhere/model.safetensors")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    for folder in (base, adapter):
        with pytest.raises(ValueError, match=r"index\.json .*elsewhere/model\.safetensors"):
            load(folder)
