"""Every YAML key of the plugin has an effect on a run."""

import dataclasses
import functools

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ddm.diffusion import chunked_head
from llamafactory_ddm.integration.hparams.attention import AttentionKeys
from llamafactory_ddm.integration.hparams.diffusion import DiffusionArguments
from llamafactory_ddm.integration.hparams.length import LengthKeys
from llamafactory_ddm.integration.hparams.monitoring import MonitoringKeys
from llamafactory_ddm.integration.hparams.sampling import UPSTREAM_KEYS
from llamafactory_ddm.integration.hparams.serving import ServingKeys
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import evaluations, history

TRAINING = {
    "shift": False,
    "noise_schedule": "cosine",
    "time_epsilon": 0.5,
    "loss_weighting": "uniform",
    "loss_norm": "masked",
    "antithetic_time": False,  # the recipe says true
    "anneal_steps": 50,
}
# A key -> its value, and the keys without which it has no effect.
SAMPLING = {
    "denoising_strategy": ("random", {}),
    "diffusion_steps": (9, {}),
    "commit_schedule": ("dream", {}),
    "score_distribution": ("filtered", {"denoising_strategy": "entropy", "topp_temp": 0.5, "diffusion_steps": 12}),
    "block_length": (3, {"diffusion_steps": 12}),
    "kv_cache": ("dual", {"block_length": 10, "diffusion_steps": 20}),
    "cache_refresh": (2, {"kv_cache": "dual", "block_length": 10, "diffusion_steps": 20}),
    "logits_temp": (0.1, {}),
    "topp_temp": (0.05, {}),
    "guidance_scale": (3.0, {"generate_from": "prefix", "prefix_length": 4}),
    "suppress_tokens": ("10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,<|endoftext|>", {}),
    "confidence_threshold": (0.01, {"denoising_strategy": "confidence_threshold", "diffusion_steps": 12}),
    "entropy_bound": (30.0, {"denoising_strategy": "entropy_bound", "diffusion_steps": 12}),
    "remask_cap": (0.9, {"denoising_strategy": "remdm", "diffusion_steps": 12}),
    "edit_ratio": (0.5, {"diffusion_steps": 12}),
    "edit_threshold": (0.001, {"diffusion_steps": 12}),
    "edit_steps": (3, {"edit_threshold": 0.001}),
    "prefix_length": (7, {"generate_from": "prefix", "prefix_length": 4}),
    # Upstream's own keys.
    "temperature": (0.1, {}),
    "top_p": (0.05, {}),
    "top_k": (1, {}),
    "repetition_penalty": (50.0, {}),
    "max_new_tokens": (3, {"generate_from": "prefix", "prefix_length": 4}),
}
ELSEWHERE = {
    "mask_token",
    # tests/e2e/test_extending.py
    "plugins",
    "strategy_args",
    # tests/integration/data/test_prepared_rows.py, tests/e2e/test_data_of_users.py
    "allow_common_mask_token",
    # tests/e2e/test_many_processes.py, tests/modeling/test_sequence_parallel.py
    "sequence_parallel_size",
    # tests/e2e/test_mixed_noise_runs.py
    "noise_process",
    "uniform_ratio",
    "random_truncate_ratio",
    "logits_chunk",
    "peak_tflops",
    "eval_time_samples",
    "stop_after_nan_steps",
    "checkpoint_dir",
    "num_samples",
    "generate_from",
    "save_trace",
    "early_stop",
    "length_coverage",
    # tests/e2e/test_length_prediction.py
    "length_predictor",
    "grow_length",
    "eos_penalty",
    "eos_last",
    # tests/e2e/test_finetuning.py
    "train_on_padding",
    "sep_token",
    "split_digits",
    # tests/e2e/test_during_training.py, tests/integration/train/test_samples.py
    *(field.name for field in dataclasses.fields(MonitoringKeys)),
    # tests/integration/chat
    *(field.name for field in dataclasses.fields(ServingKeys)),
    # tests/e2e/test_block_runs.py
    *(field.name for field in dataclasses.fields(AttentionKeys)),
    # tests/e2e/test_variable_length_runs.py
    *(field.name for field in dataclasses.fields(LengthKeys)),
}


def test_every_key_is_tested():
    keys = {field.name for field in dataclasses.fields(DiffusionArguments)}
    assert keys == {*TRAINING, *SAMPLING, *ELSEWHERE} - set(UPSTREAM_KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("key", TRAINING)
def test_training_keys(key, checkpoint, train_small, tmp_path):
    folder = train_small(tmp_path / "out", **{key: TRAINING[key]})
    losses = [[log["loss"] for log in history(run)] for run in (checkpoint, folder)]
    assert losses[0][0] != losses[1][0]
    stored = DiffusionConfig.load(folder)
    if key in ("shift", "noise_schedule"):
        assert getattr(stored, key) == TRAINING[key]
    if key == "anneal_steps":
        assert [log["attention_ratio"] for log in history(folder)] == [1 / 50, 2 / 50, 3 / 50]
        assert stored.attention_ratio == 3 / 50


@pytest.mark.slow
def test_loss_norm_sequence(checkpoint, train_small, tmp_path):
    """With rows of one length, dividing by it and by the number of rows is dividing by the number of tokens."""
    changed = train_small(tmp_path / "out", loss_norm="sequence")
    assert history(changed)[0]["loss"] == pytest.approx(history(checkpoint)[0]["loss"], rel=1e-5)
    padded = [
        train_small(tmp_path / norm, loss_norm=norm, packing=False, cutoff_len=96, max_steps=1)
        for norm in ("sequence", "tokens")
    ]
    assert history(padded[0])[0]["loss"] != history(padded[1])[0]["loss"]


def test_logits_chunk(train_small, tmp_path, monkeypatch):
    """Chunks give the loss of all logits; in the tiny model all logits are one chunk by default."""
    rows, inner = [], chunked_head.chunk_rows
    monkeypatch.setattr(chunked_head, "chunk_rows", lambda *sizes: rows.append(inner(*sizes)) or rows[-1])
    losses = [
        [log["loss"] for log in history(train_small(tmp_path / f"{name}", max_steps=2, **keys))]
        for name, keys in {"default": {}, "all": {"logits_chunk": 0}, "chunks": {"logits_chunk": 100}}.items()
    ]
    assert len(rows) == 2  # the steps of the first run alone
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(ValueError, match=r"logits_chunk .*-1"):
        train_small(tmp_path / "refused", logits_chunk=-1)


def test_peak_tflops(train_small, tmp_path):
    """With a tenth of the peak, a step of the same tokens and time has ten times the MFU."""
    logs = [history(train_small(tmp_path / f"{peak}", max_steps=1, peak_tflops=peak))[0] for peak in (0.5, 0.05)]
    low, high = (log["mfu"] / log["tokens_per_second"] for log in logs)
    assert low > 0 and high == pytest.approx(10 * low, rel=5e-3)
    with pytest.raises(ValueError, match=r"peak_tflops .*0"):
        train_small(tmp_path / "refused", peak_tflops=0)


@pytest.fixture(scope="module")
def texts_of(generate, small_data, tmp_path_factory):
    """Return a function that generates texts with some keys, given as pairs; the same keys once."""
    data = {"eval_dataset": "tiny_corpus_eval", "dataset_dir": small_data, "cutoff_len": 20}
    return functools.cache(lambda *pairs: generate(tmp_path_factory.mktemp("texts"), **data, **dict(pairs)))


@pytest.mark.slow
@pytest.mark.parametrize("key", SAMPLING)
def test_sampling_keys(key, texts_of):
    value, needed = SAMPLING[key]
    assert texts_of(*{**needed, key: value}.items()) != texts_of(*needed.items())


@pytest.mark.slow
@pytest.mark.parametrize("key", ["diffusion_steps", "guidance_scale", "remask_cap", "edit_steps"])
def test_the_same_keys_give_the_same_texts(key, texts_of):
    pairs = SAMPLING[key][1].items()
    assert texts_of.__wrapped__(*pairs) == texts_of(*pairs)


def test_two_names_of_one_key(generate, tmp_path):
    cold = generate(tmp_path / "cold", logits_temp=0.1, topp_temp=0.7)
    assert generate(tmp_path / "same", logits_temp=0.1, temperature=0.1, topp_temp=0.7, top_p=0.7) == cold
    with pytest.raises(ValueError, match=r"temperature: 0\.2 .*logits_temp: 0\.1"):
        generate(tmp_path / "out", logits_temp=0.1, temperature=0.2)


@pytest.mark.slow
def test_num_samples(generate, tmp_path):
    five = generate(tmp_path / "five", num_samples=5)
    assert len(five) == 5
    assert generate(tmp_path / "three", num_samples=3) == five[:3]
    # A text depends on its sample index and the seed, not on the batch.
    assert generate(tmp_path / "single", num_samples=5, per_device_eval_batch_size=2) == five
    assert generate(tmp_path / "seed", num_samples=5, seed=1) != five


@pytest.mark.slow
def test_eval_time_samples(train_small, tmp_path):
    keys = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    one, four = (
        evaluations(train_small(tmp_path / str(n), eval_time_samples=n, **keys))[0]["eval_loss"] for n in (1, 4)
    )
    assert one != four
    assert one == pytest.approx(four, rel=0.2)


def test_stop_after_nan_steps(train_small, tmp_path):
    keys = {"learning_rate": 1e38, "max_grad_norm": 0, "max_steps": 5}
    with pytest.raises(ValueError, match=r"NaN .*steps 2 to 3"):
        train_small(tmp_path / "out", **keys)
    with pytest.raises(ValueError, match=r"NaN .*\b5\b"):
        train_small(tmp_path / "out", stop_after_nan_steps=0, **keys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_mask_token_that_exists(train_small, tmp_path):
    folder = train_small(tmp_path / "out", mask_token=10)
    stored, tokenizer = DiffusionConfig.load(folder), AutoTokenizer.from_pretrained(folder)
    assert (stored.mask_token, stored.mask_token_id) == (tokenizer.convert_ids_to_tokens(10), 10)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == AutoModelForCausalLM.from_pretrained("data/tiny_gpt2").config.vocab_size


def test_checkpoint_dir(generate, checkpoint, tmp_path):
    """The base model with the checkpoint's folder, as in DiffuLLaMA's YAMLs, with and without its other files."""
    expected = generate(tmp_path / "base")
    whole = generate(tmp_path / "whole", model_name_or_path="data/tiny_gpt2", checkpoint_dir=checkpoint)
    assert whole == expected
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "diffusion_config.json"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    weights_only = generate(tmp_path / "weights", model_name_or_path="data/tiny_gpt2", checkpoint_dir=bare)
    assert weights_only == expected
