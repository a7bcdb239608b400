"""SDAR in its published layout: loaded as a Qwen3 with block attention, written back, and what does not fit."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llamafactory_ddm import load
from llamafactory_ddm.checkpoints.convert import convert
from llamafactory_ddm.checkpoints.families import configuration_sdar, family_of_converted, find_diffusion_config
from llamafactory_ddm.checkpoints.families.base import rope_theta
from llamafactory_ddm.checkpoints.families.sdar import Sdar
from llamafactory_ddm.checkpoints.hub import local_folder
from llamafactory_ddm.checkpoints.load_model import load_whole
from llamafactory_ddm.cli.main import main
from llamafactory_ddm.modeling.bidirectional import full_attention_mask, make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.published import all_weights, in_hub, write_llada
from support.published_sdar import MASK, SDAR_CONFIG, sdar_by_formula, sdar_weights, write_sdar

MASK_ID = 266
IDS = torch.tensor([5, 9, MASK_ID, 7, 30, 200, 11, MASK_ID, MASK_ID, 3, 80])
PLAIN = Qwen3Config(
    vocab_size=288,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
GPT2 = GPT2Config(vocab_size=288, n_embd=32, n_layer=1, n_head=2)


def block_logits(model, block):
    """Logits [tokens, rows] of `IDS` under block-causal attention, through the package's own masks."""
    position = torch.arange(len(IDS))
    visible = (position[None, :] // block <= position[:, None] // block)[None, None]
    make_bidirectional(model)
    mask = full_attention_mask(
        model,
        batch=1,
        length=len(IDS),
        is_padding=None,
        visible=visible,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        return model.eval()(input_ids=IDS[None], attention_mask=mask).logits[0]


def auto_model(folder, attention="sdpa"):
    return load_whole(
        AutoModelForCausalLM,
        pretrained_model_name_or_path=folder,
        dtype=torch.float32,
        attn_implementation=attention,
    )


def trained_here(folder, config=PLAIN, **changed):
    """A block-diffusion Qwen3 as a run saves it, from a tokenizer that declares no mask token."""
    torch.manual_seed(0)
    model = {"qwen3": Qwen3ForCausalLM, "gpt2": GPT2LMHeadModel}[config.model_type](config)
    model.save_pretrained(folder)
    source = write_sdar(folder.parent / f"{folder.name}-tokens")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(folder)
    block = DiffusionConfig(
        MASK, MASK_ID, False, "masked", 0.0, "linear", 1.0, attention="block", train_block_length=8
    )
    block = replace(block, end_tokens=("<|endoftext|>", "<|im_end|>"), end_token_ids=(0, 263))
    replace(block, **changed).save(folder)
    return folder


@pytest.mark.parametrize(
    ("block", "tied", "attention"),
    [(1, False, "sdpa"), (4, False, "sdpa"), (4, False, "eager"), (4, True, "sdpa"), (8, False, "sdpa")],
)
def test_a_published_model_computes_the_published_function(tmp_path, tied, block, attention):
    folder = write_sdar(tmp_path / "published", tie_word_embeddings=tied)
    model = auto_model(folder, attention)
    assert type(model) is Qwen3ForCausalLM and type(model.config) is Qwen3Config
    expected = sdar_by_formula(sdar_weights(tied), IDS, block)
    torch.testing.assert_close(block_logits(model, block), expected, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_the_formula_tells_the_masks_apart():
    weights = sdar_weights()
    by_length = [sdar_by_formula(weights, IDS, block) for block in (1, 4, 8, len(IDS))]
    for first, second in pairwise(by_length):
        assert (first - second).abs().max() > 0.1


def test_scaled_rotary_angles_are_those_of_the_config(tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    model = auto_model(write_sdar(tmp_path / "published", rope_scaling=scaling))
    plain = auto_model(write_sdar(tmp_path / "plain"))
    torch.testing.assert_close(model.model.rotary_emb.inv_freq * 2, plain.model.rotary_emb.inv_freq)
    convert(tmp_path / "published", tmp_path / "converted")
    convert(tmp_path / "converted", tmp_path / "back", to_published="sdar")
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (raw["rope_scaling"]["factor"], raw["rope_theta"]) == (2.0, SDAR_CONFIG["rope_theta"])
    torch.testing.assert_close(block_logits(auto_model(tmp_path / "back"), 4), block_logits(model, 4))


def test_what_is_known_of_a_published_model(tmp_path):
    config = find_diffusion_config(write_sdar(tmp_path / "published"))
    assert (config.mask_token, config.mask_token_id, config.shift) == (MASK, MASK_ID, False)
    assert (config.attention, config.train_block_length, config.attention_ratio) == ("block", 4, 1.0)
    assert config.end_tokens == ("<|endoftext|>", "<|im_end|>") and config.start_token is None
    assert load(tmp_path / "published").config == config


@pytest.mark.parametrize(
    ("name", "keys", "length"),
    [
        ("SDAR-4B-Chat", {}, 4),
        ("SDAR-4B-Chat-b16", {}, 16),
        ("SDAR-4B-Chat-b16", {"block_size": 32}, 32),  # what the training code adds takes precedence
        ("b16-mine", {"block_size": 8}, 8),
        ("b16-mine", {}, 4),
    ],
)
def test_where_the_block_length_comes_from(tmp_path, caplog, name, keys, length):
    folder = write_sdar(tmp_path / name, **keys)
    assert find_diffusion_config(folder).train_block_length == length
    assert ("block_size" in caplog.text) is (length == 4)  # assumed, and said
    _, snapshot = in_hub(tmp_path / "hub", f"JetLM/{name}", [p for p in folder.iterdir() if p.is_file()])
    assert find_diffusion_config(snapshot).train_block_length == length


def test_the_mask_token_of_config_json_takes_precedence(tmp_path):
    folder = write_sdar(tmp_path / "published", mask_token_id=264)
    assert find_diffusion_config(folder).mask_token == "<think>"


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tmp_path, tied):
    published, converted, back = (tmp_path / name for name in ("published", "converted", "back"))
    write_sdar(published, tie_word_embeddings=tied, block_size=8, mask_token_id=MASK_ID)
    assert main(["convert", str(published), str(converted)]) == 0
    raw = json.loads((converted / "config.json").read_text())
    assert raw["model_type"] == "qwen3" and raw["tie_word_embeddings"] is tied and "auto_map" not in raw
    assert DiffusionConfig.load(converted) == find_diffusion_config(published)
    assert "auto_map" not in (converted / "tokenizer_config.json").read_text()
    assert main(["convert", str(converted), str(back), "--published", "sdar"]) == 0
    before, after = all_weights(published), all_weights(back)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    raw = json.loads((back / "config.json").read_text())
    expected = {**SDAR_CONFIG, "tie_word_embeddings": tied, "block_size": 8, "mask_token_id": MASK_ID}
    expected["auto_map"] = {"AutoConfig": "configuration_sdar.SDARConfig"}  # no modeling code is written
    for key in ("attn_implementation", "transformers_version"):
        del expected[key]
    assert {key: raw[key] for key in expected} == expected
    assert find_diffusion_config(back) == DiffusionConfig.load(converted)
    models = [block_logits(auto_model(folder), 8) for folder in (published, converted, back)]
    assert torch.equal(models[0], models[1]) and torch.equal(models[1], models[2])


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_trained_here_becomes_an_sdar(tmp_path, tied):
    folder, out = tmp_path / "trained", tmp_path / "out"
    config = Qwen3Config(**{**PLAIN.to_dict(), "tie_word_embeddings": tied})
    trained_here(folder, config)
    convert(folder, out, to_published="sdar")
    (out / "diffusion_config.json").unlink()  # which other tools do not read
    assert find_diffusion_config(out) == DiffusionConfig.load(folder)
    assert torch.equal(block_logits(auto_model(folder), 8), block_logits(auto_model(out), 8))
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 263]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK, MASK_ID)
    assert ("lm_head.weight" in all_weights(out)) is not tied


def test_a_mask_token_that_engines_do_not_find(tmp_path, caplog):
    convert(trained_here(tmp_path / "trained"), tmp_path / "out", to_published="sdar")
    assert re.search(r"id 266.*151669.*mask_token", caplog.text)
    caplog.clear()
    config = replace(DiffusionConfig.load(tmp_path / "out"), mask_token_id=151669)
    assert Sdar.published_config(PLAIN, config)["mask_token_id"] == 151669 and not caplog.text


def test_the_configuration_class_keeps_what_engines_read(tmp_path):
    convert(trained_here(tmp_path / "trained"), tmp_path / "out", to_published="sdar")
    assert (tmp_path / "out" / "configuration_sdar.py").read_bytes() == Path(configuration_sdar.__file__).read_bytes()
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    config = configuration_sdar.SDARConfig.from_dict(raw)
    engines = ("rope_theta", "rope_scaling", "head_dim", "block_size", "mask_token_id", "tie_word_embeddings")
    for key in (*engines, "attention_bias", "num_key_value_heads", "sliding_window", "vocab_size"):
        expected = raw[key]
        if key == "rope_scaling" and expected is None:  # transformers 5 writes the default out
            assert getattr(config, key, None) in (None, {"rope_type": "default", "rope_theta": raw["rope_theta"]})
        else:
            assert getattr(config, key) == expected, key


@pytest.mark.slow
def test_other_tools_read_the_folder(tmp_path):
    """In a process without the plugin, by the file that auto_map names, as inference engines do."""
    convert(trained_here(tmp_path / "trained"), tmp_path / "out", to_published="sdar")
    script = (
        "import sys\n"
        "from transformers import AutoConfig, AutoTokenizer, GenerationConfig\n"
        "c = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'llamafactory_ddm' not in sys.modules\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "g = GenerationConfig.from_pretrained(sys.argv[1])\n"
        "print(c.model_type, c.architectures, c.rope_theta, c.rope_scaling, c.head_dim, c.block_size, c.mask_token_id,"
        " c.tie_word_embeddings, c.torch_dtype, c.sliding_window, t.mask_token_id, g.eos_token_id, sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    values = done.stdout.strip().splitlines()[-1].split("|")
    assert values[:3] == ["sdar", "['SDARForCausalLM']", str(rope_theta(PLAIN))]
    assert values[4:8] == ["8", "8", str(MASK_ID), "False"] and values[8] in ("torch.float32", "float32")
    assert values[9:] == ["None", str(MASK_ID), "[0, 263]"]


@pytest.mark.parametrize(
    ("config", "changed", "pattern"),
    [
        (PLAIN, {"shift": True}, r"--published sdar.*shift: true.*shift: false"),
        (PLAIN, {"attention": "full", "train_block_length": None}, r"--published sdar.*attention: full.*block"),
        (GPT2, {}, r"--published sdar.*gpt2.*qwen3"),
    ],
)
def test_models_that_are_no_sdar(tmp_path, config, changed, pattern):
    folder = trained_here(tmp_path / "trained", config, **changed)
    with pytest.raises(ValueError, match=pattern) as caught:
        convert(folder, tmp_path / "out", to_published="sdar")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_layout_is_found_by_architecture_shift_and_attention(tmp_path):
    assert family_of_converted("qwen3", False, "block").name == "sdar"
    assert family_of_converted("qwen3", False) is None and family_of_converted("qwen3", True, "block") is None
    assert family_of_converted("llama", False, "block") is None
    convert(trained_here(tmp_path / "trained"), tmp_path / "out", to_published=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "sdar"
    shifted = trained_here(tmp_path / "shifted", shift=True)
    with pytest.raises(ValueError, match=r"--published sdar.*shift: false"):
        convert(shifted, tmp_path / "other", to_published=True)
    gpt2 = trained_here(tmp_path / "gpt2", GPT2)  # whose published layout, DiffuGPT's, is of full attention
    with pytest.raises(ValueError, match=r"--published.*gpt2.*attention: block"):
        convert(gpt2, tmp_path / "other", to_published=True)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("sdr", r"--published.*sdar.*'sdr'.*did you mean 'sdar'"),
        ("sdar_moe", r"--published.*sdar_moe"),
        ("llada", r"--published llada.*qwen3.*llama"),
    ],
)
def test_names_of_layouts(tmp_path, name, pattern):
    folder = trained_here(tmp_path / "trained")
    with pytest.raises(ValueError, match=pattern):
        convert(folder, tmp_path / "out", to_published=name)


def test_neither_an_adapter_nor_a_published_model_is_converted(tmp_path):
    published = write_sdar(tmp_path / "published")
    with pytest.raises(ValueError, match=r"--published.*SDAR already"):
        convert(published, tmp_path / "out", to_published="sdar")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {"base_model.model.model.layers.0.x.lora_A.weight": torch.zeros(1)}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(published)}))
    with pytest.raises(ValueError, match=r"--published sdar.*adapter.*export"):
        convert(adapter, tmp_path / "out", to_published="sdar")


@pytest.mark.parametrize(
    "words",
    [
        ("IN", "OUT", "--published"),
        ("IN", "OUT", "--published", "llada"),
        ("--published", "IN", "OUT"),
        ("IN", "--published", "OUT"),
        ("--published", "llada", "IN", "OUT"),
        ("IN", "--published", "llada", "OUT"),
        ("--published=llada", "IN", "OUT"),
    ],
)
def test_the_name_of_a_layout_is_optional_anywhere(tmp_path, words, monkeypatch):
    convert(write_llada(tmp_path / "published"), tmp_path / "IN")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == 0
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["model_type"] == "llada"


@pytest.mark.parametrize("words", [("IN",), ("IN", "--published"), ("--published=sdar", "IN")])
def test_a_missing_target_is_an_error(words):
    with pytest.raises(SystemExit):
        main(["convert", *words])


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\."),
        ({"intermediate_size": 39}, r"mlp\.\w+_proj\.weight"),
        ({"head_dim": ...}, r"config\.json .*SDAR.*'head_dim'"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"block_size": 0}, "block_size.*0"),
        ({"block_size": "four"}, "block_size.*'four'"),
        ({"mask_token_id": 287}, "mask_token_id .*SDAR.*287.*--mask-token"),
        ({"mask_token_id": -1}, "mask_token_id .*SDAR.*-1.*--mask-token"),
        ({"mask_token_id": "<mask>"}, "mask_token_id .*SDAR.*'<mask>'.*--mask-token"),
        ({"mask_token_id": 3.5}, "mask_token_id .*SDAR.*3.5.*--mask-token"),
        ({"model_type": "sdar_moe", "num_experts": 8}, "sdar_moe.*not supported"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(tmp_path, changed, pattern):
    folder = write_sdar(tmp_path / "published", **changed)
    with pytest.raises(ValueError, match=pattern):
        load(folder)
    with pytest.raises(ValueError, match=pattern):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_are_refused_before_they_are_downloaded(tmp_path):
    folder = write_sdar(tmp_path / "published", model_type="sdar_moe")
    hub, _ = in_hub(tmp_path / "hub", "JetLM/SDAR-30B-A3B-Chat", [folder / "config.json"])
    with pytest.raises(ValueError, match=r"sdar_moe.*not supported"):
        local_folder("JetLM/SDAR-30B-A3B-Chat", download_dir=str(hub))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "visual.patch_embed.weight"])
def test_further_weights_make_it_another_model(tmp_path, name):
    folder = write_sdar(tmp_path / "published", {**sdar_weights(), name: torch.ones(8)})
    for use in (load, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=name.rsplit(".", 1)[0]):
            use(folder)


def test_a_tokenizer_without_mask_token(tmp_path):
    folder = write_sdar(tmp_path / "published")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "mask_token": None}))
    with pytest.raises(ValueError, match=r"mask_token_id .*SDAR.*None.*--mask-token"):
        load(folder)
    convert(folder, tmp_path / "out", mask_token=MASK)
    assert DiffusionConfig.load(tmp_path / "out").mask_token_id == MASK_ID
    write_sdar(tmp_path / "declared")
    with pytest.raises(ValueError, match=r"--mask-token <think> .*id 266"):
        convert(tmp_path / "declared", tmp_path / "other", mask_token="<think>")


def test_the_config_is_a_plain_one(tmp_path):
    config = AutoConfig.from_pretrained(write_sdar(tmp_path / "published"))
    assert config.model_type == "qwen3" and config.tie_word_embeddings is False
    assert not {"auto_map", "attn_implementation", "block_size", "debug"} & config.to_dict().keys()


def test_it_is_saved_as_a_plain_model(tmp_path):
    folder, saved, converted = write_sdar(tmp_path / "published"), tmp_path / "saved", tmp_path / "converted"
    auto_model(folder).save_pretrained(saved)
    load(folder).tokenizer.save_pretrained(saved)
    convert(folder, converted)
    first, second = all_weights(saved), all_weights(converted)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    first, second = (json.loads((path / "config.json").read_text()) for path in (saved, converted))
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} <= {
        "dtype",
        "torch_dtype",
    }
    assert "auto_map" not in (saved / "tokenizer_config.json").read_text()
    assert not {"temperature", "top_k"} & json.loads((saved / "generation_config.json").read_text()).keys()
