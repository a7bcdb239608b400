"""Prompts of a finetuned model are formatted as in its training: in YAML, in the shell and in Python."""

import json
import re

import pytest
from llamafactory.data.template import TEMPLATES

from llamafactory_ddm import load
from llamafactory_ddm.cli.generate import main
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.chat import PAIR, run_keys, save_data, save_decoder
from support.cli import predictions

PROMPT = "Tom saw a cat."
STAGE = {"stage": "ddm-sft", "cutoff_len": 48}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model that was finetuned with template: qwen."""
    folder = tmp_path_factory.mktemp("stored_template")
    save_decoder(folder / "model")
    save_data(folder / "data", one=([{"q": PROMPT, "a": "It was red."}] * 16, PAIR))
    learn = {"learning_rate": 1e-2, "max_steps": 120, "per_device_train_batch_size": 8, "antithetic_time": True}
    keys = {"do_train": True, "model_name_or_path": folder / "model", "template": "qwen", "dataset": "one"}
    run_keys(folder / "out", dataset_dir=folder / "data", train_on_padding=False, **learn, **keys, **STAGE)
    return folder


def predict(folder, work, **keys):
    settings = {
        "do_predict": True,
        "model_name_or_path": work / "out",
        "eval_dataset": "one",
        "max_samples": 1,
        **keys,
    }
    run_keys(folder, dataset_dir=work / "data", max_new_tokens=8, diffusion_steps=16, **settings, **STAGE)
    return predictions(folder)[0]


def test_python_formats_prompts_as_training_did(work, tmp_path):
    model = load(work / "out", device="cpu")
    assert model.config.template.name == "qwen"
    answer = model.generate(PROMPT, max_new_tokens=8, diffusion_steps=16, temperature=0)
    assert answer == [predict(tmp_path / "out", work, template="qwen")] and "red" in answer[0]
    formatted = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert formatted in model.tokenizer.decode(model.from_templated(PROMPT, 4).ids)
    raw = model.generate(PROMPT, max_new_tokens=8, diffusion_steps=16, temperature=0, raw=True)
    assert raw != answer
    assert (
        load(work / "out", device="cpu", raw=True).generate(
            PROMPT, max_new_tokens=8, diffusion_steps=16, temperature=0
        )
        == raw
    )
    assert "template qwen" in repr(model) and "Qwen2ForCausalLM of 0.1 million" in repr(model)


def test_another_template_is_used_with_a_warning(work, caplog):
    model = load(work / "out", device="cpu", template="default")
    assert re.search("template: default .*qwen", caplog.text)
    assert model.tokenizer.decode(model.from_templated(PROMPT, 4).ids).startswith(f"Human: {PROMPT}")
    model = load(work / "out", device="cpu")
    assert model.with_template("qwen").config == model.config
    with pytest.raises(ValueError, match="template and raw"):
        model.generate(PROMPT, template="qwen", raw=True)
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.generate("")


def test_the_shell(work, capsys):
    model = load(work / "out", device="cpu")
    keys = {"max_new_tokens": 8, "diffusion_steps": 16, "temperature": 0}
    answer, raw = (model.generate(PROMPT, raw=raw, **keys)[0].strip() for raw in (False, True))
    words = [str(work / "out"), "--prompt", PROMPT, "--max-new-tokens", "8", "--steps", "16", "--temperature", "0"]
    for flags, expected in (([], answer), (["--template", "qwen"], answer), (["--raw"], raw)):
        assert main([*words, *flags]) == 0
        assert capsys.readouterr().out.strip() == expected
    assert main([*words, "--template", "qwn"]) == 1
    assert "template: qwn" in capsys.readouterr().err


def test_a_yaml_without_template_uses_the_stored_one_and_another_one_gives_a_warning(work, tmp_path, told):
    assert predict(tmp_path / "none", work) == predict(tmp_path / "named", work, template="qwen")
    assert re.search("template: .*using qwen", told.text)
    assert "formats prompts differently" not in told.text
    predict(tmp_path / "other", work, template="default")
    assert re.search("template: default formats prompts differently .*template: qwen", told.text)


def test_training_with_another_template_gives_a_warning_and_stores_it(work, tmp_path, told, monkeypatch):
    monkeypatch.setattr(TEMPLATES["qwen"], "default_system", "You are a cat.")
    keys = {"do_train": True, "model_name_or_path": work / "out", "template": "qwen", "dataset": "one", **STAGE}
    out = run_keys(tmp_path / "out", dataset_dir=work / "data", train_on_padding=None, **keys)
    assert re.search("template: qwen formats prompts differently .*default_system", told.text)
    texts = json.dumps([part.text for part in DiffusionConfig.load(out).template.parts])
    assert "You are a cat." in texts


def test_an_adapter_stores_the_template(work, tmp_path):
    keys = {"do_train": True, "model_name_or_path": work / "model", "template": "qwen", "dataset": "one", **STAGE}
    out = run_keys(tmp_path / "out", dataset_dir=work / "data", **keys, **{"finetuning_type": "lora"})
    assert DiffusionConfig.load(out).template == DiffusionConfig.load(work / "out").template
    assert load(out, device="cpu").config.template.name == "qwen"
