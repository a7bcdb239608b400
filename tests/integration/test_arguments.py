import dataclasses

import pytest

from llamafactory_ddm.integration.arguments import DiffusionArguments


def test_defaults_are_valid_and_unchanged():
    arguments = DiffusionArguments()
    arguments.validate()
    assert arguments.changed_keys() == []


def test_every_key_has_a_help_text():
    assert all(f.metadata["help"].startswith("Diffusion: ") for f in dataclasses.fields(DiffusionArguments))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "loss_norm",
            "token",
            "loss_norm must be one of tokens, masked, sequence, got 'token'; did you mean 'tokens'",
        ),
        ("loss_weighting", "ebo", "did you mean 'elbo'"),
        ("noise_schedule", "cosin", "did you mean 'cosine'"),
        ("denoising_strategy", "low-confidence", "did you mean 'low_confidence'"),
        ("uniform_ratio", 1.5, r"uniform_ratio must lie in \[0, 1\], got 1.5"),
        ("uniform_ratio", -0.1, r"uniform_ratio must lie in \[0, 1\]"),
        ("noise_process", "mix", "did you mean 'mixed'"),
        ("random_truncate_ratio", 1.5, r"random_truncate_ratio must lie in \[0, 1\]"),
        ("diffusion_steps", 0, "diffusion_steps must be at least 1, got 0"),
        ("diffusion_steps", 2.5, "whole number"),
        ("diffusion_steps", True, "whole number"),
        ("anneal_steps", -1, "anneal_steps must be at least 0"),
        ("anneal_steps", "many", "whole number"),
        ("num_samples", 0, "num_samples must be at least 1"),
        ("eval_time_samples", 0, "eval_time_samples must be at least 1"),
        ("stop_after_nan_steps", -1, "stop_after_nan_steps must be at least 0"),
        ("time_epsilon", 0.7, r"time_epsilon must lie in \[0, 0.5\]"),
        ("logits_temp", -1, "logits_temp must be a number of at least 0"),
        ("logits_temp", float("nan"), "logits_temp must be a number of at least 0"),
        ("topp_temp", 0, "set logits_temp: 0"),
        ("topp_temp", 1.2, "topp_temp must lie in"),
        ("edit_ratio", 1, r"edit_ratio must lie in \[0, 1\), got 1.0"),
        ("edit_ratio", -0.5, r"edit_ratio must lie in \[0, 1\), got -0.5"),
        ("edit_threshold", 1.5, r"edit_threshold must lie in \(0, 1\], got 1.5"),
        ("topp_temp", -1, r"topp_temp must lie in \(0, 1\], got -1"),
        ("remask_cap", -0.5, r"remask_cap must lie in \[0, 1\], got -0.5"),
        ("edit_threshold", 0, r"edit_threshold must lie in \(0, 1\], got 0.0"),
        ("edit_steps", -1, "edit_steps must be at least 0"),
        ("remask_cap", 1.5, r"remask_cap must lie in \[0, 1\]"),
        ("shift", "maybe", "shift must be true or false"),
        ("antithetic_time", 3, "antithetic_time must be true or false"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(key, value, words):
    with pytest.raises(ValueError, match=words):
        DiffusionArguments(**{key: value}).validate()


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("diffusion_steps", "32", 32),
        ("anneal_steps", 1e4, 10000),
        ("logits_temp", "0.5", 0.5),
        ("time_epsilon", "1e-4", 1e-4),
        ("shift", "False", False),
        ("antithetic_time", "true", True),
    ],
)
def test_what_yaml_reads_as_text_is_understood(key, given, meant):
    arguments = DiffusionArguments(**{key: given})
    arguments.validate()
    assert getattr(arguments, key) == meant
    assert type(getattr(arguments, key)) is type(meant)


def test_changed_keys_are_listed_in_order():
    assert DiffusionArguments(num_samples=3, shift=False).changed_keys() == ["num_samples", "shift"]
