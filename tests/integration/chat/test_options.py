"""The options of a request, over the server's defaults."""

import pytest

from llamafactory_ddm.integration.chat.options import read_options
from llamafactory_ddm.sampling import SamplingSettings
from llamafactory_ddm.sampling.keywords import with_keywords

DEFAULTS = with_keywords(SamplingSettings(), {"temperature": 0.7, "block_length": 8, "diffusion_steps": 16})


class Generator:
    """Settings as a TextGenerator takes them, without a model."""

    def settings(self, settings, **keywords):
        return with_keywords(settings, keywords)


def read(**keywords):
    return read_options(Generator(), DEFAULTS, None, keywords)


def test_what_a_request_does_not_set_is_the_servers():
    options = read(top_k=None, stop=None)
    assert options.settings == with_keywords(DEFAULTS, {"seed": options.settings.seed})
    assert (options.n, options.max_tokens, options.stop, options.timeout, options.shows_canvas) == (
        1,
        None,
        (),
        None,
        False,
    )
    assert len({read().settings.seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"temperature": 0.2}, {"temperature": 0.2}),
        ({"top_p": 0.5, "top_k": 3}, {"topp_temp": 0.5, "top_k": 3}),
        ({"logits_temp": 0.3}, {"temperature": 0.3}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.5}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"diffusion_steps": 3, "kv_cache": "dual"}, {"diffusion_steps": 3, "kv_cache": "dual"}),
        ({"denoising_strategy": "entropy_bound", "entropy_bound": 0.5}, None),
    ],
)
def test_keys_of_generation(keywords, expected):
    assert read(**keywords, seed=3).settings == with_keywords(DEFAULTS, {**(expected or keywords), "seed": 3})


def test_upstreams_names():
    options = read(num_return_sequences=2, max_new_tokens=9, skip_special_tokens=True, length_penalty=1.0, num_beams=1)
    assert (options.n, options.max_tokens) == (2, 9)


def test_stops_and_timeouts():
    assert read(stop="a").stop == ("a",)
    assert read(stop=["a", "b", "a"]).stop == ("a", "b")
    assert read(timeout=2.0).timeout == 2.0
    assert read_options(Generator(), DEFAULTS, 5.0, {"timeout": 9}).timeout == 5.0
    assert read_options(Generator(), DEFAULTS, 5.0, {"timeout": 1}).timeout == 1.0


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"temprature": 1}, "temprature.*temperature"),
        ({"diffusion_steps": 0}, "^diffusion_steps"),
        ({"denoising_strategy": "fast"}, "^denoising_strategy"),
        ({"temperature": -1}, "^temperature"),
        ({"temperature": 1, "logits_temp": 1}, "temperature"),
        ({"n": 0}, "^n "),
        ({"n": True}, "^n "),
        ({"n": 129}, "^n "),
        ({"n": 1, "num_return_sequences": 1}, "num_return_sequences and n"),
        ({"max_tokens": 0}, "^max_tokens"),
        ({"stop": ""}, "^stop"),
        ({"stop": list("abcde")}, "^stop"),
        ({"stop": [1]}, "^stop"),
        ({"stop": 5}, "^stop"),
        ({"stop": {"a": 1}}, "^stop"),
        ({"skip_special_tokens": False}, "^skip_special_tokens"),
        ({"num_beams": 2}, "^num_beams"),
        ({"max_length": 9}, "^max_length"),
        ({"confidence_threshold": 0.5}, "^confidence_threshold.*denoising_strategy"),
        ({"timeout": 0}, "^timeout"),
        ({"do_sample": 3}, "^do_sample"),
        ({"seed": "x"}, "^seed"),
    ],
)
def test_wrong_keywords(keywords, named):
    with pytest.raises(ValueError, match=named):
        read(**keywords)
