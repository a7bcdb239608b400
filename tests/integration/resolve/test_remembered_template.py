"""A finetuned model gets its prompts as it was trained to: from YAML, in the shell and in a notebook."""

import json

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
    """A model that has learnt to answer under ChatML."""
    folder = tmp_path_factory.mktemp("remembered")
    save_decoder(folder / "model")
    save_data(folder / "data", one=([{"q": PROMPT, "a": "It was red."}] * 16, PAIR))
    learn = {"learning_rate": 1e-2, "max_steps": 120, "per_device_train_batch_size": 8, "antithetic_time": True}
    keys = {"do_train": True, "model_name_or_path": folder / "model", "template": "qwen", "dataset": "one"}
    run_keys(folder / "out", dataset_dir=folder / "data", train_on_padding=False, **learn, **keys, **STAGE)
    return folder


def predict(folder, work, **keys):
    given = {"do_predict": True, "model_name_or_path": work / "out", "eval_dataset": "one", "max_samples": 1, **keys}
    run_keys(folder, dataset_dir=work / "data", max_new_tokens=8, diffusion_steps=16, **given, **STAGE)
    return predictions(folder)[0]


def test_a_notebook_asks_as_training_did(work, tmp_path):
    model = load(work / "out", device="cpu")
    assert model.config.template.name == "qwen"
    answer = model.generate(PROMPT, max_new_tokens=8, diffusion_steps=16, temperature=0)
    assert answer == [predict(tmp_path / "out", work, template="qwen")] and "red" in answer[0]
    asked = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert asked in model.tokenizer.decode(model.from_templated(PROMPT, 4).ids)
    raw = model.generate(PROMPT, max_new_tokens=8, diffusion_steps=16, temperature=0, raw=True)
    assert raw != answer
    assert (
        load(work / "out", device="cpu", raw=True).generate(
            PROMPT, max_new_tokens=8, diffusion_steps=16, temperature=0
        )
        == raw
    )
    assert "template qwen" in repr(model) and "Qwen2ForCausalLM of 0.1 million" in repr(model)


def test_another_template_is_taken_and_said(work, caplog):
    model = load(work / "out", device="cpu", template="default")
    assert "template: default is not the one that this model was finetuned with, which is qwen" in caplog.text
    assert model.tokenizer.decode(model.from_templated(PROMPT, 4).ids).startswith(f"Human: {PROMPT}")
    own = load(work / "out", device="cpu")
    assert own.with_template("qwen").config == own.config
    with pytest.raises(ValueError, match="template and raw"):
        own.generate(PROMPT, template="qwen", raw=True)
    with pytest.raises(ValueError, match="the prompt is empty"):
        own.generate("")


def test_the_shell(work, capsys):
    model = load(work / "out", device="cpu")
    keys = {"max_new_tokens": 8, "diffusion_steps": 16, "temperature": 0}
    answer, raw = (model.generate(PROMPT, raw=raw, **keys)[0].strip() for raw in (False, True))
    words = [str(work / "out"), "--prompt", PROMPT, "--max-new-tokens", "8", "--steps", "16", "--temperature", "0"]
    for more, expected in (([], answer), (["--template", "qwen"], answer), (["--raw"], raw)):
        assert main([*words, *more]) == 0
        assert capsys.readouterr().out.strip() == expected
    assert main([*words, "--template", "qwn"]) == 1
    assert "template: qwn does not exist; did you mean 'qwen'" in capsys.readouterr().err


def test_a_yaml_takes_the_template_or_is_told_that_it_is_another(work, tmp_path, told):
    assert predict(tmp_path / "none", work) == predict(tmp_path / "named", work, template="qwen")
    assert "template: is not set; using qwen" in told.text
    assert "formats prompts differently" not in told.text
    predict(tmp_path / "other", work, template="default")
    assert (
        "template: default formats prompts differently from the checkpoint's finetuning, which used template: qwen"
        in told.text
    )


def test_training_further_under_another_template_is_told_and_remembered(work, tmp_path, told, monkeypatch):
    monkeypatch.setattr(TEMPLATES["qwen"], "default_system", "You are a cat.")
    keys = {"do_train": True, "model_name_or_path": work / "out", "template": "qwen", "dataset": "one", **STAGE}
    out = run_keys(tmp_path / "out", dataset_dir=work / "data", train_on_padding=None, **keys)
    assert "which used another system prompt, thinking setting or separator; remove default_system" in told.text
    texts = json.dumps([part.text for part in DiffusionConfig.load(out).template.parts])
    assert "You are a cat." in texts


def test_an_adapter_carries_it(work, tmp_path):
    keys = {"do_train": True, "model_name_or_path": work / "model", "template": "qwen", "dataset": "one", **STAGE}
    out = run_keys(tmp_path / "out", dataset_dir=work / "data", **keys, **{"finetuning_type": "lora"})
    assert DiffusionConfig.load(out).template == DiffusionConfig.load(work / "out").template
    assert load(out, device="cpu").config.template.name == "qwen"
