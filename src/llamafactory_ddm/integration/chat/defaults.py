"""How a server samples where neither YAML nor request says.

In blocks, so that text is final and sent early; every token that is certain in one step, as docs/performance.md shows
that fixed steps need more forward passes for the same quality; and as many steps as tokens at most, as 64 steps would
write a long canvas several uncertain tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from ...modeling.diffusion_config import DiffusionConfig
from ...sampling import SamplingSettings
from ...sampling.keywords import with_keywords

STRATEGY, BLOCK_LENGTH = "confidence_threshold", 16
# Keys that choose another pace, with which the strategy above would contradict them.
_PACES = ("denoising_strategy", "commit_schedule", "score_distribution")


def served_settings(settings: SamplingSettings, chosen: Collection[str]) -> SamplingSettings:
    """Return the settings of a YAML with the server's strategy where the YAML chooses none.

    Args:
        settings: of the YAML.
        chosen: keys that it sets.
    """
    if not set(_PACES).isdisjoint(chosen):
        return settings
    return with_keywords(settings, {"denoising_strategy": STRATEGY})


def fitted_settings(
    settings: SamplingSettings, chosen: Collection[str], n_tokens: int, config: DiffusionConfig
) -> SamplingSettings:
    """Return the settings of a request with a block length and a number of steps where none was chosen.

    Args:
        settings: of the request.
        chosen: keys that the request or the YAML sets.
        n_tokens: tokens to generate.
        config: of the model; a block model has its own blocks.
    """
    if config.train_block_length is not None:
        return settings
    if "diffusion_steps" not in chosen:
        settings = replace(settings, diffusion_steps=max(n_tokens, 1))
    if "block_length" not in chosen:
        # Each block needs a step.
        shortest = math.ceil(n_tokens / settings.diffusion_steps)
        settings = replace(settings, block_length=max(BLOCK_LENGTH, shortest))
    return settings
