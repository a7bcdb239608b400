"""Generation with a block model from YAML."""

import json

import pytest

from support.blocks import as_block_model
from support.cli import ABSENT, ROOT, evaluations

TASKS = ROOT / "examples" / "eval" / "tasks"
RECORDS = "generated_predictions.jsonl"
KEYS = {"block_length": ABSENT, "diffusion_steps": 2, "cutoff_len": 30}


@pytest.fixture(scope="module")
def block(checkpoint, tmp_path_factory):
    """The shared checkpoint with the attention of a block model."""
    return as_block_model(checkpoint, tmp_path_factory.mktemp("block") / "model")


def total(folder, name):
    return sum(json.loads(line)[name] for line in (folder / RECORDS).read_text().splitlines())


def test_the_cache_changes_no_text_and_saves_computation(generate, block, tmp_path):
    out, plain, by_two = tmp_path / "out", tmp_path / "plain", tmp_path / "two"
    keys = {**KEYS, "model_name_or_path": block}
    found = generate(out, save_trace=True, **keys)
    assert (out / "generated_predictions.html").is_file()
    assert generate(plain, kv_cache="none", attention="block", train_block_length=4, **keys) == found
    assert generate(by_two, per_device_eval_batch_size=2, **keys) == found
    assert total(out, "forwards") == total(plain, "forwards")
    assert total(out, "computed") < total(plain, "computed") / 2
    assert generate(tmp_path / "more", **{**keys, "diffusion_steps": 3}) != found


def test_a_prefix_is_continued(generate, block, tmp_path):
    keys = {**KEYS, "recipe": "tiny_gpt2_prefix_inference.yaml", "max_samples": 5, "overwrite_cache": True}
    found = generate(tmp_path / "out", model_name_or_path=block, **{**keys, "cutoff_len": 60})
    assert len(found) == 5


def test_texts_and_tasks_during_training_are_those_of_its_checkpoint(train_small, generate, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    # Spare the harness's record of the machine, for which it starts pip and other programs.
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
    out, keys = tmp_path / "out", {"attention": "block", "train_block_length": 4, "diffusion_steps": 2, "seed": 3}
    training = {"anneal_steps": ABSENT, "antithetic_time": ABSENT, "max_steps": 1, "eval_strategy": "steps"}
    tasks = {"eval_tasks": "tiny_last_word", "eval_task_dir": str(TASKS), "eval_task_samples": 2, "eval_steps": 1}
    train_small(out, sample_steps=1, sample_count=3, sample_length=7, do_eval=True, **keys, **training, **tasks)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    keys = {**KEYS, **keys, "max_new_tokens": 7, "denoising_strategy": ABSENT, "logits_temp": ABSENT}
    found = generate(tmp_path / "texts", model_name_or_path=out, **keys, topp_temp=ABSENT, num_samples=3)
    assert [line["text"] for line in lines] == found
    assert {"eval_tiny_last_word_acc", "eval_loss"} <= evaluations(out)[0].keys()


def test_an_autoregressive_model_is_warned_of(generate, tmp_path, told):
    keys = {**KEYS, "mask_token": "<|fim_pad|>", "attention": "block", "train_block_length": 4}
    generate(tmp_path / "out", model_name_or_path="data/tiny_gpt2", **{**keys, "mask_token": 10})
    assert "diffusion_config.json" in told.text and "autoregressive" in told.text


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"block_length": 8}, ["block_length: 8", "train_block_length: 4"]),
        ({"early_stop": "grow"}, ["early_stop: grow", "early_stop: eos"]),
        ({"kv_cache": "dual"}, ["kv_cache: dual", "kv_cache: prefix"]),
        ({"kv_cache": "prefix", "cache_refresh": 3}, ["cache_refresh: 3"]),
        ({"recipe": "tiny_gpt2_infill_inference.yaml"}, ["infilling", "attention: block"]),
    ],
)
def test_keys_that_block_models_do_not_take(generate, block, tmp_path, keys, words):
    with pytest.raises(ValueError) as error:
        generate(tmp_path / "out", model_name_or_path=block, **{**KEYS, "cutoff_len": 90, **keys})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
