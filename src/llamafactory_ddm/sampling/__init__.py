"""Sampling from masked diffusion models: one loop, with the choice of tokens and of positions as parts of it."""

from .logits import LogitsConfig, draw_tokens, filtered_log_probs
from .loop import Denoiser, SamplerOutput, SamplerState, denoise_step, sample, start
from .strategies import STRATEGIES, Plan, Strategy, get_strategy, register

__all__ = [
    "STRATEGIES",
    "Denoiser",
    "LogitsConfig",
    "Plan",
    "SamplerOutput",
    "SamplerState",
    "Strategy",
    "denoise_step",
    "draw_tokens",
    "filtered_log_probs",
    "get_strategy",
    "register",
    "sample",
    "start",
]
