import dataclasses

import pytest

from llamafactory_ddm.integration.hparams.diffusion import DiffusionArguments


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
        ("diffusion_steps", 0, "diffusion_steps must be at least 1 and at most 100000, got 0"),
        ("diffusion_steps", 2.5, "whole number"),
        ("diffusion_steps", True, "whole number"),
        ("anneal_steps", -1, "anneal_steps must be at least 0"),
        ("anneal_steps", "many", "whole number"),
        ("num_samples", 0, "num_samples must be at least 1"),
        ("eval_time_samples", 0, "eval_time_samples must be at least 1"),
        ("stop_after_nan_steps", -1, "stop_after_nan_steps must be at least 0"),
        ("time_epsilon", 0.7, r"time_epsilon must lie in \[0, 0.5\]"),
        ("diffusion_steps", 10**9, "diffusion_steps must be at least 1 and at most 100000"),
        ("logits_temp", -1, "logits_temp must be a number of at least 0"),
        ("logits_temp", float("nan"), "logits_temp must be a number of at least 0"),
        ("topp_temp", 0, r"topp_temp must lie in \(0, 1\], got 0"),
        ("topp_temp", 1.2, "topp_temp must lie in"),
        ("edit_ratio", 1, r"edit_ratio must lie in \[0, 1\), got 1"),
        ("edit_ratio", -0.5, r"edit_ratio must lie in \[0, 1\), got -0.5"),
        ("edit_threshold", 1.5, r"edit_threshold must lie in \(0, 1\], got 1.5"),
        ("topp_temp", -1, r"topp_temp must lie in \(0, 1\], got -1"),
        ("remask_cap", -0.5, r"remask_cap must lie in \[0, 1\], got -0.5"),
        ("edit_threshold", 0, r"edit_threshold must lie in \(0, 1\], got 0"),
        ("edit_steps", -1, "edit_steps must be at least 0"),
        ("remask_cap", 1.5, r"remask_cap must lie in \[0, 1\]"),
        pytest.param("uniform_ratio", 10**400, "uniform_ratio must lie in", id="a number beyond all"),
        (
            "denoising_strategy",
            None,
            "denoising_strategy is empty; write a value, or remove the key .*default is low_confidence",
        ),
        ("save_trace", None, r"save_trace is empty; .*default is False\)"),
        ("diffusion_steps", None, r"diffusion_steps is empty; .*default is 64\)"),
        ("logits_temp", None, r"logits_temp is empty; .*default is 0.95\)"),
        (
            "mask_token",
            ["MASK"],
            r"\['MASK'\] is a list, as YAML reads brackets; write mask_token: '\[MASK\]' or 'MASK'",
        ),
        ("sep_token", ["\n"], r'is a list, as YAML reads brackets; write sep_token: "\\n", with the quotes'),
        ("mask_token", 740.0, "mask_token: 740.0 is a number with a fraction; write the id as a whole number: 740"),
        ("mask_token", 740.5, "mask_token: 740.5 is of type float; write a token in quotes, or an id"),
        ("mask_token", {"a": 1}, "is of type dict; write a token in quotes, or an id"),
        ("suppress_tokens", [5, 7], "suppress_tokens: .* is a list; write tokens or ids in one text"),
        ("checkpoint_dir", 5, "checkpoint_dir: 5 is of type int; write the path of a folder"),
        ("checkpoint_dir", " ", "checkpoint_dir is empty; write the path of a folder, or remove the key"),
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


@pytest.mark.parametrize(
    "value",
    [None, "", [], ["x"], [5], {}, {"a": 1}, 1.5, float("nan"), float("inf"), 10**400, -(10**400), True, "zzz"],
    ids=lambda value: repr(value)[:8],
)
@pytest.mark.parametrize("spec", dataclasses.fields(DiffusionArguments), ids=lambda spec: spec.name)
def test_no_value_of_any_key_is_more_than_an_error_that_names_it(spec, value):
    """Whatever YAML makes of a line: the key takes it as what it takes, or the message names the key."""
    try:
        arguments = DiffusionArguments(**{spec.name: value})
        arguments.validate()
    except ValueError as error:
        assert spec.name in str(error)
    else:
        taken = getattr(arguments, spec.name)
        assert not isinstance(taken, (list, dict)) and (taken is not None or spec.default is None)
