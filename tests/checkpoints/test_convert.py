"""Miniatures of the published layouts, written out by hand, converted and converted back."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from llamafactory_ddm.checkpoints import diffullama as published
from llamafactory_ddm.checkpoints.convert import convert
from llamafactory_ddm.checkpoints.layouts import layout_of_folder
from llamafactory_ddm.checkpoints.weights import load_weights
from llamafactory_ddm.cli.main import main
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.tiny import tiny_tokenizer

NUM_EMBEDDINGS = 272  # more than the tokenizer has tokens
TOKENS = ["--mask-token", "!", "--sep-token", "\n"]


@pytest.fixture
def gpt2(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=NUM_EMBEDDINGS, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    names = {"transformer.wte.weight": "embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    return model, base, {names.get(k, k.replace("transformer.", "denoise_model.")): v for k, v in state(model).items()}


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUM_EMBEDDINGS, max_position_embeddings=16, **sizes))
    base = tmp_path / "base"
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    names = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    return model, base, {names.get(k) or "denoise_" + k: v for k, v in state(model).items()}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def logits(model):
    return model.eval()(torch.arange(8)[None]).logits


def test_diffugpt_becomes_an_ordinary_model_and_comes_back(gpt2, tmp_path):
    model, base, weights = gpt2
    source, converted_folder, back = tmp_path / "in", tmp_path / "out" / "converted", tmp_path / "back"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    assert main(["convert", str(source), str(converted_folder), "--base", str(base), *TOKENS]) == 0
    converted = AutoModelForCausalLM.from_pretrained(converted_folder)
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=0)
    config = DiffusionConfig.load(converted_folder)
    vocabulary = AutoTokenizer.from_pretrained(converted_folder).get_vocab()
    assert (config.mask_token_id, config.sep_token_id) == (vocabulary["!"], vocabulary["Ċ"])
    assert (config.shift, config.attention_ratio) == (True, 1.0)
    assert main(["convert", str(converted_folder), str(back), "--published"]) == 0
    again = load_file(back / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_bin_files_with_what_lies_beside_the_model(gpt2, tmp_path):
    model, base, weights = gpt2
    source = tmp_path / "in"
    source.mkdir()
    clutter = {"model.transformer.wte.weight": torch.ones(2), "denoise_model.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    torch.save({**weights, **clutter}, source / "pytorch_model.bin")
    convert(source, tmp_path / "out", base=base, mask_token="!")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_sharded_llama_in_the_wrappers_names(llama, tmp_path):
    model, base, weights = llama
    source, back = tmp_path / "in", tmp_path / "back"
    source.mkdir()
    shards, index = [dict(list(weights.items())[i::2]) for i in range(2)], {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(shard, source / name)
        index |= dict.fromkeys(shard, name)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    convert(source, tmp_path / "out", base=base, mask_token="!")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    convert(tmp_path / "out", back, to_published=True)
    for number, shard in enumerate(shards, 1):
        again = load_file(back / f"model-{number:05}-of-00002.safetensors")
        assert again.keys() == shard.keys()
        assert all(torch.equal(again[key], shard[key]) for key in shard)


def test_the_table_says_which_tokens_a_published_model_has(llama, tmp_path, monkeypatch):
    tokens = published.PublishedTokens(mask_id=7, sep_id=8, pad_id=9)
    monkeypatch.setitem(published.TOKENS, ("llama", NUM_EMBEDDINGS), tokens)
    _, base, _ = llama
    convert(base, tmp_path / "out")
    config, tokenizer = DiffusionConfig.load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (config.mask_token_id, config.sep_token_id, tokenizer.pad_token_id) == (7, 8, 9)
    assert tokenizer.convert_tokens_to_ids([config.mask_token, config.sep_token]) == [7, 8]


def test_the_table_adds_the_mask_of_diffugpt_m(gpt2, tmp_path, monkeypatch):
    _, base, weights = gpt2
    source = tmp_path / "in"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    tokens = published.PublishedTokens(mask_id=len(tiny_tokenizer()), sep_id=8, pad_id=None, new_mask="[M]")
    monkeypatch.setitem(published.TOKENS, ("gpt2", NUM_EMBEDDINGS), tokens)
    convert(source, tmp_path / "out", base=base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("[M]") == DiffusionConfig.load(tmp_path / "out").mask_token_id
    monkeypatch.setitem(published.TOKENS, ("gpt2", NUM_EMBEDDINGS), published.PublishedTokens(5, 8, None, "[other]"))
    with pytest.raises(ValueError, match=r"'\[other\]' .*id 5"):
        convert(source, tmp_path / "wrong", base=base)
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(ValueError, match=f"gpt2 .*{NUM_EMBEDDINGS} .*--mask-token"):
        convert(base, tmp_path / "autoregressive")  # any GPT-2 has the names of this one


def test_an_output_embedding_that_differs_stays_untied(gpt2, tmp_path):
    _, base, weights = gpt2
    weights["lm_head.weight"] = weights["lm_head.weight"] + torch.rand(NUM_EMBEDDINGS, 16)
    source = tmp_path / "in"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    convert(source, tmp_path / "out", base=base, mask_token="!")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(converted.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(converted.transformer.wte.weight, weights["embed_tokens.weight"])


def test_the_published_ids():
    ids = {key: (t.mask_id, t.sep_id, t.pad_id) for key, t in published.TOKENS.items()}
    assert ids == {
        ("gpt2", 50257): (10541, 50155, None),
        ("gpt2", 50258): (50257, 50155, 101),
        ("llama", 32000): (811, 4936, 30399),
    }


@pytest.fixture
def wrapped_adapter(llama, tmp_path):
    """A LoRA adapter with a trained embedding, in the names of DiffuLLaMA's wrapper, with its PEFT model."""
    model, base, _ = llama
    DiffusionConfig("x", 3, True, "masked", 0.0, "linear", 1.0).save(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    trained = get_peft_model(model, lora)
    for name, parameter in trained.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    plain, source = tmp_path / "plain", tmp_path / "in"
    trained.save_pretrained(plain, save_embedding_layers=False)
    source.mkdir()
    names = {"model.embed_tokens.": "embed_tokens.", "model.layers.": "denoise_model.layers."}
    weights = {}
    for key, value in load_file(plain / "adapter_model.safetensors").items():
        bare = key.removeprefix("base_model.model.")
        prefix = next(name for name in names if bare.startswith(name))
        weights[f"base_model.model.{names[prefix]}{bare.removeprefix(prefix)}"] = value
    settings = json.loads((plain / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "x"}))
    save_file(weights, source / "adapter_model.safetensors")
    return trained, base, source, weights


def test_an_adapter_of_llada_has_no_published_layout(wrapped_adapter, tmp_path):
    _, base, source, _ = wrapped_adapter
    convert(source, tmp_path / "out", base=base)
    config = DiffusionConfig.load(tmp_path / "out")
    dataclasses.replace(config, shift=False).save(tmp_path / "out")
    with pytest.raises(ValueError, match=r"LLaDA.*llamafactory-cli export.*--published"):
        convert(tmp_path / "out", tmp_path / "back", to_published=True)
    assert not (tmp_path / "back").exists()


def test_an_adapter_in_the_wrappers_names(wrapped_adapter, tmp_path):
    trained, base, source, weights = wrapped_adapter
    assert any(key.startswith("base_model.model.embed_tokens.") for key in weights)
    convert(source, tmp_path / "out", base=base)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert DiffusionConfig.load(tmp_path / "out").mask_token_id == 3
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(trained), rtol=0, atol=0)
    convert(tmp_path / "out", tmp_path / "back", to_published=True)
    again = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda w, key: w.pop(key), "missing .*lora_A"),
        (lambda w, key: w.update({key: torch.ones(3, 16)}), r"lora_A.*\(3, 16\) .*\(2, 16\)"),
        (lambda w, key: w.update({key.replace("layers.0", "layers.7"): w[key].clone()}), "unexpected .*layers.7"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base(wrapped_adapter, tmp_path, change, pattern):
    _, base, source, weights = wrapped_adapter
    change(weights, next(key for key in weights if "layers.0" in key and "lora_A" in key))
    save_file(weights, source / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=pattern):
        convert(source, tmp_path / "out", base=base)
    with pytest.raises(ValueError, match=r" x, .*config\.json.*--base"):
        convert(source, tmp_path / "out")


def test_weights_are_renamed_on_loading(gpt2, tmp_path):
    model, base, weights = gpt2
    save_file(weights, tmp_path / "model.safetensors")
    layout = layout_of_folder(tmp_path)
    assert layout is published.DIFFUGPT
    other = GPT2LMHeadModel(model.config)
    load_weights(other, tmp_path, rename=layout.to_standard)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
    assert layout_of_folder(base) is None


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda w: w.pop("denoise_model.wpe.weight"), "missing transformer.wpe.weight"),
        (lambda w: w.update({"denoise_model.extra": torch.ones(1)}), "unexpected transformer.extra"),
        (lambda w: w.update({"denoise_model.wpe.weight": torch.ones(3, 16)}), r"wpe\.weight \(3, 16\) .*\(16, 16\)"),
        (lambda w: w.update({"other.weight": torch.ones(1)}), r"other\.weight .*DiffuGPT"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing_behind(gpt2, tmp_path, change, pattern):
    _, base, weights = gpt2
    change(weights)
    source = tmp_path / "in"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=pattern):
        convert(source, tmp_path / "out", base=base, mask_token="!")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "in"]


def test_wrong_arguments_are_one_error(gpt2, tmp_path, capsys):
    _, base, weights = gpt2
    source, full = tmp_path / "in", tmp_path / "full"
    source.mkdir()
    full.mkdir()
    (full / "precious").touch()
    save_file(weights, source / "model.safetensors")
    for argv, fragment in (
        (["nowhere", "out"], "nowhere"),
        ([source, full, "--base", base], str(full)),
        ([source, tmp_path / "out"], "--base"),
        ([source, tmp_path / "out", "--base", base], "--mask-token"),
        ([source, tmp_path / "out", "--base", base, "--mask-token", "two words"], "'two words'"),
        ([source, tmp_path / "out", "--base", base, "--published"], "DiffuGPT"),
    ):
        assert main(["convert", *map(str, argv)]) == 1
        assert fragment in capsys.readouterr().err, fragment
    assert not (tmp_path / "out").exists()
