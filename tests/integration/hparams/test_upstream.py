"""Values of upstream's keys as a YAML may hold them."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def check(upstream):
    from llamafactory_ddm.integration.hparams.upstream import checked_values

    parser, _, _ = upstream
    return lambda **args: checked_values(parser._TRAIN_ARGS, args)


def test_numbers_and_booleans_in_quotes_are_what_they_spell(check):
    given = {"cutoff_len": "64", "learning_rate": "1e-4", "packing": "false", "save_strategy": False, "max_steps": -1}
    assert check(**given, save_total_limit=0) == {
        **{"cutoff_len": 64, "learning_rate": 1e-4, "packing": False, "save_strategy": "no", "max_steps": -1},
        "save_total_limit": 0,  # which keeps all
    }


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("cutoff_len", -5, "cutoff_len must be at least 2, got -5"),
        ("cutoff_len", "many", "cutoff_len must be a whole number, got 'many'"),
        ("cutoff_len", [64], "cutoff_len must be a whole number"),
        ("cutoff_len", None, "cutoff_len: is left empty; give it a value, or remove the key"),
        ("per_device_eval_batch_size", 0, "per_device_eval_batch_size must be at least 1, got 0"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be at least 1"),
        ("learning_rate", "fast", "learning_rate must be a number of at least 0, got 'fast'"),
        ("learning_rate", -1, "learning_rate must be a number of at least 0"),
        ("seed", -1, "seed must be at least 0"),
        ("packing", "maybe", "packing must be true or false"),
        ("logging_steps", 0, "logging_steps must be above 0, got 0"),
        ("save_steps", 0, "save_steps must be above 0, got 0"),
        ("save_steps", -0.5, "save_steps must be above 0"),
        ("flash_attn", "foo", "flash_attn must be one of auto, disabled, sdpa, fa2"),
        ("flash_attn", False, "flash_attn must be one of"),  # as YAML reads an off without quotes
        ("top_k", -1, "top_k must be at least 0"),
        ("max_new_tokens", 0, "max_new_tokens must be at least 1"),
        ("num_train_epochs", -1, "num_train_epochs must be above 0"),
        ("val_size", -0.5, "val_size must be a number of at least 0, got -0.5"),
        ("output_dir", "", "output_dir: is empty"),
        ("finetuning_type", "qlora", "finetuning_type must be one of .*; did you mean 'lora'"),
        ("mix_strategy", "foo", "mix_strategy must be one of concat, .*, got 'foo'"),
        ("stage", "DDM", "stage must be one of .*; did you mean 'ddm'"),
        ("max_steps", 0, "max_steps: 0 is no number of steps"),
        ("max_steps", -5, "max_steps: -5 is no number of steps"),
        ("neftune_noise_alpha", -1, "neftune_noise_alpha must be a number of at least 0"),
        ("load_best_model_at_end", True, "load_best_model_at_end: true needs evaluations to choose by"),
        ("denoising_strategy", None, "denoising_strategy: is left empty"),
        ("anneal_steps", None, "anneal_steps: is left empty"),
    ],
)
def test_what_cannot_be_meant(check, key, value, words):
    with pytest.raises(ValueError, match=words):
        check(**{key: value})


def test_steps_between_that_do_not_count_may_be_zero(check):
    given = {"save_strategy": "epoch", "save_steps": 0, "eval_steps": 0, "top_k": 0, "flash_attn": "sdpa"}
    assert check(**given) == given
    with pytest.raises(ValueError, match="eval_steps must be above 0"):
        check(eval_strategy="steps", eval_steps=0)


def test_freezing_everything_is_an_error(check):
    with pytest.raises(ValueError, match="freeze_trainable_layers: 0 trains nothing"):
        check(finetuning_type="freeze", freeze_trainable_layers=0)
    assert check(finetuning_type="full", freeze_trainable_layers=0)


def test_what_may_be_empty_or_of_several_types_passes(check):
    given = {"template": None, "mask_token": None, "max_samples": None, "report_to": "none", "warmup_steps": 0.1}
    assert check(**given) == given


def test_other_stages_are_left_to_upstream(upstream, basic, monkeypatch):
    parser, _, _ = upstream
    seen = []
    monkeypatch.setattr(
        "llamafactory_ddm.integration.hparams.upstream.checked_values", lambda kinds, args: seen.append(args) or args
    )
    stub = SimpleNamespace(dataclass_types=parser._TRAIN_ARGS, parse_dict=lambda args, **_: args)
    parser._parse_args(stub, {"stage": "sft"})
    assert not seen
    parser._parse_args(stub, {"stage": "ddm"})
    assert seen == [{"stage": "ddm"}]
