"""`variable_length` from YAML: every key, contradictions, checkpoints, resuming, generation."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm import SamplingSettings, load
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import ABSENT, history, predictions, run, train_here

LORA = "tiny_gpt2_lora_ddm_sft.yaml"
WINDOW = {"variable_length": "eos_pad", "eos_window_ratio": 0.9}
PADS = {"variable_length": "eos_pad", "pad_mask_ratio": 0.3}


def losses(folder):
    return [log["loss"] for log in history(folder)]


@pytest.fixture(scope="module")
def eos_pad(tmp_path_factory, finetune):
    """A checkpoint finetuned for three steps with variable_length: eos_pad."""
    return finetune(tmp_path_factory.mktemp("eos_pad") / "out", variable_length="eos_pad")


@pytest.fixture(scope="module")
def documents(train_small):
    """Return a function that adapts the built-in model for three steps on one document a row."""
    return lambda folder, **keys: train_small(
        folder, **{"packing": False, "cutoff_len": 64, "variable_length": "eos_pad", **keys}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "change"),
    [
        ({}, {"variable_length": "eos_eos"}),
        ({}, {"variable_length": "rainbow"}),
        ({"variable_length": "rainbow"}, {"rainbow_colors": 2}),
        ({}, {"pad_block_length": 8}),
        ({}, {"pad_mask_ratio": 0.3}),
        (PADS, {"pad_anneal_steps": 2}),
        (PADS, {"pad_mask_method": "counts"}),
        ({}, {"eos_window_ratio": 0.9}),
        ({"pad_block_length": 8}, {"pad_extra_blocks": 0}),
        (WINDOW, {"eos_window_max": 1}),
        (WINDOW, {"eos_window_anneal_steps": 50}),
        ({}, {"cutoff_len": 40}),  # longer rows are dropped
    ],
    ids=str,
)
def test_each_key_changes_the_loss(before, change, finetune, tmp_path):
    before = {"variable_length": "eos_pad", **before}
    one, two = finetune(tmp_path / "one", **before), finetune(tmp_path / "two", **{**before, **change})
    assert losses(one) != losses(two)


def test_blocks_longer_than_the_canvas_are_refused(finetune, tmp_path):
    with pytest.raises(ValueError, match=r"pad_block_length: 65 .*cutoff_len: 64"):
        finetune(tmp_path / "out", variable_length="eos_pad", pad_block_length=65)


def test_the_checkpoint_stores_the_format(eos_pad, checkpoint, finetune, tmp_path):
    stored = DiffusionConfig.load(eos_pad).variable_length
    tokenizer = AutoTokenizer.from_pretrained(eos_pad)
    assert (stored.format, stored.pad_tokens, stored.canvas, stored.block) == ("eos_pad", ("<|pad|>",), 64, None)
    assert stored.pad_token_ids == (tokenizer.convert_tokens_to_ids("<|pad|>"),)
    assert DiffusionConfig.load(eos_pad).train_on_padding is True
    assert stored.pad_token_ids[0] == len(tokenizer) - 1 > AutoTokenizer.from_pretrained(checkpoint).mask_token_id
    # Further training uses the checkpoint's format.
    again = finetune(tmp_path / "again", model_name_or_path=eos_pad)
    assert DiffusionConfig.load(again).variable_length == stored
    assert losses(again)[0] < losses(eos_pad)[0]


@pytest.mark.slow
def test_new_padding_tokens_start_as_the_mean_of_the_old_embeddings(checkpoint, finetune, tmp_path):
    out = finetune(tmp_path / "out", variable_length="rainbow", rainbow_colors=3, learning_rate=0.0)
    old = load_file(checkpoint / "model.safetensors")["transformer.wte.weight"].float()
    new = load_file(out / "model.safetensors")["transformer.wte.weight"].float()
    ids = DiffusionConfig.load(out).variable_length.pad_token_ids
    assert list(ids) == [len(old), len(old) + 1, len(old) + 2]
    for index in ids:
        torch.testing.assert_close(new[index], old.mean(dim=0), rtol=0, atol=1e-6)
    assert torch.equal(new[: len(old)], old)


def test_no_padding_token_is_part_of_a_text(trained, tmp_path):
    small = {"max_samples": 6, "diffusion_steps": 4, "cutoff_len": 64, "overwrite_cache": True}
    train_here("tiny_gpt2_sft_inference.yaml", output_dir=tmp_path / "out", model_name_or_path=trained, **small)
    generator = load(trained)
    texts = [*predictions(tmp_path / "out"), *generator.generate(max_new_tokens=24, num_samples=8)]
    texts += generator.generate(infill="Tom <|infill:8|> apples <|infill:4|>.")
    assert not any("pad" in text and "<|" in text for text in texts)
    canvases = [generator.from_prompt("Tom has", 24)] * 2
    settings = SamplingSettings(early_stop="none")
    assert min(result.n_tokens for result in generator.sample_batch(canvases, settings, sample_indices=[0, 1])) < 24


def test_stopping_at_eos_changes_no_text(trained, tmp_path):
    small = {"max_samples": 6, "diffusion_steps": 12, "block_length": 8, "cutoff_len": 64, "overwrite_cache": True}
    small |= {"model_name_or_path": trained, "logits_temp": 1.0}
    results = {}
    for stop in ("none", "eos"):
        out = tmp_path / stop
        train_here("tiny_gpt2_sft_inference.yaml", output_dir=out, early_stop=stop, **small)
        results[stop] = json.loads((out / "predict_results.json").read_text())
    assert predictions(tmp_path / "none") == predictions(tmp_path / "eos")
    assert results["eos"]["predict_computed_tokens"] < results["none"]["predict_computed_tokens"]


@pytest.mark.slow
def test_canvases_are_shortened_to_the_predicted_length(trained, tmp_path):
    """The model generates padding only, and predicts so from the first step."""
    small = {"max_samples": 6, "diffusion_steps": 12, "cutoff_len": 64, "overwrite_cache": True}
    small |= {"model_name_or_path": trained, "early_stop": "predict", "per_device_eval_batch_size": 4}
    computed, texts = {}, {}
    for coverage in (0.01, 1.0):
        out = tmp_path / str(coverage)
        train_here("tiny_gpt2_sft_inference.yaml", output_dir=out, length_coverage=coverage, **small)
        computed[coverage] = json.loads((out / "predict_results.json").read_text())["predict_computed_tokens"]
        texts[coverage] = predictions(out)
    assert computed[0.01] < computed[1.0]
    small |= {"early_stop": "eos"}
    train_here("tiny_gpt2_sft_inference.yaml", output_dir=tmp_path / "eos", **small)
    assert predictions(tmp_path / "eos") == texts[1.0]  # full coverage keeps the whole canvas
    again = tmp_path / "again"
    small |= {"early_stop": "predict", "per_device_eval_batch_size": 1}
    train_here("tiny_gpt2_sft_inference.yaml", output_dir=again, length_coverage=0.01, **small)
    assert predictions(again) == texts[0.01]  # for any batch size
    generator = load(trained)
    short = generator.generate(
        "Tom has", max_new_tokens=40, settings=SamplingSettings(early_stop="predict", length_coverage=0.01)
    )
    assert len(short) == 1


@pytest.mark.slow
def test_gradient_accumulation_and_resuming_change_nothing(finetune, tmp_path):
    keys = {**PADS, "pad_anneal_steps": 3, "eos_window_ratio": 0.4, "eos_window_anneal_steps": 3, "max_steps": 4}
    keys |= {"save_strategy": "steps", "save_steps": 2}
    whole = finetune(tmp_path / "whole", **keys)
    split = finetune(tmp_path / "split", **keys, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    finetune(half, **keys, resume_from_checkpoint=str(half / "checkpoint-2"))
    assert losses(half) == losses(whole)
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, half))
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ValueError, match=r"variable_length: .*checkpoint-2"):
        finetune(half, **keys, resume_from_checkpoint=str(half / "checkpoint-2"), pad_block_length=8)
    blocks = finetune(tmp_path / "blocks", **keys, pad_block_length=8)
    resumed = str(blocks / "checkpoint-2")
    with pytest.raises(ValueError, match=r"variable_length: .*checkpoint-2"):
        finetune(blocks, **keys, resume_from_checkpoint=resumed, pad_block_length=8, pad_extra_blocks=1)


def test_documents(documents, generate, tmp_path, caplog):
    out = documents(tmp_path / "out")
    assert "within cutoff_len: 64 and are dropped" in caplog.text
    config = DiffusionConfig.load(out)
    assert config.variable_length.format == "eos_pad" and config.train_on_padding is None
    assert losses(documents(tmp_path / "window", eos_window_ratio=0.9)) != losses(out)
    # LLaMA-Factory's default for pre-training, packing, is overridden; generation needs no key.
    assert losses(documents(tmp_path / "default", packing=ABSENT)) == losses(out)
    assert len(generate(tmp_path / "texts", model_name_or_path=out)) == 3


def test_rows_without_room_for_eos(documents, finetune, tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset: \d+ of 80 .*drop_overlong: true"):
        documents(tmp_path / "out", drop_overlong=False)
    with pytest.raises(ValueError, match=r"train_dataset: (\d+) of \1 .*cutoff_len: 8"):
        finetune(tmp_path / "out", variable_length="eos_pad", cutoff_len=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_needs_the_embeddings_of_new_padding_tokens(checkpoint, finetune, tmp_path):
    with pytest.raises(ValueError, match=r"variable_length \('<\|pad\|>'\): .*additional_target.*eos_eos"):
        finetune(tmp_path / "out", recipe=LORA, variable_length="eos_pad")
    finetune(tmp_path / "eos", recipe=LORA, variable_length="eos_eos")
    with pytest.raises(ValueError, match=r"variable_length .*finetuning_type: freeze .*freeze_extra_modules"):
        finetune(tmp_path / "out", finetuning_type="freeze", variable_length="rainbow")
    plain = finetune(tmp_path / "plain", recipe=LORA)
    with pytest.raises(ValueError, match=r"variable_length .*adapter_name_or_path .*resize_vocab: true"):
        finetune(tmp_path / "out", recipe=LORA, adapter_name_or_path=str(plain), variable_length="rainbow")
    out = finetune(tmp_path / "out", recipe=LORA, variable_length="eos_pad", additional_target="wte")
    assert load(out).generate(max_new_tokens=4)
    further = finetune(tmp_path / "further", recipe=LORA, adapter_name_or_path=str(out))
    assert losses(further)[0] < losses(out)[0]
    words = {"model_name_or_path": checkpoint, "adapter_name_or_path": out, "finetuning_type": "lora"}
    words |= {"template": "diffullama", "export_dir": tmp_path / "merged", "infer_dtype": "float32"}
    run("export", *(word for key, value in words.items() for word in (f"--{key}", str(value))))
    assert DiffusionConfig.load(tmp_path / "merged") == DiffusionConfig.load(out)
    rows = len(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight)
    assert rows == DiffusionConfig.load(out).variable_length.pad_token_ids[0] + 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"variable_length": "eospad"}, "variable_length .*'eos_pad'"),
        ({"pad_mask_ratio": 0.2}, "pad_mask_ratio: .* without variable_length"),
        ({"variable_length": "none", "drop_overlong": False}, "drop_overlong: .* without variable_length"),
        ({"variable_length": "eos_pad", "pad_extra_blocks": 3}, "pad_extra_blocks: .* without pad_block_length"),
        ({"variable_length": "eos_pad", "rainbow_colors": 3}, "without variable_length: rainbow"),
        (
            {"variable_length": "eos_pad", "pad_anneal_steps": 3},
            "pad_anneal_steps: .* without pad_mask_ratio",
        ),
        ({"variable_length": "eos_pad", "eos_window_max": 3}, "eos_window_max: .* without eos_window_ratio"),
        ({"variable_length": "eos_pad", "packing": True}, "variable_length: eos_pad .* packing: true"),
        (
            {"variable_length": "eos_pad", "train_on_padding": False},
            "variable_length: eos_pad .* train_on_padding: false",
        ),
        ({"variable_length": "eos_pad", "cutoff_len": 300}, "cutoff_len: 300"),
        ({"eval_eos": True, "do_eval": True}, "eval_eos: .* without variable_length"),
        ({"variable_length": "eos_pad", "eval_eos": True}, "eval_eos: .* without do_eval"),
        ({"variable_length": "eos_pad", "pad_mask_ratio": 1.5}, r"pad_mask_ratio .*\[0, 1\]"),
    ],
    ids=str,
)
def test_mistakes_name_the_key(keys, words, finetune, tmp_path):
    with pytest.raises(ValueError, match=words):
        finetune(tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()


def test_keys_that_contradict_the_checkpoint(eos_pad, finetune, tmp_path):
    for keys, words in (
        ({"variable_length": "rainbow"}, "variable_length: rainbow .*eos_pad"),
        ({"train_on_padding": False}, "train_on_padding: false"),
    ):
        with pytest.raises(ValueError, match=words):
            finetune(tmp_path / "out", model_name_or_path=eos_pad, **keys)
    hidden = finetune(tmp_path / "hidden", train_on_padding=False)
    with pytest.raises(ValueError, match=r"variable_length: eos_pad .*checkpoint .*train_on_padding: false"):
        finetune(tmp_path / "out", model_name_or_path=hidden, variable_length="eos_pad")


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"pad_token_ids": []}, {"canvas": "x"}, {"block": 0}, {"more": 1}, {"pad_tokens": None}],
    ids=str,
)
def test_a_malformed_diffusion_config(eos_pad, tmp_path, change):
    raw = json.loads((eos_pad / "diffusion_config.json").read_text())
    raw["variable_length"] |= change
    (tmp_path / "diffusion_config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"variable_length "):
        DiffusionConfig.load(tmp_path)


def test_the_padding_token_of_a_base_model_is_used(checkpoint, finetune, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(base)
    out = finetune(tmp_path / "out", model_name_or_path=base, variable_length="eos_pad", eval_dataset=ABSENT)
    assert DiffusionConfig.load(out).variable_length.pad_tokens == ("!",)
    rows = len(AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight)
    assert rows == len(AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight)


def test_the_eos_metrics_of_a_data_set(eos_pad, finetune, tmp_path, caplog):
    keys = {"model_name_or_path": eos_pad, "do_train": False, "do_eval": True, "eval_eos": True}
    one = finetune(tmp_path / "one", **keys, per_device_eval_batch_size=6)
    two = finetune(tmp_path / "two", **keys, per_device_eval_batch_size=4)
    metrics, again = (json.loads((folder / "eos_metrics.json").read_text()) for folder in (one, two))
    assert set(metrics) == {*(f"revealed {share}" for share in ("0", "0.25", "0.5", "0.75", "1")), *quarters()}
    for name, values in metrics.items():
        assert values == pytest.approx(again[name], rel=1e-4), name
        assert all(0 <= value <= 64 for value in values.values())
    assert (one / "eos_metrics.png").stat().st_size > 5000
    assert "eos_metrics.json" in caplog.text


def quarters():
    return [f"quarter {number}" for number in range(1, 5)]
