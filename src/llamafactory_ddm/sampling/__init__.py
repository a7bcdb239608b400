"""Sampling from masked diffusion models: one loop, with the choice of tokens and of positions as parts of it."""

from .logits import Draws, LogitsConfig, draw_tokens, filtered_log_probs
from .loop import (
    Context,
    Denoiser,
    EarlyStop,
    SamplerOutput,
    SamplerState,
    denoise_step,
    sample,
    start,
)
from .strategies import STRATEGIES, Plan, Strategy, Turn, get_strategy, register

__all__ = [
    "STRATEGIES",
    "Context",
    "Denoiser",
    "Draws",
    "EarlyStop",
    "LogitsConfig",
    "Plan",
    "SamplerOutput",
    "SamplerState",
    "Strategy",
    "Turn",
    "denoise_step",
    "draw_tokens",
    "filtered_log_probs",
    "get_strategy",
    "register",
    "sample",
    "start",
]
