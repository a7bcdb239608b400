"""Model cards describe the run, the Hub can read them, and a card that cannot be written does not stop a run."""

import re
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from llamafactory_ddm import load
from llamafactory_ddm.integration.model.model_card import Origin, card, write
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig, VariableLength
from support.cli import train_here

CONFIG = DiffusionConfig("<|mask|>", 740, True, "masked", 0.0, "linear", 1.0)
SMALL = {"max_steps": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "eval_time_samples": 1}
SMALL |= {"eval_strategy": "no", "max_samples": 8, "overwrite_cache": True, "do_eval": False}


def read(folder):
    path = folder / "README.md"
    model_card = ModelCard.load(path)
    text = path.read_text(encoding="utf-8")
    assert "Causal" not in text and "More information needed" not in text
    return model_card.data, text


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    out = tmp_path_factory.mktemp("card") / "full"
    train_here("tiny_gpt2_full_ddm.yaml", output_dir=out, **SMALL)
    return out


@pytest.fixture(scope="module")
def lora(full):
    out = full.parent / "lora"
    train_here("tiny_gpt2_lora_ddm_sft.yaml", model_name_or_path=full, output_dir=out, **SMALL)
    return out


def test_a_full_model(full):
    data, text = read(full)
    assert data.library_name == "llamafactory-ddm" and data.pipeline_tag == "text-generation"
    assert {"diffusion", "masked-diffusion", "llama-factory", "llamafactory-ddm", "full"} <= set(data.tags)
    assert data.base_model is None  # a folder is no model on the Hub
    for words in ("`<|mask|>` (id 740)", "shift: true", "linear", "data/tiny_gpt2", "tiny_corpus_train", "steps: 1"):
        assert words in text
    assert "unfinished" in text  # one step does not anneal the attention


def test_an_adapter(full, lora):
    """PEFT writes a card too, with another library_name."""
    data, text = read(lora)
    assert {"diffusion", "lora"} <= set(data.tags) and data.library_name == "llamafactory-ddm"
    assert "LoRA" in text and str(full) in text


def test_the_usage_of_a_card_works(full):
    _, text = read(full)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    folder = re.search(r"load\('(.*)'\)", code)[1]
    assert isinstance(load(folder).generate("Once upon a time", max_new_tokens=4)[0], str)
    exec(code, {"print": lambda text: text})


def test_an_export_has_a_card_and_no_modelfile(full, lora, tmp_path):
    from llamafactory.train.tuner import export_model

    out = tmp_path / "exported"
    keys = {"model_name_or_path": str(full), "adapter_name_or_path": str(lora), "finetuning_type": "lora"}
    export_model({**keys, "template": "default", "export_dir": str(out)})
    assert not (out / "Modelfile").exists()
    data, text = read(out)
    assert "diffusion" in data.tags and str(full) in text and str(lora) in text


def test_a_card_that_is_there_already_or_cannot_be_written(full, tmp_path, caplog):
    """An existing card may have any encoding; a folder in its place is a warning."""
    (tmp_path / "README.md").write_bytes(b"---\nlibrary_name: [peft\n---\n\xff")
    write(tmp_path, "new")
    assert (tmp_path / "README.md").read_text() == "new"
    (tmp_path / "other" / "README.md").mkdir(parents=True)
    write(tmp_path / "other", "new")
    assert str(tmp_path / "other" / "README.md") in caplog.text


def test_cards_of_other_models():
    variable_length = VariableLength("rainbow", ("<|pad|>",), (5,), 64)
    mixed = DiffusionConfig("<|mask|>", 740, False, "mixed", 1.0, "cosine", 0.25, variable_length=variable_length)
    text = card("n", "me/n", mixed, Origin("openai-community/gpt2", "ddm-sft", "lora", ("a", "b")))
    for words in ("uniform-diffusion", "base_model: openai-community/gpt2", "base_model_relation: adapter", "cosine"):
        assert words in text
    for words in ("mixed, uniform_ratio 1.0", "annealed to 0.250, unfinished", "rainbow, canvas of 64", "Data: a, b."):
        assert words in text
    assert "masked-diffusion" not in text and "shift: false" in text
    fresh = card("n", "out", CONFIG, Origin(None, "ddm", "full"))
    assert "trained from random weights" in fresh and "base_model" not in fresh


def test_a_pushed_model_has_its_hub_name(full, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("transformers.trainer.create_repo", lambda name, **options: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("transformers.trainer.upload_folder", lambda **arguments: pushed.append(arguments))
    hub = {"push_to_hub": True, "hub_model_id": "me/toy", "hub_strategy": "end", "save_strategy": "no"}
    train_here("tiny_gpt2_full_ddm.yaml", output_dir=tmp_path / "out", model_name_or_path=full, **hub, **SMALL)
    assert {(arguments["repo_id"], arguments["folder_path"]) for arguments in pushed} == {
        ("me/toy", str(tmp_path / "out"))
    }
    text = read(tmp_path / "out")[1]
    assert "load('me/toy')" in text and "# toy" in text
