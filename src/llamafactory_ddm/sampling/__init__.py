"""Sampling from masked diffusion models: one loop, with the choice of tokens and of positions as parts of it."""

from .logits import LogitsConfig
from .loop import Denoiser, SamplerOutput, sample
from .strategies import STRATEGIES, get_strategy

__all__ = ["STRATEGIES", "Denoiser", "LogitsConfig", "SamplerOutput", "get_strategy", "sample"]
