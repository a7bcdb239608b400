"""Values of upstream's keys in a YAML: conversion, and errors that name the key."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def check(upstream):
    from llamafactory_ddm.integration.hparams.upstream_keys import check_values

    parser, _, _ = upstream
    return lambda **args: check_values(parser._TRAIN_ARGS, args)


def test_quoted_numbers_and_booleans_are_converted(check):
    values = {"cutoff_len": "64", "learning_rate": "1e-4", "packing": "false", "save_strategy": False, "max_steps": -1}
    assert check(**values, save_total_limit=0) == {
        **{"cutoff_len": 64, "learning_rate": 1e-4, "packing": False, "save_strategy": "no", "max_steps": -1},
        "save_total_limit": 0,  # which keeps all
    }


@pytest.mark.parametrize(
    "key, value, pattern",
    [
        ("cutoff_len", -5, r" 2\b.* -5"),
        ("cutoff_len", "many", "'many'"),
        ("cutoff_len", [64], r"\[64\]"),
        ("cutoff_len", None, "empty"),
        ("per_device_eval_batch_size", 0, r" 1\b.* 0"),
        ("gradient_accumulation_steps", 0, r" 1\b.* 0"),
        ("learning_rate", "fast", "'fast'"),
        ("learning_rate", -1, r" 0\b.* -1"),
        ("seed", -1, r" 0\b.* -1"),
        ("packing", "maybe", "'maybe'"),
        ("logging_steps", 0, " 0"),
        ("save_steps", 0, " 0"),
        ("save_steps", -0.5, r" -0\.5"),
        ("flash_attn", "foo", "auto, disabled, sdpa, fa2.*'foo'"),
        ("flash_attn", False, "False"),  # YAML reads an unquoted off as false
        ("top_k", -1, r" 0\b.* -1"),
        ("max_new_tokens", 0, r" 1\b.* 0"),
        ("num_train_epochs", -1, " -1"),
        ("val_size", -0.5, r" -0\.5"),
        ("output_dir", "", "empty"),
        ("finetuning_type", "qlora", "'qlora'.*'lora'"),
        ("mix_strategy", "foo", "concat, .*'foo'"),
        ("stage", "DDM", "'DDM'.*'ddm'"),
        ("max_steps", 0, " 1.*num_train_epochs.* 0"),
        ("max_steps", -5, " 1.*num_train_epochs.* -5"),
        ("neftune_noise_alpha", -1, r" 0\b.* -1"),
        ("load_best_model_at_end", True, "true .*eval_strategy"),
        ("denoising_strategy", None, "empty"),
        ("anneal_steps", None, "empty"),
    ],
)
def test_wrong_values(check, key, value, pattern):
    with pytest.raises(ValueError, match=f"^{key}\\b.*{pattern}"):
        check(**{key: value})


def test_an_interval_that_is_not_used_may_be_zero(check):
    values = {"save_strategy": "epoch", "save_steps": 0, "eval_steps": 0, "top_k": 0, "flash_attn": "sdpa"}
    assert check(**values) == values
    with pytest.raises(ValueError, match=r"^eval_steps .*0"):
        check(eval_strategy="steps", eval_steps=0)


def test_freezing_everything_is_an_error(check):
    with pytest.raises(ValueError, match=r"^freeze_trainable_layers: 0"):
        check(finetuning_type="freeze", freeze_trainable_layers=0)
    assert check(finetuning_type="full", freeze_trainable_layers=0)


def test_keys_that_may_be_empty_or_of_several_types(check):
    values = {"template": None, "mask_token": None, "max_samples": None, "report_to": "none", "warmup_steps": 0.1}
    assert check(**values) == values


def test_other_stages_are_left_to_upstream(upstream, basic, monkeypatch):
    parser, _, _ = upstream
    seen = []
    monkeypatch.setattr(
        "llamafactory_ddm.integration.hparams.upstream_keys.check_values",
        lambda kinds, args: seen.append(args) or args,
    )
    stub = SimpleNamespace(dataclass_types=parser._TRAIN_ARGS, parse_dict=lambda args, **_: args)
    parser._parse_args(stub, {"stage": "sft"})
    assert not seen
    parser._parse_args(stub, {"stage": "ddm"})
    assert seen == [{"stage": "ddm"}]
