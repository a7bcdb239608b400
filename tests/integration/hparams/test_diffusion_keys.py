"""The diffusion keys alone: defaults, conversion, and errors that name the key and what is allowed."""

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
    ("key", "value", "pattern"),
    [
        ("loss_norm", "token", "tokens, masked, sequence.*'token'.*'tokens'"),
        ("loss_weighting", "ebo", "'ebo'.*'elbo'"),
        ("noise_schedule", "cosin", "'cosin'.*'cosine'"),
        ("denoising_strategy", "low-confidence", "'low-confidence'.*'low_confidence'"),
        ("uniform_ratio", 1.5, r"\[0, 1\].* 1\.5"),
        ("uniform_ratio", -0.1, r"\[0, 1\].* -0\.1"),
        ("noise_process", "mix", "'mix'.*'mixed'"),
        ("random_truncate_ratio", 1.5, r"\[0, 1\].* 1\.5"),
        ("diffusion_steps", 0, r"\b1\b.*\b100000\b.* 0"),
        ("diffusion_steps", 2.5, " 2.5"),
        ("diffusion_steps", True, " True"),
        ("anneal_steps", -1, r" 0\b.* -1"),
        ("anneal_steps", "many", "'many'"),
        ("num_samples", 0, r" 1\b.* 0"),
        ("eval_time_samples", 0, r" 1\b.* 0"),
        ("stop_after_nan_steps", -1, r" 0\b.* -1"),
        ("time_epsilon", 0.7, r"\[0, 0\.5\].* 0\.7"),
        ("diffusion_steps", 10**9, r"\b1\b.*\b100000\b.* 1000000000"),
        ("logits_temp", -1, r" 0\b.* -1"),
        ("logits_temp", float("nan"), " nan"),
        ("topp_temp", 0, r"\(0, 1\].* 0"),
        ("topp_temp", 1.2, r"\(0, 1\].* 1\.2"),
        ("edit_ratio", 1, r"\[0, 1\).* 1"),
        ("edit_ratio", -0.5, r"\[0, 1\).* -0\.5"),
        ("edit_threshold", 1.5, r"\(0, 1\].* 1\.5"),
        ("topp_temp", -1, r"\(0, 1\].* -1"),
        ("remask_cap", -0.5, r"\[0, 1\].* -0\.5"),
        ("edit_threshold", 0, r"\(0, 1\].* 0"),
        ("edit_steps", -1, r" 0\b.* -1"),
        ("remask_cap", 1.5, r"\[0, 1\].* 1\.5"),
        pytest.param("uniform_ratio", 10**400, r"\[0, 1\]", id="a number beyond all"),
        ("denoising_strategy", None, "low_confidence"),
        ("save_trace", None, "False"),
        ("diffusion_steps", None, r"\b64\b"),
        ("logits_temp", None, r"\b0\.95\b"),
        ("mask_token", ["MASK"], r"\['MASK'\] .*mask_token: '\[MASK\]' or 'MASK'"),
        ("sep_token", ["\n"], r'sep_token: "\\n"'),
        ("mask_token", 740.0, r"740\.0 .* 740$"),
        ("mask_token", 740.5, r"740\.5 .*float"),
        ("mask_token", {"a": 1}, "dict"),
        ("suppress_tokens", [5, 7], r"\[5, 7\] .*'5,7'"),
        ("checkpoint_dir", 5, " 5 .*int"),
        ("checkpoint_dir", " ", "folder"),
        ("shift", "maybe", "'maybe'"),
        ("antithetic_time", 3, " 3"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key, value, pattern):
    with pytest.raises(ValueError, match=f"^{key}\\b.*{pattern}"):
        DiffusionArguments(**{key: value}).validate()


@pytest.mark.parametrize(
    ("key", "value", "converted"),
    [
        ("diffusion_steps", "32", 32),
        ("anneal_steps", 1e4, 10000),
        ("logits_temp", "0.5", 0.5),
        ("time_epsilon", "1e-4", 1e-4),
        ("shift", "False", False),
        ("antithetic_time", "true", True),
    ],
)
def test_values_are_converted_to_the_type_of_the_key(key, value, converted):
    arguments = DiffusionArguments(**{key: value})
    arguments.validate()
    assert getattr(arguments, key) == converted
    assert type(getattr(arguments, key)) is type(converted)


def test_changed_keys_are_listed_in_order():
    assert DiffusionArguments(num_samples=3, shift=False).changed_keys() == ["num_samples", "shift"]


@pytest.mark.parametrize(
    "value",
    [None, "", [], ["x"], [5], {}, {"a": 1}, 1.5, float("nan"), float("inf"), 10**400, -(10**400), True, "zzz"],
    ids=lambda value: repr(value)[:8],
)
@pytest.mark.parametrize("spec", dataclasses.fields(DiffusionArguments), ids=lambda spec: spec.name)
def test_any_value_of_any_key_is_converted_or_an_error_that_names_the_key(spec, value):
    try:
        arguments = DiffusionArguments(**{spec.name: value})
        arguments.validate()
    except ValueError as error:
        assert spec.name in str(error)
    else:
        converted = getattr(arguments, spec.name)
        assert not isinstance(converted, (list, dict)) and (converted is not None or spec.default is None)
