"""attention: block through the real stages."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from support.cli import ABSENT, evaluations, history, run, train_in_processes

BLOCK = {"attention": "block", "train_block_length": 4, "anneal_steps": ABSENT, "antithetic_time": ABSENT}
NO_EPSILON = {"time_epsilon": ABSENT}


def attention(folder):
    config = DiffusionConfig.load(folder)
    return config.attention, config.train_block_length, config.attention_ratio


@pytest.fixture(scope="module")
def block(train_small, tmp_path_factory):
    """A block model after three steps from the autoregressive one, evaluated at the last."""
    keys = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}
    return train_small(tmp_path_factory.mktemp("block") / "out", **BLOCK, **keys)


def losses(folder):
    return [log["loss"] for log in history(folder)]


def test_an_autoregressive_model_becomes_a_block_model_without_annealing(block, checkpoint):
    assert attention(block) == ("block", 4, 1.0)
    assert [log["attention_ratio"] for log in history(block)] == [1.0] * 3
    # Less is masked at once than without blocks, and the autoregressive model knows the first tokens already.
    assert sum(losses(block)) < sum(losses(checkpoint)) / 1.5
    metrics = evaluations(block)[0]
    assert metrics["eval_nll_first"] < metrics["eval_nll_q4"]


def test_a_block_model_trains_further_and_resumes_bit_for_bit(block, train_small, tmp_path):
    further = train_small(tmp_path / "further", model_name_or_path=block, antithetic_time=ABSENT, anneal_steps=ABSENT)
    assert attention(further) == ("block", 4, 1.0)
    resumed = train_small(tmp_path / "out", **BLOCK, resume_from_checkpoint=block / "checkpoint-2")
    assert losses(resumed)[-1] == losses(block)[-1]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (resumed, block))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_full_model_is_continued_in_blocks(checkpoint, train_small, tmp_path, told):
    folder = train_small(tmp_path / "out", **BLOCK, model_name_or_path=checkpoint, max_steps=1)
    assert attention(folder) == ("block", 4, 1.0)
    assert "train_block_length: 4" in told.text


def test_every_key_of_blocks_changes_training(block, train_small, tmp_path):
    found = {json.dumps(losses(block)[:1])}
    for name, keys in {
        "length": {"train_block_length": 8},
        "noise": {"block_noise": "times"},
        "epsilon": {"block_noise": "times", "time_epsilon": 0.4},
        "uniform": {"loss_weighting": "uniform"},
        "norm": {"loss_norm": "masked"},
        "shift": {"shift": False},
    }.items():
        found.add(json.dumps(losses(train_small(tmp_path / name, **{**BLOCK, "max_steps": 1, **keys}))))
    assert len(found) == 7


@pytest.mark.parametrize("packing", [False, True])
def test_responses_in_blocks(checkpoint, finetune, tmp_path, packing):
    keys = {"neat_packing": True, "packing": ABSENT, "train_on_padding": False} if packing else {}
    folder = finetune(tmp_path / "out", **{**BLOCK, "max_steps": 1, "save_strategy": "no", **keys})
    assert attention(folder) == ("block", 4, 1.0) and losses(folder)[0] > 0


def test_an_adapter_may_make_a_block_model_of_a_full_one(checkpoint, finetune, tmp_path):
    keys = {"recipe": "tiny_gpt2_lora_ddm_sft.yaml", "disable_gradient_checkpointing": False}
    folder = finetune(tmp_path / "adapter", **BLOCK, **keys)
    assert attention(folder) == ("block", 4, 1.0)
    again = finetune(
        tmp_path / "again", adapter_name_or_path=folder, antithetic_time=ABSENT, **{**keys, "max_steps": 1}
    )
    assert attention(again) == ("block", 4, 1.0)


@pytest.mark.slow
def test_freezing_and_variable_length(finetune, tmp_path):
    frozen = finetune(tmp_path / "freeze", **BLOCK, finetuning_type="freeze", freeze_trainable_layers=1, max_steps=1)
    assert attention(frozen) == ("block", 4, 1.0)
    keys = {"variable_length": "eos_eos", "pad_block_length": 4, "pad_extra_blocks": 0}
    ends = finetune(tmp_path / "ends", **BLOCK, **keys, max_steps=1)
    assert attention(ends) == ("block", 4, 1.0)


def error(train, folder, pattern, **keys):
    with pytest.raises(ValueError, match=pattern):
        train(folder, **keys)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({"train_block_length": ABSENT}, r"attention: block .*train_block_length.*1\.\.32"),
        ({"train_block_length": 33}, "train_block_length: 33 .*cutoff_len: 32"),
        ({"train_block_length": 0}, "train_block_length .*0"),
        ({"attention": "full"}, "train_block_length: 4 .*attention: full"),
        ({"attention": ABSENT, "train_block_length": ABSENT, "block_noise": "times"}, "block_noise: times .*full"),
        ({"attention": "blok"}, "attention .*'blok'.*'block'"),
        ({"sparse_attention": True}, r"sparse_attention: true .*gpt2"),
        (
            {"attention": ABSENT, "train_block_length": ABSENT, "sparse_attention": True},
            "sparse_attention: True .*attention: full",
        ),
        ({"block_noise": "count"}, "block_noise .*'count'.*'counts'"),
        ({"anneal_steps": 100}, "anneal_steps: 100 .*attention: block"),
        ({"antithetic_time": True}, "antithetic_time: True .*attention: block"),
        ({"time_epsilon": 0.01}, "time_epsilon: 0.01 .*block_noise: counts"),
        ({"noise_process": "mixed"}, "noise_process: mixed .*attention: block"),
    ],
)
def test_keys_that_contradict_each_other(train_small, tmp_path, keys, pattern):
    error(train_small, tmp_path / "out", pattern, **{**BLOCK, **keys})


@pytest.mark.parametrize(("key", "value"), [("pad_mask_ratio", 0.5), ("eos_window_ratio", 0.5), ("eval_eos", True)])
def test_keys_of_variable_length_that_span_blocks(finetune, tmp_path, key, value):
    keys = {"variable_length": "eos_eos", key: value, "do_eval": True}
    error(finetune, tmp_path / "out", f"{key}: {value} .*attention: block", **BLOCK, **keys)


def test_keys_that_contradict_the_checkpoint(train_small, block, checkpoint, tmp_path):
    out, base = tmp_path / "out", {"antithetic_time": ABSENT, "anneal_steps": ABSENT}
    error(train_small, out, "attention: full .*attention: block", model_name_or_path=block, attention="full", **base)
    pattern = "train_block_length: 8 .*train_block_length: 4"
    error(train_small, out, pattern, **{**BLOCK, "model_name_or_path": block, "train_block_length": 8})
    pattern = "attention: block .*attention: full"
    error(train_small, out, pattern, **BLOCK, model_name_or_path=checkpoint, do_train=False, do_eval=True)
    error(
        train_small,
        out,
        "train_block_length: 8 .*checkpoint-2",
        **{**BLOCK, "train_block_length": 8, "resume_from_checkpoint": block / "checkpoint-2"},
    )


@pytest.mark.slow
def test_two_processes_train_as_one(small_data, checkpoint, tmp_path):
    small = (
        *("max_steps=2", "warmup_steps=0", "logging_steps=1", 'eval_strategy="no"', "do_eval=false"),
        *("save_strategy=no", "plot_loss=false", "cutoff_len=64", "disable_tqdm=true", "overwrite_cache=true"),
        *(f"model_name_or_path={checkpoint}", f"dataset_dir={small_data}", "use_cpu=true", "learning_rate=1.0e-3"),
        *("attention=block", "train_block_length=4", "antithetic_time=false"),
    )
    recipe = "examples/tiny_gpt2_full_ddm_sft.yaml"
    run("train", recipe, *small, "per_device_train_batch_size=8", f"output_dir={tmp_path / 'one'}")
    train_in_processes(2, recipe, *small, "per_device_train_batch_size=4", f"output_dir={tmp_path / 'two'}")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
