"""How a server samples where neither YAML nor request says."""

import pytest

from llamafactory_ddm.integration.chat.defaults import fitted_settings, served_settings
from llamafactory_ddm.modeling.diffusion_config import DiffusionConfig
from llamafactory_ddm.sampling import SamplingSettings
from llamafactory_ddm.sampling.keywords import with_keywords

FULL = DiffusionConfig("<|mask|>", 1, True, "masked", 0.0, "linear", 1.0)
BLOCK = DiffusionConfig("<|mask|>", 1, True, "masked", 0.0, "linear", 1.0, attention="block", train_block_length=4)


def settings_of(config, n_tokens, **keys):
    settings = served_settings(with_keywords(SamplingSettings(), keys), keys)
    return fitted_settings(settings, keys, n_tokens, config)


@pytest.mark.parametrize(
    ("keys", "n_tokens", "expected"),
    [
        ({}, 100, ("confidence_threshold", 100, 16)),
        ({}, 3, ("confidence_threshold", 3, 16)),
        ({"denoising_strategy": "entropy"}, 100, ("entropy", 100, 16)),
        ({"commit_schedule": "dream"}, 100, ("low_confidence", 100, 16)),
        ({"diffusion_steps": 32}, 100, ("confidence_threshold", 32, 16)),
        ({"diffusion_steps": 2}, 100, ("confidence_threshold", 2, 50)),
        ({"diffusion_steps": 1}, 100, ("confidence_threshold", 1, 100)),
        ({"block_length": 10}, 100, ("confidence_threshold", 100, 10)),
        ({"block_length": 10, "diffusion_steps": 12}, 100, ("confidence_threshold", 12, 10)),
    ],
)
def test_full_attention(keys, n_tokens, expected):
    settings = settings_of(FULL, n_tokens, **keys)
    assert (settings.denoising_strategy, settings.diffusion_steps, settings.block_length) == expected


def test_a_block_model_has_blocks_and_steps_of_its_own():
    settings = settings_of(BLOCK, 100)
    assert settings == with_keywords(SamplingSettings(), {"denoising_strategy": "confidence_threshold"})


def test_each_block_gets_a_step():
    import torch

    from llamafactory_ddm.sampling.budget import split_into_blocks, steps_of_blocks

    for n_tokens in (1, 5, 16, 17, 33, 100):
        for steps in (None, 1, 2, 3, 5, 64):
            keys = {} if steps is None else {"diffusion_steps": steps}
            settings = settings_of(FULL, n_tokens, **keys)
            block = split_into_blocks(torch.ones(1, n_tokens, dtype=torch.bool), settings.block_length)
            steps_of_blocks(block, settings.diffusion_steps)  # raises where there are more blocks than steps
