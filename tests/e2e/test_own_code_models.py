"""Miniatures of LLaDA and Dream in their published layouts: training, generation, merging, conversion back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm import load
from llamafactory_ddm.cli.main import main
from llamafactory_ddm.modeling.bidirectional import make_bidirectional
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import ABSENT, history, predictions, run, train_here, train_in_processes
from support.published import MASK_ID, all_weights, by_formula, dream_by_formula, in_hub, write_dream, write_llada

IDS = torch.tensor([5, 9, MASK_ID, 7, 30, MASK_ID, 11, 200, 3])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
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
    "cutoff_len": 128,
    "dataset": "tiny_problems_train",
    "overwrite_cache": True,
}
FULL = {"finetuning_type": "full", "lora_rank": ABSENT, "lora_alpha": ABSENT, "lora_target": ABSENT}
CORPUS = {"stage": "ddm", "dataset": "tiny_corpus_train", "template": ABSENT, "train_on_padding": ABSENT}


class Kind:
    """A miniature in its published layout, with its properties written out here."""

    def __init__(self, name, folder, data):
        self.name, self.data = name, data
        self.folder = {"llada": write_llada, "dream": write_dream}[name](folder)
        self.formula = {"llada": by_formula, "dream": dream_by_formula}[name]
        self.shift, self.mask = {"llada": (False, "<|mdm_mask|>"), "dream": (True, "<|mask|>")}[name]

    def train(self, out, **keys):
        run_keys = {"model_name_or_path": self.folder, "dataset_dir": self.data, **SMALL, **keys}
        train_here(f"{self.name}_lora_ddm_sft.yaml", output_dir=out, **run_keys)
        return out

    def predict(self, out, **keys):
        small = {"max_samples": 2, "diffusion_steps": 4, "max_new_tokens": 8, "infer_dtype": "float32"}
        small |= {"model_name_or_path": self.folder, "dataset_dir": self.data, "eval_dataset": "tiny_problems_eval"}
        small |= {"overwrite_cache": True, "cutoff_len": 240}
        if self.name == "llada":
            small["block_length"] = 4
        train_here(f"{self.name}_inference.yaml", output_dir=out, **{**small, **keys})
        return predictions(out)


@pytest.fixture(scope="module", params=["llada", "dream"])
def kind(request, tmp_path_factory, small_data):
    return Kind(request.param, tmp_path_factory.mktemp("published") / request.param, small_data)


@pytest.fixture(scope="module")
def trained(kind, tmp_path_factory):
    """Full training on documents."""
    return kind.train(tmp_path_factory.mktemp("trained") / "out", **FULL, **CORPUS)


@pytest.fixture(scope="module")
def adapter(kind, tmp_path_factory):
    """An adapter, trained on questions and answers with the family's template."""
    return kind.train(tmp_path_factory.mktemp("adapter") / "out")


def losses(folder):
    return [log["loss"] for log in history(folder)]


def logits(model):
    with torch.no_grad():
        # Without a mask transformers 4 makes a causal one.
        return model(input_ids=IDS[None], attention_mask=torch.zeros(1, 1, len(IDS), len(IDS))).logits[0]


def bidirectional(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    make_bidirectional(model)
    return model


@pytest.mark.slow
def test_full_training_takes_shift_and_mask_from_the_family(kind, trained):
    config = DiffusionConfig.load(trained)
    assert (config.shift, config.mask_token, config.mask_token_id) == (kind.shift, kind.mask, MASK_ID)
    assert [log["attention_ratio"] for log in history(trained)] == [1.0] * 3  # nothing is annealed
    start = load(kind.folder).model.state_dict()
    after = load_file(trained / "model.safetensors")
    assert start.keys() == after.keys()
    assert all(
        not torch.equal(start[key], after[key]) for key in start if "layers" in key and "k_proj.bias" not in key
    )
    assert AutoTokenizer.from_pretrained(trained).convert_tokens_to_ids(kind.mask) == MASK_ID


@pytest.mark.slow
def test_a_trained_model_converts_back_to_its_published_layout(kind, trained, tmp_path):
    back = tmp_path / "back"
    assert main(["convert", str(trained), str(back), "--published"]) == 0
    weights = all_weights(back)
    assert weights.keys() == all_weights(kind.folder).keys()
    expected = logits(bidirectional(trained))
    torch.testing.assert_close(kind.formula(weights, IDS), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(kind.formula(all_weights(kind.folder), IDS), expected, atol=1e-2)
    raw, published = (json.loads((folder / "config.json").read_text()) for folder in (back, kind.folder))
    differing = {"auto_map", "bos_token_id"}  # the latter is the tokenizer's and not in Dream's config
    assert {key: raw[key] for key in published.keys() - differing} == {
        key: published[key] for key in published.keys() - differing
    }
    torch.testing.assert_close(logits(load(back).model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_full_finetuning_continues_from_training(kind, trained, tmp_path):
    out = kind.train(tmp_path / "out", **FULL, model_name_or_path=trained, max_steps=2)
    config = DiffusionConfig.load(out)
    assert (config.shift, config.mask_token_id, config.train_on_padding) == (kind.shift, MASK_ID, True)


def test_a_yaml_that_contradicts_the_kind(kind, tmp_path):
    with pytest.raises(ValueError, match=f"shift: {not kind.shift} "):
        kind.train(tmp_path / "out", shift=not kind.shift)
    with pytest.raises(ValueError, match=r"mask_token: 5 .*id 5"):
        kind.train(tmp_path / "out", mask_token=5)


def test_generating_from_noise_and_from_prompts(kind, tmp_path):
    assert len(kind.predict(tmp_path / "answers")) == 2
    noise = {"stage": "ddm", "template": ABSENT, "eval_dataset": ABSENT, "max_samples": ABSENT, "num_samples": 2}
    assert len(kind.predict(tmp_path / "noise", **noise)) == 2


@pytest.mark.slow
def test_an_adapter_records_the_published_folder(kind, adapter, tmp_path, caplog):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(kind.folder)
    assert set(settings["target_modules"]) == LINEAR
    names = load_file(adapter / "adapter_model.safetensors")
    assert len(names) == 2 * len(LINEAR) * 2  # two matrices for each linear module of two layers, and no embedding
    assert losses(adapter)[-1] != losses(adapter)[0]
    keys = {"adapter_name_or_path": str(adapter), "finetuning_type": "lora"}
    assert len(kind.predict(tmp_path / "answers", **keys)) == 2
    continued = kind.train(tmp_path / "continued", adapter_name_or_path=str(adapter), max_steps=1)
    assert json.loads((continued / "adapter_config.json").read_text())["base_model_name_or_path"] == str(kind.folder)
    assert "was trained on" not in caplog.text  # the adapter and its base belong together


@pytest.mark.slow
def test_an_adapter_is_merged(kind, adapter, tmp_path):
    model = load(adapter).model
    keys = {"model_name_or_path": kind.folder, "adapter_name_or_path": adapter, "finetuning_type": "lora"}
    keys |= {"template": kind.name, "export_dir": tmp_path / "merged", "infer_dtype": "float32"}
    run("export", *(word for key, value in keys.items() for word in (f"--{key}", str(value))))
    assert DiffusionConfig.load(tmp_path / "merged") == DiffusionConfig.load(adapter)
    torch.testing.assert_close(logits(bidirectional(tmp_path / "merged")), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(load(kind.folder).model), logits(model), atol=1e-3)


@pytest.mark.slow
def test_a_missing_base_model_is_an_error(kind, adapter, tmp_path):
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/nowhere/llada"}))
    with pytest.raises(ValueError, match="/nowhere/llada"):
        load(moved)


@pytest.mark.slow
def test_two_processes_find_it_by_its_hub_name(small_data, tmp_path):
    published = write_llada(tmp_path / "LLaDA-mini")
    hub, snapshot = in_hub(tmp_path / "hub", "owner/LLaDA-mini", published.iterdir())
    keys = {"model_name_or_path": "owner/LLaDA-mini", "cache_dir": hub, "dataset_dir": small_data, "use_cpu": "true"}
    keys |= {**SMALL, "output_dir": tmp_path / "out", "max_steps": 1, "save_strategy": "steps"}
    arguments = [f"{key}={value}" for key, value in keys.items()]
    done = train_in_processes(2, "examples/llada_lora_ddm_sft.yaml", *arguments, "trust_remote_code=true")
    printed = "".join(one.stdout + one.stderr for one in done)
    assert f"owner/LLaDA-mini is used from {snapshot}" in printed
    assert printed.count("loaded as a plain LlamaForCausalLM") == 1  # the published code, which fails, is not run
    # Not the Hub name, which would not be looked up in cache_dir.
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(snapshot)


def test_training_from_scratch(kind, tmp_path):
    out = kind.train(tmp_path / "out", **FULL, **CORPUS, train_from_scratch=True, max_steps=1)
    assert json.loads((out / "config.json").read_text())["model_type"] in ("llama", "qwen2")
    assert load_file(out / "model.safetensors").keys() == load(kind.folder).model.state_dict().keys()
