"""Settings from keyword arguments."""

import pytest

from llamafactory_ddm.sampling import LogitsConfig, SamplingSettings
from llamafactory_ddm.sampling.keywords import with_keywords

START = SamplingSettings(diffusion_steps=7, logits=LogitsConfig(0.5, 0.8))


def test_attributes_of_the_settings_and_of_the_logits():
    found = with_keywords(START, {"temperature": 0, "block_length": 4, "seed": 3, "eos_penalty": 1.5})
    assert found == SamplingSettings(
        diffusion_steps=7, block_length=4, seed=3, logits=LogitsConfig(0, 0.8, eos_penalty=1.5)
    )
    assert with_keywords(START, {}) == START


def test_names_of_yaml_keys():
    found = with_keywords(START, {"logits_temp": 0.2, "topp_temp": 1.0, "suppress_tokens": (3,)})
    assert found.logits == LogitsConfig(0.2, 1.0, suppress=(3,))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"temprature": 0}, "'temprature'.*'temperature'"),
        ({"steps": 3}, "'steps'.*'diffusion_steps'"),
        ({"logits": None}, "'logits'"),
        ({"temperature": 0, "logits_temp": 0}, "temperature and logits_temp"),
    ],
)
def test_unknown_keys_and_keys_set_twice(keywords, words):
    with pytest.raises(TypeError, match=words):
        with_keywords(START, keywords)


def test_a_key_that_nothing_reads_is_an_error():
    with pytest.raises(ValueError, match=r"remask_cap: 0.5 .*denoising_strategy: remdm"):
        with_keywords(START, {"remask_cap": 0.5})
    assert with_keywords(START, {"remask_cap": 0.5, "denoising_strategy": "remdm"}).remask_cap == 0.5


def test_the_former_name_of_a_value_is_an_error_with_the_new_name():
    with pytest.raises(ValueError, match="set length_predictor: eos_cdf"):
        with_keywords(START, {"early_stop": "predict", "length_predictor": "belief"})


def test_values_are_checked():
    assert with_keywords(START, {"top_k": 0}).logits.top_k is None
    assert with_keywords(START, {"top_p": "0.5"}).logits.top_p == 0.5
    with pytest.raises(ValueError, match="temperature"):
        with_keywords(START, {"temperature": -1})
    with pytest.raises(ValueError, match=r"early_stop .*'never'"):
        with_keywords(START, {"early_stop": "never"})
